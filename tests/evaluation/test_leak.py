"""Patients of the split that is judged in what the model was trained on, or in what it says of that."""

import json
import shutil

import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.evaluation.leak import check_leak, remembered, short
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.training.shards import trained_on


def shards(folder, kind, splits):
    """Shards of one-ECG samples of these patients."""
    folder.mkdir()
    one = {"tokens": lambda patient: {"patient": patient}, "tasks": lambda patient: {"patients": [patient], "tasks": []}}[kind]
    entries = {}
    for split, patients in splits.items():
        samples = [(f"{split}{i}", np.zeros((1, 313), np.uint16), one(patient)) for i, patient in enumerate(patients)]
        entries[split] = write_split(folder, split, samples, 10)
    write_index(folder, entries, kind=kind, tokenizer="t", tokens_per_ecg=313, codes=1296, levels=[6, 6, 6, 6])
    return folder


@pytest.fixture
def folders(tmp_path):
    """(judged test split, training tasks, training tokens with one of its patients)."""
    tasks = shards(tmp_path / "tasks", "tasks", {"train": ["a", "b"], "test": ["c", "d", "d"]})
    tokens = shards(tmp_path / "tokens", "tokens", {"train": ["x", "d"]})
    return Shards.open(tasks, "test"), tasks, tokens


def entry(folder):
    return trained_on(None, [Shards.open(folder, "train")], [str(folder)])


def test_a_leak_is_refused_wherever_it_is_known_from(folders):
    judged, tasks, tokens = folders
    assert check_leak(judged, [], entry(tasks), False) == ([str(tasks)], [])
    for named, known in (([str(tokens)], entry(tasks)), ([str(tasks)], entry(tokens)), ([], entry(tasks) + entry(tokens))):
        with pytest.raises(UserError, match="--train_shards: 1 of the 2 patients of split test are in the training shards, with 2 of 3 samples, such as test1"):
            check_leak(judged, named, known, False)
        looked, (note,) = check_leak(judged, named, known, True)
        assert set(looked) == {str(tasks), str(tokens)} and note.startswith("Leak: 1 of the 2 patients") and "test1" not in note


def test_what_cannot_be_looked_at_is_said(folders, tmp_path):
    judged, tasks, tokens = folders
    known = entry(tasks)
    for stamp in ({}, {"tokenizer": "t", "knows_text": True}):  # a backbone of before stamps said it
        looked, (note,) = check_leak(judged, [], trained_on(stamp, [Shards.open(tasks, "train")], [str(tasks)]), False)
        assert looked == [str(tasks)] and "does not say what it was trained on" in note
    assert trained_on({"made_of": {}}, [Shards.open(tasks, "train")], [str(tasks)]) == known  # made for a run, trained on nothing
    assert trained_on({"trained_on": known}, [Shards.open(tasks, "train")], [str(tasks)]) == known
    assert "does not say" in check_leak(judged, [], [], False)[1][0] and check_leak(judged, [str(tasks)], [], False)[1] == []
    shutil.move(tasks, tmp_path / "moved")
    assert "is not at hand" in check_leak(judged, [], known, False)[1][0]
    assert check_leak(judged, [str(tmp_path / "moved")], known, False) == ([str(tmp_path / "moved")], [])  # the same by its digest
    shutil.copytree(tokens, tasks)
    looked, (note,) = check_leak(judged, [], known, False)
    assert looked == [] and "has changed since" in note
    with pytest.raises(UserError, match="--train_shards: .*nowhere has no index.json"):
        check_leak(judged, [str(tmp_path / "nowhere")], [], False)


def test_stamps_and_names(tmp_path):
    assert remembered(tmp_path) == {}
    (tmp_path / "heartspeed.json").write_text(json.dumps({"trained_on": []}))
    assert remembered(tmp_path) == {"trained_on": []}
    for damaged in ("{", "[]"):
        (tmp_path / "heartspeed.json").write_text(damaged)
        with pytest.raises(UserError, match="--model: .*heartspeed.json is damaged; make the model again"):
            remembered(tmp_path)
    assert short("/home/anna/hospital/runs/tasks") == "runs/tasks" and short("runs/tasks") == "runs/tasks" and short("s3://bucket/tasks") == "s3://bucket/tasks"
