"""Prompts: only answers are targets, answers are canonical, patients never appear."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.shards.order import sample_at
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.answers import join_answers, split_answers
from toolkit.tasks.data import ForecastData
from toolkit.tasks.ecgqa import read_ecgqa
from toolkit.tasks.join import ECGs, join, report_tasks, samples

VERIFY = {"task": "ecgqa", "question": "Does this ECG show symptoms of atrial fibrillation?", "answer": ["yes"]}
QUERY = {"task": "ecgqa", "question": "What symptoms does this ECG show?", "answer": ["sinus rhythm", "normal ecg"]}
REPORT = {"task": "report", "report": "sinus rhythm. normal ecg."}
CODES = np.arange(313, dtype=np.uint16)[None]


@given(st.permutations(["c, d", "a", "b"]))
def test_answers_are_sets_in_one_order(answers):
    assert join_answers(answers) == "a; b; c, d"
    assert split_answers(join_answers(answers)) == {"a", "b", "c, d"}


@pytest.mark.parametrize(("text", "answers"), [("", set()), (" Yes ;no;", {"yes", "no"}), ("; ;", set()), ("a;a", {"a"})])
def test_split_answers(text, answers):
    assert split_answers(text) == answers


@pytest.fixture
def shards(tmp_path):
    tasks = [{**VERIFY, "id": str(k), "question": f"Question {k}?"} for k in range(5)]
    samples = [(f"k{i}", CODES, {"tasks": tasks[: i + 1], "patients": ["secret"], "gains": [[0.1 * (i + 1)] * 12]}) for i in range(5)]
    write_index(tmp_path, {"train": write_split(tmp_path, "train", samples, 3)}, kind="tasks")
    return Shards.open(tmp_path, "train")


def test_counts_of_a_micro_batch(tiny, shards):
    _, tokenizer, vocabulary = tiny
    batch = ForecastData(shards, tokenizer, vocabulary).batch([(0, 0), (0, 1)])
    assert (batch.ecgs, batch.targets, batch.tokens) == (2, 2 * 313, 2 * 315)  # without an end token


def test_pretraining_predicts_the_same_tokens_with_gains_before_them(tiny_with_gains, shards):
    _, tokenizer, vocabulary = tiny_with_gains
    one, two = (ForecastData(shards, tokenizer, v).batch([(0, 3)]) for v in (vocabulary, replace(vocabulary, gain_first=None)))
    assert (one.tokens, two.tokens) == (327, 315)
    np.testing.assert_array_equal(one.inputs.targets, two.inputs.targets)
    np.testing.assert_array_equal(one.inputs.targets - vocabulary.first, CODES[0])


def token_shards(folder, reports, n_tokens=313):
    rng = np.random.default_rng(0)
    samples = [(f"k{i}", rng.integers(0, 1296, (1, n_tokens), np.uint16), {"report": r, "gains": [[0.1] * 12]}) for i, r in enumerate(reports)]
    write_index(folder, {"train": write_split(folder, "train", samples, 9)}, kind="tokens")
    return Shards.open(folder, "train")


def test_rows_of_seq_len_hold_whole_ecgs_and_are_full(tiny, tiny_with_gains, tmp_path):
    _, tokenizer, vocabulary = tiny
    shards = token_shards(tmp_path, [""] * 20)
    data = ForecastData(shards, tokenizer, vocabulary, seq_len=4096)
    assert data.samples_per_row == 13 and ForecastData(shards, tokenizer, vocabulary).samples_per_row == 1
    rows = [data.batch([sample_at(0, len(data), 13 * row + k) for k in range(13)]) for row in range(64)]
    assert all(len(row.inputs.layout) == row.ecgs == 13 and row.targets == 13 * 313 for row in rows)
    assert sum(row.tokens for row in rows) / (64 * 4096) > 0.98
    assert ForecastData(shards, tokenizer, tiny_with_gains[2], seq_len=4096).samples_per_row == 12
    for objective, least in (("causal", 315), ("windows", 615)):
        assert ForecastData(shards, tokenizer, vocabulary, objective=objective, seq_len=least).samples_per_row == 1
        with pytest.raises(UserError, match=f"--seq_len {least - 1} is too short .* use at least {least}"):
            ForecastData(shards, tokenizer, vocabulary, objective=objective, seq_len=least - 1)


def test_rows_with_reports_never_exceed_seq_len(tiny, tmp_path, monkeypatch):
    """Room for every report where the longest was measured, a cut one where it was not."""
    _, tokenizer, vocabulary = tiny
    shards = token_shards(tmp_path, ["normal ecg.", "sinus rhythm. normal ecg. " * 9, "", "sinus rhythm."])
    words = [f"\nWrite the report of this ECG.\nReport: {shards.meta(i)['report']}" for i in range(4)]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in words]
    whole = ForecastData(shards, tokenizer, vocabulary, reports=True, seq_len=2 * (316 + lengths[1]))
    assert (whole.samples_per_row, whole.report_room, whole.cut_reports) == (2, lengths[1], 0)
    assert [whole.batch([(0, i)]).tokens for i in range(4)] == [316 + lengths[0], 316 + lengths[1], 315, 316 + lengths[3]]
    with pytest.raises(UserError, match=f"use at least {316 + lengths[1]}"):
        ForecastData(shards, tokenizer, vocabulary, reports=True, seq_len=315 + lengths[1])

    monkeypatch.setattr("toolkit.tasks.data.MEASURED", 2)  # samples 0 and 2
    short = ForecastData(shards, tokenizer, vocabulary, reports=True, seq_len=2 * (316 + lengths[0]))
    cut, full = short.batch([(0, 1)]).inputs, whole.batch([(0, 1)]).inputs
    assert (short.report_room, short.samples_per_row, short.cut_reports) == (lengths[0], 2, 1)
    np.testing.assert_array_equal(cut.input_ids, full.input_ids[: 316 + lengths[0]])
    np.testing.assert_array_equal(cut.targets, full.targets[: len(cut.targets)])
    assert cut.targets[-1] != tokenizer.eos_token_id
    assert all(short.batch([(0, i), (0, 1)]).tokens <= 2 * (316 + lengths[0]) for i in range(4))


def rows(**changes):
    kind = {"template_id": 1, "question_type": "single-verify", "attribute_type": "scp_code"}
    return [{**kind, "sample_id": 7, "question": "?", "answer": ["b", "a"], "ecg_id": [12], **changes}]


def test_ecgqa_rows_become_tasks(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "00000.json").write_text(json.dumps(rows() + rows(sample_id=8, ecg_id=[3, 4], attribute=None, answer=[" ", ""])))
    first, second = read_ecgqa(tmp_path)
    assert (first["id"], first["answer"], first["ecg_ids"]) == ("train-7", ["a", "b"], ("12",))
    assert second["ecg_ids"] == ("3", "4") and second["attribute"] is None and second["answer"] == []  # so it will be left out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no .json files"),
        ("{", "no list of ECG-QA rows"),
        ('{"a": 1}', "no list|no 'template_id'"),
        (json.dumps([{"question": "?"}]), "no 'template_id'"),
        (json.dumps(rows() + rows()), "appears twice"),
        (json.dumps(rows(answer="yes")), "answer and ecg_id must be lists"),
    ],
)
def test_damaged_question_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "00000.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_ecgqa(tmp_path)


def test_two_wordings_of_the_same_questions_are_refused(tmp_path):
    for wording in ("template", "paraphrased"):
        (tmp_path / wording / "train").mkdir(parents=True)
        (tmp_path / wording / "train" / "00000.json").write_text(json.dumps(rows()))
    with pytest.raises(UserError, match="the same questions in two wordings"):
        read_ecgqa(tmp_path)
    assert len(read_ecgqa(tmp_path / "template")) == 1


@pytest.fixture
def ecgs(tmp_path):
    def sample(i, split, report=""):
        return f"x_{i}", np.full((1, 313), i, np.uint16), {
            "record_id": str(i), "source": "x", "split": split, "patient": f"p{i}", "report": report, "gains": [[i / 8] * 12],
        }  # fmt: skip

    splits = {"train": [sample(1, "train", "sinus rhythm."), sample(2, "train")], "test": [sample(3, "test")]}
    write_index(tmp_path, {split: write_split(tmp_path, split, rows, 9) for split, rows in splits.items()}, kind="tokens")
    return ECGs({split: Shards.open(tmp_path, split) for split in splits})


def question(id, *ecg_ids, answer=("yes",)):
    return {"id": id, "task": "ecgqa", "question_type": "single-verify", "question": "?", "answer": list(answer), "ecg_ids": ecg_ids}


def test_every_task_is_joined_or_counted(ecgs):
    joined, counts = join([question("a", "1"), question("b", "2", "1"), question("c", "1", "3"), question("d", "9"), question("e", "3", answer=())], ecgs)
    assert {key: [task["id"] for task in tasks] for key, tasks in joined.items()} == {("train", ("1",)): ["a"], ("train", ("2", "1")): ["b"]}
    assert sum(counts.values()) == 5 and counts["joined"] == 2
    assert counts["left out, its two ECGs are in different splits"] == counts["left out, ECG not in the shards"] == counts["left out, no answer"] == 1


def test_a_comparison_carries_both_ecgs_in_the_order_of_the_question(ecgs):
    joined, _ = join([question("b", "2", "1"), *report_tasks(ecgs)], ecgs)
    (first, one, meta), (second, two, both) = samples("train", joined, ecgs)
    assert (first, second) == ("x_1", "x_2_1")
    assert one[:, 0].tolist() == [1] and two[:, 0].tolist() == [2, 1]
    assert meta["gains"] == [[0.125] * 12] and both["gains"] == [[0.25] * 12, [0.125] * 12]
    assert meta["tasks"][0]["report"] == "sinus rhythm." and both["patients"] == ["p2", "p1"]
