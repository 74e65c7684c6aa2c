"""`python -m toolkit.evaluation.score` on files of ours and of others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.evaluation.heartllm import heartllm_compat
from toolkit.evaluation.predictions import read_predictions
from toolkit.evaluation.score import main
from toolkit.evaluation.table import find

QUESTIONS = [
    {"prediction": said, "reference": right, "question_type": kind, "template_id": template}
    for said, right, kind, template in [
        ("yes", ["yes"], "single-verify", 1),
        ("No ", ["no"], "single-verify", 1),
        ("maybe", ["no"], "single-verify", 1),
        ("b; a", ["a", "b"], "single-query", 2),
        ("a", ["a", "b"], "single-query", 2),
        (None, ["a"], "single-query", 2),
    ]
]
REPORTS = [
    {"prediction": "sinus rhythm. normal ecg.", "reference": "sinus rhythm. normal ecg."},
    {"prediction": "", "reference": "atrial fibrillation. lvh."},
]


def written(folder, rows):
    path = folder / "P.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scored(capsys, *args):
    main([*args, "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is no JSON


@pytest.mark.parametrize("rows", [QUESTIONS, REPORTS, QUESTIONS + REPORTS])
def test_questions_reports_and_both(rows, tmp_path, capsys):
    path = written(tmp_path, rows)
    found = scored(capsys, "--predictions", path)
    main(["--predictions", path])
    text = capsys.readouterr().out
    assert "1 of" in text or "2 of" in text  # the empty predictions
    for some, score, value in ((QUESTIONS, "exact_match", 3 / 6), (REPORTS, "rouge_l", 1 / 2)):
        line = find(found, score)
        if some[0] in rows:
            assert line["values"] == {"model": pytest.approx(value, abs=1e-8)} and line["n"] == len(some) and line["label"] in text
        else:
            assert line is None


def test_by_hand(tmp_path, capsys):
    classes = tmp_path / "classes.csv"
    classes.write_text("template_id,classes\n1,\"['yes', 'no']\"\n2,\"['a', 'b']\"\n")
    found = scored(capsys, "--predictions", written(tmp_path, QUESTIONS + REPORTS), "--classes", str(classes))
    values = {(line["score"], line["level"], line["of"]): line["values"]["model"] for line in found["table"]}
    for name, value in {
        ("exact_match", "question_type", "single-verify"): 2 / 3,
        ("exact_match", "macro", "question_type"): (2 / 3 + 1 / 3) / 2,
        ("exact_match", "multi_answer", "2+ answers"): 1 / 2,
        ("answer_f1", "all", "all"): (1 + 2 / 3 + 0) / 3,
        ("answer_f1", "multi_answer", "2+ answers"): (1 + 2 / 3) / 2,
        ("invalid", "all", "all"): 2 / 6,
        ("precision", "all", "all"): 1.0,
        ("recall", "all", "all"): 2 / 4,
        ("f1", "finding", "atrial_fibrillation"): 0.0,
    }.items():
        assert values[name] == pytest.approx(value, abs=1e-8), name


def test_the_authors_arithmetic(tmp_path, capsys):
    path = written(tmp_path, QUESTIONS + REPORTS)
    expected = heartllm_compat(read_predictions(path))
    assert scored(capsys, "--predictions", path, "--compat", "heartllm") == json.loads(json.dumps(expected))
    main(["--predictions", path, "--compat", "heartllm"])
    text = capsys.readouterr().out
    assert "single-verify" in text and "bleu_4" in text and f"exact match {100 * expected['questions']['single-verify']['exact_match']:.1f}" in text
    for rows, missing in ((QUESTIONS, "bleu"), (REPORTS, "single")):
        main(["--predictions", written(tmp_path, rows), "--compat", "heartllm"])
        assert missing not in capsys.readouterr().out


def test_a_file_of_the_authors_is_read_as_it_is(tmp_path, capsys):
    theirs = [
        {"prediction": ["a", "b"], "answer": ["b", "a"], "question_type": "single-query"},
        {"prediction": ["yes", ""], "answer": ["yes"], "question_type": "single-verify"},  # of "yes."
    ]
    path = written(tmp_path, theirs)
    assert find(scored(capsys, "--predictions", path), "exact_match")["values"] == {"model": 1}
    found = scored(capsys, "--predictions", path, "--compat", "heartllm")["questions"]
    assert {kind: judged["exact_match"] for kind, judged in found.items()} == {"single-query": 1, "single-verify": 0}


def test_wrong_files_are_one_line_and_exit_2(tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, "-m", "toolkit.evaluation.score", *args], capture_output=True, text=True, cwd=Path(__file__).parents[2])

    bad = run("--predictions", written(tmp_path, [*QUESTIONS, {"prediction": "a"}]))
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1) and "line 7: the column 'reference' is missing" in bad.stderr
    told = run("--help")
    assert told.returncode == 0 and "Research software" in told.stdout and 'joined by "; "' in told.stdout
    with pytest.raises(UserError, match="--classes"):
        main(["--predictions", written(tmp_path, QUESTIONS), "--classes", str(tmp_path / "none.csv")])
