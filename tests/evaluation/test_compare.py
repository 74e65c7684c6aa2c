"""Two systems on the same tasks, against the statistics called by hand, and refusals where the tasks are not the same."""

import json
import random

import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.evaluation.compare import compare, main
from toolkit.evaluation.scores import mean_score
from toolkit.evaluation.statistics import difference, holm, permutation
from toolkit.evaluation.table import find

REPORTS = ("sinus rhythm. normal ecg.", "atrial fibrillation. lvh.", "sinus bradycardia. no lvh.")


def system(seed, share, n=90, **more):
    """Rows of a system that is right with so much probability; the tasks are the same for every seed."""
    tasks, rng, rows = random.Random(0), random.Random(seed), []
    for i in range(n):
        if i % 3:
            reference, wrong, kind = tasks.choice(["yes", "no"]), "z", "single-verify"
        else:
            reference, wrong, kind = tasks.choice(REPORTS), tasks.choice(REPORTS), "report"
        said = reference if rng.random() < share else wrong
        rows.append({"id": f"t{i}", "question_type": kind, "reference": reference, "prediction": said, "patient": i // 4, **more})
    return rows


def written(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pair(tmp_path):
    """A folder, as of launchers/evaluate.py, and a file in another order."""
    ours, theirs = system(1, 0.8), random.Random(5).sample(system(2, 0.5), 90)
    written(tmp_path / "a" / "predictions.jsonl", ours)
    return str(tmp_path / "a"), written(tmp_path / "b.jsonl", theirs)


def test_every_number_is_that_of_the_statistics_by_hand(pair):
    found = compare(*pair, draws=100, swaps=500)
    assert (found["systems"], found["matched"], found["alone"], found["notes"]) == (list(pair), 90, [0, 0], [])
    ours, theirs = ([row for row in system(*how) if row["question_type"] != "report"] for how in ((1, 0.8), (2, 0.5)))
    right = [[row["prediction"] == row["reference"] for row in rows] for rows in (ours, theirs)]
    a, b = (mean_score("", "", np.arange(60), each) for each in right)
    patients = np.array([row["patient"] for row in ours])
    line = find(found, "exact_match")
    value, low, high = difference(a, b, patients, 100)
    assert line["values"] == pytest.approx({"first": np.mean(right[0]), "second": np.mean(right[1])}, abs=1e-8)
    assert (line["n"], line["patients"], line["p"]) == (60, len(set(patients)), permutation(a, b, patients, 500))
    assert [line[name] for name in ("difference", "low", "high")] == pytest.approx([value, low, high], abs=1e-8)


def test_holm_is_over_the_headline_scores_and_no_other(pair):
    found = compare(*pair, draws=50, swaps=500)
    heads = [line for line in found["table"] if line["p_holm"] is not None]
    assert [(line["score"], line["level"]) for line in heads] == [(name, "all") for name in ("exact_match", "bleu_4_corpus", "rouge_l", "f1")]
    assert [line["p_holm"] for line in heads] == holm([line["p"] for line in heads])
    assert all(line["p"] is None or 0 < line["p"] <= 1 for line in found["table"])
    json.dumps(found, allow_nan=False)


def test_the_other_way_round_is_the_other_sign(pair):
    there, back = compare(*pair, draws=50, swaps=50), compare(*reversed(pair), draws=50, swaps=50)
    for one, other in zip(there["table"], back["table"]):
        assert one["p"] == other["p"] and one["values"]["first"] == other["values"]["second"]
        if one["difference"] is not None:
            assert one["difference"] == -other["difference"] and (one["low"] is None or one["low"] == pytest.approx(-other["high"], abs=1e-8))


def test_a_system_is_as_good_as_itself(pair):
    for line in compare(pair[0], pair[0], draws=20, swaps=20)["table"]:
        assert line["difference"] in (0, None) and line["low"] in (0, None) and line["p"] in (1, None)


def test_tasks_of_one_alone_are_counted_and_named(tmp_path):
    ours, theirs = system(1, 0.8), system(2, 0.5)
    theirs[4]["prediction"] = ""
    found = compare(written(tmp_path / "a.jsonl", ours), written(tmp_path / "b.jsonl", [*theirs[:80], {**theirs[0], "id": "new"}]), draws=20, swaps=20)
    assert (found["matched"], found["alone"]) == (80, [10, 1])
    assert "10 tasks are in" in found["notes"][0] and "t80, t81, t82, ..." in found["notes"][0]
    assert found["notes"][1].endswith("alone and left out: new.") and "1 of 80 predictions of" in found["notes"][2]


def test_files_without_ids_are_matched_by_number_and_patients_may_be_in_one_alone(tmp_path):
    bare = [[{name: row[name] for name in ("prediction", "reference", "question_type")} for row in system(*how)] for how in ((1, 0.8), (2, 0.5))]
    paths = [written(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(bare)]
    found = compare(*paths, draws=20, swaps=20)
    assert found["matched"] == 90 and find(found, "exact_match")["patients"] is None and "intervals are over rows" in found["notes"][0]
    known = written(tmp_path / "2.jsonl", [{**row, "patient": i // 4} for i, row in enumerate(bare[1])])
    assert find(compare(paths[0], known, draws=20, swaps=20), "exact_match")["patients"] == 23


@pytest.mark.parametrize(
    "change, says",
    [
        ({"reference": "other"}, "the references of task 't1' differ, '(yes|no)' in .*'other' in"),
        ({"question": "is it?"}, "task 't1' is not the same in both: its question is 'what' in .*'is it.' in"),
        ({"task": "report", "question_type": "report"}, "task 't1' is not the same in both: its task is 'ecgqa'"),
    ],
)
def test_what_is_not_the_same_task_is_refused(tmp_path, change, says):
    ours, theirs = system(1, 0.8, question="what"), system(2, 0.5, question="what")
    theirs[1] |= change
    with pytest.raises(UserError, match=says):
        compare(written(tmp_path / "a.jsonl", ours), written(tmp_path / "b.jsonl", theirs))


def test_a_reference_may_be_written_otherwise(tmp_path):
    rows = (
        [{"id": "1", "template_id": 2, "reference": ["b", "A"], "prediction": "a; b"}],
        [{"id": "1", "template_id": 2, "reference": "a; b", "prediction": "a"}],
    )
    paths = [written(tmp_path / f"{i}.jsonl", some) for i, some in enumerate(rows)]
    assert find(compare(*paths), "exact_match")["values"] == {"first": 1, "second": 0}


def test_nothing_in_common_and_what_is_no_result(tmp_path):
    a, b = written(tmp_path / "a.jsonl", system(1, 0.8)), written(tmp_path / "b.jsonl", [{**row, "id": "x" + row["id"]} for row in system(1, 0.8)])
    with pytest.raises(UserError, match="'t0', .*'xt0', .* have no id in common"):
        compare(a, b)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="predictions.jsonl cannot be read: No such file"):
        compare(a, str(tmp_path / "empty"))


def test_the_terminals_table(pair, capsys):
    main(list(pair))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[3:])) <= 120 and "first - second" in text and "the number of headline scores, 4" in text
    main([*pair, "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert f"{100 * find(found, 'exact_match')['difference']:+.1f} (" in text
    with pytest.raises(SystemExit):
        main(["--help"])
