"""The table of all scores against loops over rows, and what it says of controls that are not of all rows."""

import json
import random

import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.evaluation.metrics import ecgqa_scores, exact_match, report_scores
from toolkit.evaluation.scores import mean_score
from toolkit.evaluation.statistics import difference, estimate
from toolkit.evaluation.table import QUESTIONS, find, table, text_table
from toolkit.tasks.answers import split_answers

KINDS = ("single-verify", "single-choose", "single-query")
REPORTS = ("sinus rhythm. normal ecg.", "atrial fibrillation. lvh.", "sinus bradycardia. no lvh.", "sinus rhythm. left axis deviation. t wave changes.")
CLASSES = {1: ["yes", "no"], 2: ["a", "b", "none"], 3: ["a", "b", "c"]}
DRAWS = 50


def question(i, kind, prediction, reference, **more):
    return {"id": str(i), "task": "ecgqa", "question_type": kind, "template_id": 1 + KINDS.index(kind), "attribute_type": "noise" if i % 2 else "scp_code",
            "prediction": prediction, "reference": reference, "patient": i // 3, "source": "ptbxl", "site": str(i % 4 * 5), **more}  # fmt: skip


def report(i, prediction, reference, **more):
    return {"id": f"r{i}", "task": "report", "question_type": "report", "prediction": prediction, "reference": reference, "patient": i // 2, **more}


@pytest.fixture(scope="module")
def rows():
    rng, made = random.Random(1), []
    for i in range(120):
        kind = KINDS[i % 3]
        one, other = ("yes", "no") if kind == "single-verify" else ("a", "a; b")
        reference = rng.choice([one, other])
        say = lambda share, reference=reference, one=one: reference if rng.random() < share else rng.choice([one, "z", ""])  # noqa: E731
        made.append(question(i, kind, say(0.8), reference, controls={"majority": say(0.3), "shuffled": say(0.4)}))
    for i in range(20):
        reference = rng.choice(REPORTS)
        say = lambda share, reference=reference: reference if rng.random() < share else rng.choice(REPORTS)  # noqa: E731
        made.append(report(i, say(0.7), reference, controls={"majority": REPORTS[0], "shuffled": say(0.2)}))
    return made


@pytest.fixture(scope="module")
def metrics(rows):
    return table(rows, CLASSES, draws=DRAWS)


def right(row, said=None):
    return split_answers(row["prediction"] if said is None else said) == split_answers(row["reference"])


def test_every_line_of_exact_match_is_a_loop_over_its_rows(rows, metrics):
    groups = {
        "all": lambda row: "all",
        "question_type": lambda row: row["question_type"],
        "attribute_type": lambda row: row["attribute_type"],
        "template": lambda row: str(row["template_id"]),
        "site": lambda row: f"site {row['site']}",
        "multi_answer": lambda row: "2+ answers" if ";" in row["reference"] else None,
    }
    asked = [row for row in rows if row["task"] == "ecgqa"]
    seen = 0
    for level, group in groups.items():
        for of in {group(row) for row in asked} - {None}:
            line, mine = find(metrics, "exact_match", of, level), [row for row in asked if group(row) == of]
            assert (line["section"], line["n"], line["patients"]) == (QUESTIONS, len(mine), len({row["patient"] for row in mine}))
            assert line["values"]["model"] == pytest.approx(sum(map(right, mine)) / len(mine), abs=1e-8)
            for name in ("majority", "shuffled"):
                control = sum(right(row, row["controls"][name]) for row in mine) / len(mine)
                assert line["values"][name] == pytest.approx(control, abs=1e-8)
                assert line["differences"][name]["difference"] == pytest.approx(line["values"]["model"] - control, abs=1e-8)
            seen += 1
    assert seen == sum(line["score"] == "exact_match" and line["level"] != "macro" for line in metrics["table"])
    assert [find(metrics, "exact_match", kind, "question_type")["values"]["model"] for kind in KINDS] == pytest.approx(
        [exact_match(rows)[kind] for kind in KINDS], abs=1e-8
    )


def test_macro_is_the_mean_of_its_groups_and_its_interval_is_of_the_same_draws(rows, metrics):
    for level in ("question_type", "template"):
        each = [line["values"]["model"] for line in metrics["table"] if (line["score"], line["level"]) == ("exact_match", level)]
        line = find(metrics, "exact_match", level, "macro")
        assert line["values"]["model"] == pytest.approx(np.mean(each), abs=1e-8) and line["interval"][0] < line["values"]["model"] < line["interval"][1]
    asked = [row for row in rows if row["task"] == "ecgqa"]
    names, draw, means = sorted({row["patient"] for row in asked}), np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = [row for k in draw.integers(len(names), size=len(names)) for row in asked if row["patient"] == names[k]]
        means.append(np.mean([np.mean([right(row) for row in drawn if row["question_type"] == kind]) for kind in KINDS]))
    assert find(metrics, "exact_match", "question_type", "macro")["interval"] == pytest.approx(list(np.percentile(means, [2.5, 97.5])), abs=1e-8)


def test_intervals_and_differences_are_those_of_each_score_alone(rows, metrics):
    patients = np.array([row["patient"] for row in rows])
    reports = [i for i, row in enumerate(rows) if row["task"] == "report"]
    said = {name: [row["controls"][name] if name else row["prediction"] for row in rows] for name in ("", "majority", "shuffled")}
    scores = {name: {one.name: one for one in [*ecgqa_scores(rows, given, CLASSES), *report_scores(rows, given)]} for name, given in said.items()}
    assert reports and len(scores[""]) > 15
    for name, score in scores[""].items():
        line = find(metrics, name)
        value, *interval = estimate(score, patients, DRAWS)
        assert line["values"]["model"] == pytest.approx(value, abs=1e-8) and line["interval"] == pytest.approx(interval, abs=1e-8)
        for control in ("majority", "shuffled"):
            expected = dict(zip(("difference", "low", "high"), difference(score, scores[control][name], patients, DRAWS)))
            assert line["differences"][control] == pytest.approx(expected, abs=1e-8)


def test_findings_have_a_line_each_and_nothing_is_nan(metrics):
    line = find(metrics, "f1", "atrial_fibrillation", "finding")
    assert line["section"] == "Clinical findings" and line["n"] == 20 and 0 < line["values"]["model"] <= 1 and line["values"]["majority"] == 0
    never = find(metrics, "precision", "wpw", "finding")
    assert never["values"] == {"model": None, "majority": None, "shuffled": None} and never["interval"] is None and never["differences"] == {}
    json.dumps(metrics, allow_nan=False)
    for line in metrics["table"]:
        assert all(value is None or 0 <= value <= 1 for value in line["values"].values())
        low, high = line["interval"] or (0, 0)
        assert 0 <= low <= high <= 1
    assert {"exact_match", "bleu_corpus", "findings", "interval", "difference", "macro"} <= metrics["conventions"].keys()


def test_the_order_of_rows_moves_no_value(rows, metrics):
    mixed = random.Random(2).sample(rows, len(rows))
    again = table(mixed, CLASSES, columns=metrics["columns"][1:], draws=DRAWS)
    assert again == metrics  # patients are numbers in both, so the draws are the same too


def test_a_control_that_some_rows_lack_is_compared_on_the_rows_that_have_it(rows):
    partial = [{**row, "controls": {name: said for name, said in row["controls"].items() if name == "majority" or i % 3}} for i, row in enumerate(rows)]
    metrics = table(partial, draws=DRAWS)
    line = find(metrics, "exact_match")
    have = [row for row in partial if row["task"] == "ecgqa" and "shuffled" in row["controls"]]
    model, shuffled = (sum(right(row, said(row)) for row in have) / len(have) for said in (lambda row: None, lambda row: row["controls"]["shuffled"]))
    assert line["rows"] == {"shuffled": len(have)} and line["n"] > len(have)
    assert line["values"]["shuffled"] == pytest.approx(shuffled, abs=1e-8)
    assert line["differences"]["shuffled"]["difference"] == pytest.approx(model - shuffled, abs=1e-8) != line["values"]["model"] - shuffled
    patients = np.array([row["patient"] for row in have])
    pair = [
        mean_score("", "", np.arange(len(have)), [right(row, said(row)) for row in have])
        for said in (lambda row: None, lambda row: row["controls"]["shuffled"])
    ]
    assert line["differences"]["shuffled"]["low"] == pytest.approx(difference(*pair, patients, DRAWS)[1], abs=1e-8)
    assert any("rows have no 'shuffled' control" in note for note in metrics["notes"])
    # of the questions alone: reports have no such column
    only = [{**row, "controls": {} if row["task"] == "report" else row["controls"]} for row in rows]
    reports = find(table(only, draws=DRAWS), "rouge_l")
    assert reports["values"]["shuffled"] is None and reports["differences"] == {}


def test_lines_only_where_there_are_rows(rows):
    questions, reports = ([row for row in rows if row["task"] == task] for task in ("ecgqa", "report"))
    assert {line["section"] for line in table(questions, draws=DRAWS)["table"]} == {QUESTIONS}
    assert {line["section"] for line in table(reports, draws=DRAWS)["table"]} == {"Reports", "Clinical findings"}
    assert find(table(questions, draws=DRAWS), "invalid") is None  # no classes
    one = table([{"task": "ecgqa", "question_type": "unknown", "prediction": "", "reference": "a", "id": "1"}], draws=DRAWS)
    assert [(line["level"], line["of"], line["interval"], line["patients"]) for line in one["table"]] == [
        ("all", "all", None, None), ("macro", "question_type", None, None), ("question_type", "unknown", None, None)
    ]  # fmt: skip
    notes = "\n".join(one["notes"])
    assert "intervals are over rows" in notes and "1 of 1 predictions are empty" in notes and "1 questions name no type" in notes
    assert one["columns"] == ["model"] and text_table(one)
    for wrong in ([], [{"task": "ecg", "question_type": "x", "prediction": "", "reference": "a"}]):
        with pytest.raises(UserError):
            table(wrong)


def test_several_sources_are_groups_too(rows):
    mixed = [{**row, "source": "mimic" if i % 2 else "ptbxl", "site": "" if i % 2 else row.get("site", "")} for i, row in enumerate(rows)]
    of = [line["of"] for line in table(mixed, draws=DRAWS)["table"] if (line["score"], line["level"]) == ("exact_match", "site")]
    assert of == ["mimic", "ptbxl, site 0", "ptbxl, site 10"]
    one_site = [{**row, "site": "3"} for row in rows]
    assert not any(line["level"] == "site" for line in table(one_site, draws=DRAWS)["table"])


def test_the_terminals_table_fits_and_says_what_it_leaves_out(rows, metrics):
    four = [{**row, "controls": {**row["controls"], "blind": "a", "flat": "b", "noise 10 dB": "c", "noise 0 dB": "d"}} for row in rows]
    for found in (metrics, table(four, CLASSES, draws=DRAWS)):
        text = text_table(found)
        assert max(map(len, text.splitlines())) <= 120
        line = next(one for one in text.splitlines() if one.startswith("Exact match "))
        shown = find(found, "exact_match")
        over = shown["differences"]["shuffled"]
        assert f"{100 * shown['values']['model']:.1f}" in line and line.endswith(
            f"{100 * over['difference']:+.1f} ({100 * over['low']:+.1f} to {100 * over['high']:+.1f})"
        )
        assert "over shuffled" in text and "  single-verify" in text and "predictions are empty" in text and "nan" not in text
    assert "for want of room here: noise 10 dB, noise 0 dB" in text
