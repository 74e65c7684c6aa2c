"""What evaluate.py makes of predictions: metrics.json, the printed lines, the report's table. No model is run."""

import json
import re

import numpy as np
import pytest

from launchers.evaluate import judge, patients_of, summary
from toolkit.evaluation.html_report import write_report
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split

SAMPLES = [["anna"], ["anna"], ["berta"], ["clara", "anna"], ["dora"], ["emma"]]  # patients of each sample's ECGs


def rows():
    """Two questions and a report a sample: the model is right on all of `single-verify` and on the last three of `single-query`."""
    made = []
    for i in range(len(SAMPLES)):
        kind = {"sample": i, "task": "ecgqa"}
        made.append({**kind, "id": f"v{i}", "question_type": "single-verify", "reference": "yes", "prediction": "yes", "blind": ["yes", "no"][i % 2]})
        made.append({**kind, "id": f"q{i}", "question_type": "single-query", "reference": "avb", "prediction": ["", "avb"][i > 2], "blind": "avb"})
        made.append({"sample": i, "task": "report", "id": f"r{i}", "question_type": "report", "reference": "a b", "prediction": "a", "blind": "a b"})
    return made


@pytest.fixture
def shards(tmp_path):
    samples = [(f"x_{i}", np.zeros((len(p), 313), np.uint16), {"patients": p, "tasks": []}) for i, p in enumerate(SAMPLES)]
    write_index(tmp_path, {"test": write_split(tmp_path, "test", samples, 4)}, kind="tasks")
    return Shards.open(tmp_path, "test")


def test_metrics_say_how_sure_the_difference_is_and_name_no_patient(shards):
    patients = patients_of(rows(), shards)
    assert patients == [p[0] for p in SAMPLES for _ in range(3)]
    scores = judge(rows(), patients)
    over = scores["over_blind"]
    assert set(over) == {"overall", "single-verify", "single-choose", "single-query"}
    assert over["overall"] | {"low": 0, "high": 0} == {"difference": 0, "low": 0, "high": 0, "n": 12, "patients": 5}
    assert over["single-verify"]["difference"] == pytest.approx(0.5) == scores["exact_match"]["single-verify"] - scores["blind"]["exact_match"]["single-verify"]
    assert over["single-query"]["difference"] == -0.5 and over["single-choose"] == {"difference": None, "low": None, "high": None, "n": 0, "patients": 0}
    assert all(o["low"] < o["difference"] < o["high"] for o in over.values() if o["n"])
    text = json.dumps(scores, allow_nan=False)
    assert "over_blind" in scores["conventions"] and not any(name in text for sample in SAMPLES for name in sample)


def test_a_line_a_kind_of_question_with_its_interval_and_one_of_reports(shards):
    lines = summary(judge(rows(), patients_of(rows(), shards)))
    assert [re.sub(r"\([-+][\d.]+ to [-+][\d.]+\)", "(interval)", line).split(":") for line in lines] == [
        ["                     overall", " exact match  75.0 %   blind  75.0 %   difference +0.0 (interval)"],
        ["               single-verify", " exact match 100.0 %   blind  50.0 %   difference +50.0 (interval)"],
        ["                single-query", " exact match  50.0 %   blind 100.0 %   difference -50.0 (interval)"],
        # half as long: exp(1 - 2) of BLEU-1, and no four words; a recall of 1/2
        ["                     reports", " BLEU-1  36.8 (blind 100.0)   BLEU-4   0.0 (blind 0.0)   ROUGE-L  66.7 (blind 100.0)"],
    ]
    assert summary(judge(rows()[:1], ["anna"]))[0].endswith("difference +0.0")  # one patient: no interval
    assert len(summary(judge(rows()[2:3], ["anna"]))) == 1


def test_the_report_shows_the_interval_below_the_difference(shards, tmp_path):
    scores = judge(rows(), patients_of(rows(), shards))
    write_report(tmp_path / "report.html", scores, [], {})
    page = (tmp_path / "report.html").read_text()
    low, high = (f"{round(100 * scores['over_blind']['single-query'][name], 1):+.1f}".replace("-", "−") for name in ("low", "high"))
    assert f'<td class="worse">−50.0<br><span class="soft">{low} to {high}</span></td>' in page
    assert "95&nbsp;% interval" in page and "draws of patients" in page
    write_report(tmp_path / "report.html", judge(rows()[:1], ["anna"]), [], {})
    assert "<td>+0.0</td>" in (tmp_path / "report.html").read_text() and "95&nbsp;% interval" not in (tmp_path / "report.html").read_text()
