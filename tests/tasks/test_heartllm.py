"""Questions and reports from files: ECG-QA 1.0.2 in its official layout, and HeartLLM's own release."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.tasks.ecgqa import read_ecgqa
from toolkit.tasks.heartllm import read_heartllm

TYPES = [
    "single-verify", "single-choose", "single-query", "comparison_consecutive-verify", "comparison_consecutive-query", "comparison_irrelevant-verify",
    "comparison_irrelevant-query",
]  # fmt: skip
BACKGROUND = "Patient Information: - Patient ID: 770001; - Age: 81; Recording Details: - Recording Date: 1994-08-02 17:12:22."


def question(sample, kind, ecg_ids, **more):
    return {
        "template_id": 1 + sample, "question_id": 7, "sample_id": sample, "question_type": kind, "attribute_type": "scp_code",
        "question": f"Question {sample}?", "answer": ["yes"], "ecg_id": ecg_ids, "attribute": None if len(ecg_ids) > 1 else ["x"], **more,
    }  # fmt: skip


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def official(tmp_path):
    """ecgqa/ as it is downloaded: two datasets, two wordings, three splits, the tables and what a computer leaves beside them."""
    for dataset, first in (("ptbxl", 1), ("mimic-iv-ecg", 40_000_000)):
        for wording in ("template", "paraphrased"):
            for split in ("train", "valid", "test"):
                rows = [question(i, kind, [first + i] if kind.startswith("single") else [first + i, first + i + 1]) for i, kind in enumerate(TYPES)]
                write(tmp_path / dataset / wording / split / "00000.json", rows)
                write(tmp_path / dataset / wording / split / "10000.json", [question(10_000, "single-verify", [first], answer=["b", "a"])])
                write(tmp_path / dataset / f"{split}_ecgs.tsv", f"0\t{first}\n")
        write(tmp_path / dataset / "answers.csv", "index,class\n0,no\n")
        write(tmp_path / dataset / "answers_for_each_template.csv", "template_id,classes\n1,\"['no', 'yes']\"\n")
    return tmp_path


@pytest.mark.parametrize("wording", ["template", "paraphrased"])
@pytest.mark.parametrize(("dataset", "first"), [("ptbxl", 1), ("mimic-iv-ecg", 40_000_000)])
def test_the_official_layout_is_read_whole(official, dataset, first, wording):
    folder = official / dataset / wording
    write(folder / "info.json", {"version": "1.0.2"})  # an object: no rows
    write(folder / "train" / "._00000.json", "\x00\x05\x16\x07")  # a Mac's
    write(folder / "train" / "00000.jsonl", "{}")
    tasks = read_ecgqa(folder)
    assert len(tasks) == len({task["id"] for task in tasks}) == 3 * 8
    for split in ("train", "valid", "test"):
        part = [task for task in tasks if task["id"].startswith(f"{split}-")]
        assert [task["question_type"] for task in part] == [*TYPES, "single-verify"]
        assert [task["ecg_ids"] for task in part[:4]] == [(str(first),), (str(first + 1),), (str(first + 2),), (str(first + 3), str(first + 4))]
        assert part[7]["answer"] == ["a", "b"] and part[3]["attribute"] is None and part[0]["attribute"] == ["x"]
    with pytest.raises(UserError, match="the same questions in two wordings"):
        read_ecgqa(official / dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": "1.0.2"}, "--qa: no list of ECG-QA rows"),
        ([], "--qa: no list of ECG-QA rows"),
        ([question(0, TYPES[0], [1]), 3], "00000.json is no list of ECG-QA rows"),
        ([question(0, TYPES[0], [1]), {"question": "?"}], "00000.json: row 1 has no 'template_id'"),
        ([question(0, TYPES[0], [1]), question(1, TYPES[0], [])], "00000.json: row 1: .*ecg_id"),
        ([question(0, TYPES[0], [1]), question(1, TYPES[0], [1.0])], "00000.json: row 1: .*ecg_id"),
        ([question(0, TYPES[0], [1]), question(0, TYPES[0], [2])], "00000.json: row 1: train-0 appears twice"),
        ("[", "00000.json is no list of ECG-QA rows"),
    ],
)
def test_the_file_and_the_row_are_named(tmp_path, content, message):
    write(tmp_path / "train" / "00000.json", content)
    with pytest.raises(UserError, match=message):
        read_ecgqa(tmp_path)


def test_shared_ecgqa(ecg_data):
    folder = ecg_data / "ecgqa" / "ptbxl" / "template"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    tasks = read_ecgqa(folder)
    assert len(tasks) == 22_202 and sum(len(task["ecg_ids"]) == 2 for task in tasks) == 7539 + 4663


def test_heartllms_questions_are_those_of_ecgqa(tmp_path):
    rows = [question(0, "single-verify", [12662]), question(1, "single-query", [9])]
    paths = ["records500/12000/12662_hr", "records100/00000/00009_lr"]
    theirs = write(tmp_path / "ptbxl" / "template_train_background.json", [{**r, "ecg_path": p, "background": BACKGROUND} for r, p in zip(rows, paths)])
    write(tmp_path / "ecgqa" / "train" / "00000.json", rows)
    got, same = read_heartllm([theirs]), read_ecgqa(tmp_path / "ecgqa")
    assert [{**task, "id": ""} for task in got] == [{**task, "id": ""} for task in same]
    assert [task["id"] for task in got] == ["ptbxl-template_train_background-0", "ptbxl-template_train_background-1"]


def test_heartllms_reports_name_their_ecg_and_carry_no_patient(tmp_path):
    common = {"patient_id": 770001.0, "background": BACKGROUND}
    ptbxl = {**common, "ecg_id": 4, "report": "sinusrhythmus möglich", "filepath": "records500/00000/00004_hr"}
    mimic = {**common, "ecg_id": 48198293, "report": "Sinus rhythm.", "filepath": "p1888/p18884712/s48198293/48198293"}
    one, two = write(tmp_path / "ptbxl" / "train.json", [ptbxl]), write(tmp_path / "mimic" / "train.json", [mimic])
    tasks = read_heartllm([one, str(two)])
    assert tasks == [
        {"id": "report-4", "task": "report", "question_type": "report", "report": "sinusrhythmus möglich", "ecg_ids": ("4",)},
        {"id": "report-48198293", "task": "report", "question_type": "report", "report": "Sinus rhythm.", "ecg_ids": ("48198293",)},
    ]
    assert not any(word in json.dumps(tasks) for word in ("770001", "18884712", "1994"))


STATEMENTS = [
    "Sinus rhythm", "Sinus rhythm with PACs.", "Inferior infarct - age undetermined", "rSr'(V1) - probable normal variant", "- supraventricular extrasystoles",
    "*** CONSIDER ACUTE ST ELEVATION MI ***", "--- Suspect limb lead reversal - only V1-V6 analyzed ---", "Lead(s) unsuitable for analysis: I II aVR V1",
    "ST elevation of 1.5 mV in V1.V2, .5 mV in V3", "2:1 A-V block", "Summary:", "PVC(s)", "A.V. delay, e.g. drugs",
]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.sampled_from(STATEMENTS), min_size=1).filter(lambda said: not re.search(r"\d\.2:1", ".".join(said))))
def test_heartllms_mimic_reports_are_those_of_mimic(statements):
    with TemporaryDirectory() as folder:
        row = {"report": ".".join(statements) + ".", "filepath": "p1127/p11279168/s47182700/47182700"}  # as HeartLLM joins them
        [task] = read_heartllm([write(Path(folder) / "train.json", [row])])
    assert task["report"] == " ".join(s if s[-1] in ".:" else s + "." for s in statements)


def test_only_mimic_reports_are_parted(tmp_path):
    glued = "Sinus rhythm with PACs..Right bundle branch block.Inferior infarct - age undetermined."
    mimic = [{"report": glued, "filepath": f"{start}p1127/p11279168/s47182700/47182700"} for start in ("", "files/")]
    ptbxl = {"report": "av-block 1.grades..Edit:x", "filepath": "records500/00000/00004_hr"}
    parted = "Sinus rhythm with PACs. Right bundle branch block. Inferior infarct - age undetermined."
    files = [write(tmp_path / f"{i}.json", [row]) for i, row in enumerate([*mimic, ptbxl])]
    assert [read_heartllm([file])[0]["report"] for file in files] == [parted, parted, ptbxl["report"]]


REPORT = {"report": "x", "filepath": "records500/00000/00004_hr"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "train.json has no rows"),
        ({}, "train.json has no rows"),
        ("[", "train.json is no list"),
        ([REPORT, {"filepath": "x"}], "row 1 has neither question nor report"),
        ([REPORT, {**REPORT, "filepath": "records500/x"}], "row 1: ecg_path or filepath does not end in a record number"),
        ([REPORT, {"report": "x"}], "row 1: ecg_path or filepath does not end in a record number"),
        ([REPORT, REPORT], "row 1: report-4 appears twice"),
        ([{**question(0, TYPES[0], [4]), "ecg_path": "00004_hr", "answer": "yes"}], "row 0: answer and ecg_id must be lists"),
    ],
)
def test_damaged_heartllm_files_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_heartllm([write(tmp_path / "train.json", content)])
