"""In what order samples are answered, and what a killed run keeps."""

import json

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from toolkit.evaluation.answering import PREDICTIONS, Asked, _whole_batches, answer_all, plan
from toolkit.training.distributed import Ranks

ASKED = st.lists(st.builds(Asked, st.integers(1, 2), st.just(()), st.integers(1, 4), st.integers(1, 50), st.just(frozenset())), min_size=1, max_size=40)


@given(ASKED, st.integers(1, 9))
def test_every_sample_is_in_one_batch_of_its_number_of_ecgs(asked, size):
    batches = plan(asked, size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(asked)))
    for batch in batches:
        assert 1 <= len(batch) <= size and len({asked[i].n_ecgs for i in batch}) == 1
    order = [(asked[i].n_ecgs, asked[i].longest) for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)  # the longest first
    assert len(batches) == sum(-(-sum(one.n_ecgs == n for one in asked) // size) for n in (1, 2))  # none is cut short but the last of its kind


@given(ASKED, st.integers(1, 5), st.data())
def test_a_file_cut_anywhere_keeps_its_whole_batches(tmp_path_factory, asked, size, data):
    path = tmp_path_factory.mktemp("cut") / "predictions.jsonl"
    batches = plan(asked, size)
    rows = [[{"sample": i, "id": f"{i}-{k}", "prediction": "é"} for i in batch for k in range(asked[i].tasks)] for batch in batches]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for some in rows for row in some).encode()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = _whole_batches(path, batches, asked)
    ends = [sum(len((json.dumps(row, ensure_ascii=False) + "\n").encode()) for some in rows[: n + 1] for row in some) for n in range(len(rows))]
    expected = [row for some, end in zip(rows, ends) if end <= cut + 1 for row in some]  # a last line without its end is a line
    assert kept == expected and [json.loads(line) for line in path.read_text().splitlines()] == expected


def test_no_file_is_nothing_done_and_a_damaged_line_costs_its_batch(tmp_path):
    asked = [Asked(1, ("a",), 1, 5, frozenset())] * 4
    path, batches = tmp_path / "p.jsonl", plan(asked, 2)
    assert _whole_batches(path, batches, asked) == []
    lines = [json.dumps({"sample": i}) for i in range(4)]
    path.write_text("\n".join([lines[0], "\0\0\0", lines[2], lines[3]]) + "\n")
    assert _whole_batches(path, batches, asked) == [{"sample": 2}, {"sample": 3}]


def test_what_is_written_down_is_not_answered_again(tmp_path):
    asked = [Asked(1, ("a",), 2, length, frozenset()) for length in (5, 9, 7, 3, 8)]
    called = []

    def answer(batch):
        called.append(list(batch))
        return [{"sample": i, "id": f"{i}-{k}"} for i in batch for k in range(2)]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = Ranks(0, 1, torch.device("cpu"))
        rows = answer_all(tmp_path, asked, 2, answer, ranks)
        assert called == [[1, 4], [2, 0], [3]] and [row["id"] for row in rows] == [f"{i}-{k}" for i in range(5) for k in range(2)]
        path = tmp_path / PREDICTIONS
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:7]))  # the second batch lost its last row
        called.clear()
        assert answer_all(tmp_path, asked, 2, answer, ranks) == rows and called == [[2, 0], [3]]
        called.clear()
        assert answer_all(tmp_path, asked, 2, answer, ranks) == rows and called == []
    finally:
        dist.destroy_process_group()
