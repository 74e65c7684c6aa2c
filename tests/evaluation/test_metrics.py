"""Metrics of questions against independent, slow, obvious computations, and the blind baseline against brute force."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.evaluation import blind
from toolkit.evaluation.metrics import CONVENTIONS, ecgqa_scores, exact_match, is_correct, read_classes, report_scores
from toolkit.tasks.answers import join_answers

DATA = Path(os.environ.get("ECG_DATA", Path(__file__).parents[2] / "../shared/data"))
SINGLE = ["single-verify", "single-choose", "single-query"]
COMPARISON = "comparison_consecutive-query"


def question(prediction, reference, kind="single-query", template=1):
    return {"id": "q", "task": "ecgqa", "question_type": kind, "template_id": template, "prediction": prediction, "reference": reference}


def report(prediction, reference):
    return {"id": "r", "task": "report", "question_type": "report", "prediction": prediction, "reference": reference}


def scored(rows, classes=None):
    return {score.name: score.all() for score in ecgqa_scores(rows, [row["prediction"] for row in rows], classes)}


answers = st.lists(st.sampled_from(["yes", "no", "avb", "lead V1", "Lead I, aVL"]), unique=True, max_size=3)
kinds = st.sampled_from([*SINGLE, COMPARISON, "own-query"])
question_rows = st.lists(st.builds(question, answers.map("; ".join), answers.filter(len).map("; ".join), kinds, st.integers(1, 3)), max_size=12)
CLASSES = {1: ["yes", "no"], 2: ["lead V1", "Lead I, aVL", "none"]}


# exact match


@pytest.mark.parametrize(
    "prediction, reference, right",
    [
        ("yes", "yes", True),
        ("Yes ", "yes", True),
        ("lead V2; lead I", "lead I; lead V2", True),
        ("a; a", "a", True),
        ("a;", "a", True),
        ("a", "a; b", False),
        ("a; b", "a", False),
        ("", "none", False),
        (" ; ", "none", False),
        ("a, b", "a; b", False),
        ("yes, it is", "yes", False),
    ],
)
def test_exact_match_of_one_question(prediction, reference, right):
    row = question(prediction, reference)
    assert exact_match([row])["overall"] == float(right) == scored([row])["exact_match"] and is_correct(row) is right


@given(question_rows)
def test_exact_match_is_a_plain_count(rows):
    scores = exact_match(rows)
    asked, right = Counter(), Counter()
    for row in rows:
        for key in ("overall", row["question_type"]):
            asked[key] += 1
            if sorted(row["prediction"].split("; ")) == sorted(row["reference"].split("; ")):
                right[key] += 1
    assert scores == {key: right[key] / asked[key] if asked[key] else None for key in {"overall", *SINGLE, *asked}}
    assert list(scores)[:4] == ["overall", *SINGLE] and list(scores)[4:] == sorted(set(asked) - {"overall", *SINGLE})
    if rows:
        assert scored(rows)["exact_match"] == pytest.approx(scores["overall"])


def test_reports_are_no_questions_and_questions_no_reports():
    rows = [report("a b", "a c"), question("yes", "yes", "single-verify")]
    assert exact_match(rows) == {"overall": 1, "single-verify": 1, "single-choose": None, "single-query": None}
    assert exact_match(rows[:1]) == exact_match([]) == dict.fromkeys(["overall", *SINGLE])
    predictions = ["a b", "yes"]
    assert [score.rows.tolist() for score in report_scores(rows, predictions)] == [[0]] * 16
    assert [score.rows.tolist() for score in ecgqa_scores(rows, predictions, CLASSES)] == [[1]] * 2
    assert report_scores(rows[1:], predictions[1:]) == [] == ecgqa_scores(rows[:1], predictions[:1], CLASSES)


# F1 and invalid answers


@pytest.mark.parametrize(
    "prediction, f1",
    [("a; b", 1), ("A ;b", 1), ("a", 2 / 3), ("a; c", 1 / 2), ("a; b; c; d", 2 / 3), ("c", 0), ("", 0), (" ; ", 0)],
)
def test_f1_of_one_question(prediction, f1):
    assert scored([question(prediction, "a; b")])["answer_f1"] == pytest.approx(f1)


def test_f1_is_over_queries_of_all_kinds():
    rows = [question("a", "a; b"), question("a", "a; b", "single-choose"), question("a", "a", COMPARISON), question("b", "a", "own-query")]
    (f1,) = (score for score in ecgqa_scores(rows, [row["prediction"] for row in rows], None) if score.name == "answer_f1")
    assert f1.rows.tolist() == [0, 2, 3] and f1.all() == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert list(scored(rows[1:2])) == ["exact_match"]


@pytest.mark.parametrize(
    "prediction, template, invalid",
    [
        ("yes", 1, 0), ("Yes; no ", 1, 0), ("maybe", 1, 1), ("yes; maybe", 1, 1), ("", 1, 1), (" ; ", 1, 1), ("none", 1, 1),
        ("none", 2, 0), ("lead i, avl", 2, 0), ("lead", 2, 1),
    ],
)  # fmt: skip
def test_invalid_of_one_question(prediction, template, invalid):
    assert scored([question(prediction, "yes", template=template)], CLASSES)["invalid"] == invalid


@given(question_rows.filter(len))
def test_invalid_is_a_plain_count_over_templates_with_classes(rows):
    rows = [*rows, {key: value for key, value in question("?", "yes").items() if key != "template_id"}]
    closed = [row for row in rows if row.get("template_id") in CLASSES]
    bad = [row for row in closed if not row["prediction"] or any(part not in CLASSES[row["template_id"]] for part in row["prediction"].split("; "))]
    assert scored(rows, CLASSES).get("invalid") == (pytest.approx(len(bad) / len(closed)) if closed else None)
    assert "invalid" not in scored(rows)


@given(question_rows.filter(len), st.randoms(use_true_random=False))
def test_bounds_and_the_order_of_rows(rows, random):
    scores, shuffled = scored(rows, CLASSES), random.sample(rows, len(rows))
    assert all(0 <= value <= 1 for value in scores.values()) and set(scores) <= set(CONVENTIONS)
    assert scored(shuffled, CLASSES) == pytest.approx(scores, rel=1e-12) and exact_match(shuffled) == exact_match(rows)


@given(question_rows.filter(len), st.lists(answers.map("; ".join), min_size=12, max_size=12))
def test_other_predictions_give_scores_of_the_same_rows(rows, others):
    perfect = ecgqa_scores(rows, [row["reference"] for row in rows], CLASSES)
    other = ecgqa_scores(rows, others[: len(rows)], CLASSES)
    assert [(score.name, score.rows.tolist()) for score in perfect] == [(score.name, score.rows.tolist()) for score in other]
    assert all(score.all() == 1 for score in perfect if score.name != "invalid")
    for score in ecgqa_scores(rows, [""] * len(rows), CLASSES):
        assert score.all() == (score.name == "invalid")


@given(question_rows.filter(len))
def test_a_score_of_some_rows_is_that_of_a_file_of_them(rows):
    some = np.arange(0, len(rows), 2)
    alone = scored([rows[i] for i in some], CLASSES)
    for score in ecgqa_scores(rows, [row["prediction"] for row in rows], CLASSES):
        part = score.on(some)
        assert np.isnan(part.all()) if score.name not in alone else part.all() == pytest.approx(alone[score.name])


# errors


def test_an_unknown_task_is_named_and_not_dropped():
    row = {**report("a", "a"), "task": "reports", "id": "ptbxl-7"}
    for score in (lambda: exact_match([row]), lambda: report_scores([row], ["a"]), lambda: ecgqa_scores([row], ["a"], None)):
        with pytest.raises(UserError, match="'ptbxl-7'.*'reports'"):
            score()


@pytest.mark.parametrize("name, at", [("task", 0), ("question_type", 0), ("reference", 0), ("task", 1), ("reference", 1)])
def test_a_missing_column_is_named_with_its_row(name, at):
    rows = [question("yes", "yes"), report("a", "a")]
    del rows[at][name]
    with pytest.raises(UserError, match=f"'{'qr'[at]}'.*'{name}' is missing"):
        ecgqa_scores(rows, ["yes", "a"], None) + report_scores(rows, ["yes", "a"])


def test_what_cannot_be_judged_is_named():
    for score in (lambda: ecgqa_scores([], [], None), lambda: report_scores([], [])):
        with pytest.raises(UserError, match="empty"):
            score()
    with pytest.raises(UserError, match="'q'.*'prediction' is missing"):
        exact_match([{"id": "q", "task": "ecgqa", "question_type": "single-verify", "reference": "yes"}])
    with pytest.raises(UserError, match="'q'.*'reference' is None"):
        ecgqa_scores([question("yes", None)], ["yes"], None)
    with pytest.raises(UserError, match="'q'.*holds no answer"):
        ecgqa_scores([question("", " ; ")], [""], None)
    with pytest.raises(ValueError, match="2 predictions for 1 rows"):
        ecgqa_scores([question("yes", "yes")], ["yes", "no"], None)


# classes


def test_classes_are_read(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("template_id,classes\n1,\"['no', 'not sure', 'yes']\"\n7,\"['bigeminal pattern (a, b, or c)', \"\"none's\"\"]\"\n", encoding="utf-8")
    assert read_classes(path) == {1: ["no", "not sure", "yes"], 7: ["bigeminal pattern (a, b, or c)", "none's"]}


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("", "no columns"),
        ("template,classes\n1,\"['no']\"\n", "no columns"),
        ("template_id,classes\n", "holds no template"),
        ("template_id,classes\none,\"['no']\"\n", "line 2"),
        ("template_id,classes\n1,\"['no'\"\n", "line 2"),
        ("template_id,classes\n1\n", "line 2"),
        ("template_id,classes\n1,\"['no']\"\n2,[]\n", "line 3"),
        ("template_id,classes\n1,\"['no', 3]\"\n", "line 2"),
        ("template_id,classes\n1,\"['no', 'a; b']\"\n", "line 2 .*'a; b' holds a ';'"),
        ("template_id,classes\n1,__import__('os')\n", "line 2"),
        ("template_id,classes\n1,\"['no']\"\n1,\"['yes']\"\n", "template 1 was there before"),
    ],
)
def test_classes_that_are_none_are_named(tmp_path, text, wrong):
    path = tmp_path / "classes.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"--classes: .*{wrong}"):
        read_classes(path)
    for other in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(UserError, match="--classes: .*cannot be read"):
            read_classes(other)


def test_ecg_qas_own_classes():
    path = DATA / "ecgqa/ptbxl/answers_for_each_template.csv"
    if not path.is_file():
        pytest.skip(f"no {path}: set ECG_DATA")
    classes = read_classes(path)
    assert sorted(classes) == list(range(1, 71)) and classes[2] == ["no", "yes"]
    assert all(join_answers(answers).split("; ") == sorted(answers) for answers in classes.values())  # none holds the separator


# the blind baseline


def asked(template, attribute, answer, kind="single-choose"):
    return {
        "id": "t", "task": "ecgqa", "question_type": kind, "attribute_type": "scp_code", "template_id": template,
        "question": "?", "answer": answer, "attribute": attribute,
    }  # fmt: skip


tasks = st.lists(
    st.builds(
        asked,
        st.integers(1, 3),
        st.one_of(st.none(), st.lists(st.sampled_from("ab"), unique=True, max_size=2)),
        answers.filter(len),
        kinds,
    ),
    max_size=15,
)


def slow_blind(train, task):
    same = [
        lambda t: t["template_id"] == task["template_id"] and sorted(t["attribute"] or []) == sorted(task["attribute"] or []),
        lambda t: t["template_id"] == task["template_id"],
        lambda t: t["question_type"] == task["question_type"],
        lambda t: True,
    ]
    for level in same:
        seen = [join_answers(t["answer"]) for t in train if level(t)]
        if seen:
            return sorted(set(seen), key=lambda answer: (-seen.count(answer), answer))[0]
    return ""


@settings(max_examples=60)
@given(tasks, tasks, st.randoms(use_true_random=False))
def test_blind_is_the_brute_force_majority(train, test, random):
    baseline = blind.fit(iter(train))
    assert baseline == blind.fit(random.sample(train, len(train)))
    restored = json.loads(json.dumps(baseline))
    for task in [*train, *test]:
        assert blind.predict(restored, task) == slow_blind(train, task)


def test_blind_falls_back_level_by_level():
    train = [
        asked(1, ["a"], ["yes"], "single-verify"),
        asked(1, ["b"], ["no"], "single-verify"),
        asked(1, ["c"], ["no"], "single-verify"),
        *[asked(2, ["a", "b"], ["b", "a"])] * 5,
    ]
    baseline = blind.fit(train)
    assert blind.predict(baseline, asked(1, ["a"], [], "single-verify")) == "yes"
    assert blind.predict(baseline, asked(1, ["new"], [], "single-verify")) == "no"
    assert blind.predict(baseline, asked(9, ["a"], [], "single-verify")) == "no"
    assert blind.predict(baseline, asked(9, ["a"], [], "single-query")) == "a; b"
    assert blind.predict(baseline, asked(2, ["b", "a"], [])) == "a; b"


def test_blind_reports_and_nothing_learned():
    reports = [{"id": "r", "task": "report", "report": text} for text in ("z", "a", "z", "a", "b")]
    assert blind.predict(blind.fit(reports), {"id": "x", "task": "report", "report": "?"}) == "a"
    nothing = blind.fit([])
    assert blind.predict(nothing, reports[0]) == "" and blind.predict(nothing, asked(1, None, ["yes"])) == ""
    with pytest.raises(ValueError, match="'t9'.*'pretrain'"):
        blind.fit([{"id": "t9", "task": "pretrain"}])


def test_an_unknown_question_type_is_an_error():
    for kind in ("single-verify", "comparison_irrelevant-query", "own-choose", "unknown"):
        assert ecgqa_scores([question("a", "a", kind)], ["a"], None)
    with pytest.raises(UserError, match="question type 'single-verfy' is unknown; it has to end with verify, choose or query"):
        ecgqa_scores([question("a", "a", "single-verfy")], ["a"], None)
