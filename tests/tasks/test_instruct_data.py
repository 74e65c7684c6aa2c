"""Samples of instruction tuning: shares are exact, the place in the data is arithmetic, nothing is lost in silence."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.lm.model import PackedLM
from toolkit.shards.order import BLOCK, block_counts, mixed_at, sample_at
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.instruct import TaskData
from toolkit.tasks.mixture import EVERYTHING, WINDOW, Share, parse_mixture, read_text
from toolkit.tasks.prompts import Prompts

CODES = np.arange(313, dtype=np.uint16)[None]


def question(k, kind="single-verify"):
    return {"id": f"q{k}", "task": "ecgqa", "question_type": kind, "question": f"Question {k}?", "answer": ["yes"]}


REPORT = {"id": "r", "task": "report", "question_type": "report", "report": "sinus rhythm. normal ecg."}


def written(folder, tasks_of, patients="secret"):
    samples = [(f"k{i}", CODES, {"tasks": tasks, "patients": [patients], "gains": [[0.1] * 12]}) for i, tasks in enumerate(tasks_of)]
    kinds = Counter(task["question_type"] for tasks in tasks_of for task in tasks)
    folder.mkdir(exist_ok=True)
    write_index(folder, {"train": {**write_split(folder, "train", samples, 3), "tasks": dict(kinds)}}, kind="tasks")
    return Shards.open(folder, "train")


@pytest.fixture
def shards(tmp_path):
    """k0 one question ... k4 five questions, of which the last is a query, and k1, k3 a report."""
    return written(
        tmp_path / "one",
        [[question(k, "single-query" if k == 4 else "single-verify") for k in range(i + 1)] + [REPORT] * (i % 2) for i in range(5)],
    )


def make(tiny, shards, words="all", **more):
    return TaskData(shards, tiny[1], tiny[2], Prompts(), mixture=parse_mixture(words), **more)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 5)), min_size=2, max_size=4), st.integers(0, 5), st.integers(0, 3 * BLOCK), st.integers(0, 2**31)
)
def test_every_stream_has_its_share_and_each_of_its_samples_once_an_epoch(streams, blocks, start, seed):
    sizes, counts = [size for size, _ in streams], block_counts([weight for _, weight in streams])
    assert sum(counts) == BLOCK
    for count, (_, weight) in zip(counts, streams):
        assert abs(count - BLOCK * weight / sum(weight for _, weight in streams)) < 1
    drawn = [mixed_at(seed, sizes, counts, position) for position in range(2 * BLOCK)]
    for block in (drawn[:BLOCK], drawn[BLOCK:]):
        assert Counter(stream for stream, *_ in block) == dict(enumerate(counts))
    for stream, size in enumerate(sizes):
        own = [(epoch, index) for s, epoch, index in drawn if s == stream]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == [(epoch, index) for index in range(size)]
    alone = mixed_at(seed, sizes, counts, start)  # a place needs nothing that came before it
    assert start >= len(drawn) or alone == drawn[start]


def test_two_streams_of_one_size_have_orders_of_their_own():
    drawn = [mixed_at(3, [70, 70], (500, 500), p) for p in range(BLOCK)]
    first, second = ([index for stream, epoch, index in drawn if stream == s and epoch == 0] for s in (0, 1))
    assert first != second and drawn != [mixed_at(4, [70, 70], (500, 500), p) for p in range(BLOCK)]


def test_too_small_a_share_is_an_error(tiny, shards):
    with pytest.raises(UserError, match="--tasks: a share is less than one in 1000"):
        make(tiny, [shards], "ecgqa:1,report:0.0001")


def test_the_same_tasks_for_the_same_place(tiny, shards):
    one, two = (make(tiny, [shards], tasks_per_ecg=3) for _ in range(2))
    for position in (0, 3, 7, 12):
        sample = [one.at(0, position)]
        assert sample == [two.at(0, position)] == [sample_at(0, 5, position)]
        assert (one.batch(sample).inputs.input_ids == two.batch(sample).inputs.input_ids).all()
    text = [tiny[1].decode(one.batch([(epoch, 4)]).inputs.input_ids[316:]) for epoch in range(4)]
    assert len(set(text)) > 1 and all(t.count("Question:") == 3 for t in text)  # three of five, another choice each epoch
    assert not any("secret" in t for t in text)
    assert tiny[1].decode(make(tiny, [shards]).batch([(0, 4)]).inputs.input_ids).count("Question:") == 5


def said(tiny, data, samples):
    return tiny[1].decode(data.batch(samples).inputs.input_ids)


def test_shares_hold_their_own_tasks_alone(tiny, shards):
    data = make(tiny, [shards], "ecgqa:0.7,report:0.3")
    assert len(data) == 5 + 2
    kinds = Counter("Report:" in said(tiny, data, [data.at(0, p)]) for p in range(100))
    texts = [said(tiny, data, [(0, i)]) for i in range(7)]
    assert [text.count("Question:") for text in texts] == [1, 2, 3, 4, 5, 0, 0] and [text.count("Report:") for text in texts] == [0] * 5 + [1, 1]
    assert [data.key(i) for i in range(7)] == ["k0", "k1", "k2", "k3", "k4", "k1", "k3"]
    assert 15 <= kinds[True] <= 45  # of 100 places of the first thousand
    query = make(tiny, [shards], "single-query")
    assert len(query) == 1 and said(tiny, query, [(0, 0)]).count("Question:") == 1 and "Question 4?" in said(tiny, query, [(0, 0)])
    assert [len(tasks) for *_, tasks in map(data.sample, range(7))] == [1, 2, 3, 4, 5, 1, 1]


def test_without_weights_each_share_is_as_often_as_it_has_samples(tiny, shards):
    data = make(tiny, [shards], "ecgqa,report")
    assert [data.at(0, p) for p in range(20)] == [sample_at(0, 7, p) for p in range(20)]
    assert len(make(tiny, [shards], "ecgqa,single-query")) == 6 and make(tiny, [shards], "ecgqa,single-query").firsts == [0, 5]
    assert [make(tiny, [shards]).at(0, p) for p in range(20)] == [sample_at(0, 5, p) for p in range(20)]


def test_several_folders_are_one_set(tiny, shards, tmp_path):
    other = written(tmp_path / "two", [[question(9)], [question(10), REPORT]])
    data = make(tiny, [shards, other])
    assert len(data) == 7 and [data.key(i) for i in range(7)] == ["k0", "k1", "k2", "k3", "k4", "k0", "k1"]
    assert "Question 9?" in said(tiny, data, [(0, 5)]) and "Question 10?" in said(tiny, data, [(0, 6)])
    assert sorted(data.at(0, p)[1] for p in range(7)) == list(range(7))
    reports = make(tiny, [shards, other], "report")
    assert [reports.key(i) for i in range(len(reports))] == ["k1", "k3", "k1"]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_text_is_replayed_whole_and_every_token_but_the_first_a_target(tiny, shards, tmp_path, name):
    import json

    documents = [f"Document {k} tells\nof the heart, number {k * k}." for k in range(100)]
    path = tmp_path / name
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents) if name.endswith("l") else "\n\n".join(documents))
    text = read_text(path, tiny[1])
    expected = "<|end_of_text|>".join([*documents, ""])
    assert expected.startswith(tiny[1].decode(text.reshape(-1))) and len(expected) - len(tiny[1].decode(text.reshape(-1))) < 4 * WINDOW
    data = make(tiny, [shards], "all:0.8,text:0.2", text=text)
    batch = data.batch([(0, 5), (0, 0)])
    row = batch.inputs
    assert batch.ecgs == 1 and len(data) == 6  # 5 ECGs are four fifths of an epoch
    np.testing.assert_array_equal(row.input_ids[:WINDOW], text[0])  # a BOS that the tokenizer itself does not write is none
    np.testing.assert_array_equal(row.targets[: WINDOW - 1], text[0][1:])
    assert row.layout[0] == (0, WINDOW, ()) and row.predict_at[0] == 0
    assert data.key(5) == "text-0" and Counter(data.at(0, p)[1] >= 5 for p in range(BLOCK)) == {True: 200, False: 800}


@pytest.mark.parametrize(
    ("content", "message"),
    [("short", "has 2 tokens|has . tokens"), (None, "cannot be read"), (b"\xff\xfe" * 9, "is no UTF-8 text")],
)
def test_text_that_cannot_be_used_is_named(tiny, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"--text: .*({message})"):
        read_text(path, tiny[1])
    (tmp_path / "text.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(UserError, match="--text: .*a line"):
        read_text(tmp_path / "text.jsonl", tiny[1])


def test_text_and_its_share_go_together(tiny, shards):
    with pytest.raises(UserError, match="--text and --tasks go together"):
        make(tiny, [shards], "all:0.9,text:0.1")
    with pytest.raises(UserError, match="--text and --tasks go together"):
        make(tiny, [shards], "all", text=np.zeros((2, WINDOW), np.int32))


def test_a_kind_that_is_not_there_is_named(tiny, shards):
    with pytest.raises(UserError, match="--tasks: there is no 'single-choose' in split 'train' .* it has report, single-query, single-verify"):
        make(tiny, [shards], "single-choose")


def test_mixtures_as_words():
    assert parse_mixture("all") == (EVERYTHING,)
    assert parse_mixture(" ecgqa:0.7, report:0.3") == (Share("ecgqa", 0.7), Share("report", 0.3))
    for words in ("", "ecgqa:", "ecgqa:x", "ecgqa:0,report:1", "ecgqa:-1", "ecgqa:nan", "ecgqa:inf", ":1", "ecgqa,ecgqa", "ecgqa:1,report", "text", "text:1"):
        with pytest.raises(UserError, match="--tasks"):
            parse_mixture(words)


def test_what_the_context_does_not_hold_is_cut_or_left_out_and_counted(tiny, tmp_path):
    long = {**REPORT, "report": "sinus rhythm. " * 40}
    endless = {**question(7), "question": "word " * 200}
    shards = written(tmp_path / "long", [[question(1), long, endless], [endless]])
    free, data = make(tiny, [shards]), make(tiny, [shards], context=400)
    row = data.batch([(0, 0)]).inputs
    assert (data.cut, data.left_out) == (1, 1)
    (start, end, branches), *more = row.layout
    assert not more and len(branches) == 2 and end - start + branches[1] == 400
    np.testing.assert_array_equal(row.input_ids, free.batch([(0, 0)]).inputs.input_ids[: len(row.input_ids)])
    assert row.targets[-1] != tiny[1].eos_token_id
    batch = data.batch([(0, 1), (0, 0)])  # nothing is left of the second sample, which is still counted
    assert batch.targets == len(row.targets) and data.left_out == 3
    nothing = data.batch([(0, 1)])
    assert (nothing.targets, nothing.tokens, nothing.ecgs) == (0, 1, 1)
    assert PackedLM(tiny[0])(nothing.inputs).item() == 0
    with pytest.raises(UserError, match="--backbone: its context of 300 tokens does not hold the 313"):
        make(tiny, [shards], context=300)
