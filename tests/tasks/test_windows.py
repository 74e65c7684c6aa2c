"""The windows objective: where windows lie, what is predicted, and that a row of them is each of them alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.lm import attention
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import pack
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.data import ForecastData
from toolkit.tasks.windows import STEPS, WINDOWS, window_groups, window_starts

SEEDS = st.integers(0, 2**31)


@given(st.integers(1, 700), SEEDS, st.integers(0, 1000), st.integers(0, 10**6))
def test_starts_are_multiples_of_the_step_and_windows_fit(n, seed, epoch, index):
    found = window_starts(n, seed, epoch, index)
    assert [(window, step) for _, window, step in found] == [(w, s) for w, s in zip(WINDOWS, STEPS) if w + s <= n]
    assert all(start % step == 0 and 0 <= start <= n - window - step for start, window, step in found)
    assert found == window_starts(n, seed, epoch, index)


@given(st.integers(19, 400), st.integers(0, 13), SEEDS)
def test_sequences_are_slices_of_the_ecg_and_only_steps_are_targets(n, opening, seed):
    before, tokens = np.arange(10_000, 10_000 + opening + 1), np.arange(n)
    starts = window_starts(n, seed, 0, 0)
    row = pack(window_groups(before, tokens, starts))
    assert len(row.targets) == sum(step for _, _, step in starts) and len(row.layout) == len(starts)
    targets = np.split(row.targets, np.cumsum([step for _, _, step in starts])[:-1])
    for (begin, end, branches), (start, window, step), predicted in zip(row.layout, starts, targets):
        assert branches == ()
        assert row.input_ids[begin:end].tolist() == [*before, *range(start, start + window + step)]
        assert row.position_ids[begin:end].tolist() == list(range(end - begin))
        assert predicted.tolist() == list(range(start + window, start + window + step))
    assert [end for _, end, _ in row.layout[:-1]] == [begin for begin, _, _ in row.layout[1:]] and row.layout[-1][1] == len(row.input_ids)
    np.testing.assert_array_equal(row.input_ids[row.predict_at + 1], row.targets)


def test_each_start_is_as_likely_as_the_others_and_scales_are_independent():
    drawn = np.array([[start // step for start, _, step in window_starts(313, 1, epoch, index)] for epoch in range(4) for index in range(2000)])
    for k, (window, step) in enumerate(zip(WINDOWS, STEPS)):
        counts = np.bincount(drawn[:, k])
        assert len(counts) == (313 - window - step) // step + 1
        expected = len(drawn) / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 5 * (2 * len(counts)) ** 0.5  # chi-squared: 5 standard deviations
    assert np.abs(np.corrcoef(drawn[:, 1:].T) - np.eye(4)).max() < 5 / len(drawn) ** 0.5


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("windows"), np.random.default_rng(0)

    def split(name, lengths):
        samples = [(f"{name}{i}", rng.integers(0, 1296, (1, n), np.uint16), {"gains": [[0.1 * (i + 1)] * 12], "report": "x"}) for i, n in enumerate(lengths)]
        return write_split(folder, name, samples, 9)

    write_index(folder, {"train": split("train", [313, 313, 100, 313]), "short": split("short", [313, 18])}, kind="tokens")
    return folder


def test_58_tokens_of_an_ecg_are_targets(tiny_with_gains, shards):
    _, tokenizer, vocabulary = tiny_with_gains
    data = ForecastData(Shards.open(shards, "train"), tokenizer, vocabulary, objective="windows", seq_len=1350, seed=3)
    assert data.samples_per_row == 2  # 605 tokens of five sequences, each after BOS, start and 12 gain tokens
    both, one, two = data.batch([(0, 0), (7, 1)]), data.batch([(0, 0)]), data.batch([(7, 1)])
    assert (both.ecgs, both.targets, both.tokens) == (2, 2 * 58, 2 * (605 + 5 * 14))
    for name in ("input_ids", "position_ids", "targets"):
        np.testing.assert_array_equal(getattr(both.inputs, name), np.concatenate([getattr(one.inputs, name), getattr(two.inputs, name)]))
    codes = data.shards.ids(0)[0]
    for (begin, end, _), (start, window, step) in zip(one.inputs.layout, window_starts(313, 3, 0, 0)):
        ids = one.inputs.input_ids[begin:end]
        assert ids[:2].tolist() == [tokenizer.bos_token_id, vocabulary.start] and (ids[2:14] == vocabulary.gain_first + 13).all()
        assert (ids[14:] - vocabulary.first).tolist() == codes[start : start + window + step].tolist()
    assert data.batch([(0, 2)]).targets == 7 + 4 + 2  # an ECG of 100 tokens has no window of 142
    assert len({data.batch([(epoch, 0)]).inputs.input_ids.tobytes() for epoch in range(4)}) == 4
    again = ForecastData(Shards.open(shards, "train"), tokenizer, vocabulary, objective="windows", seed=3).batch([(7, 1)])
    np.testing.assert_array_equal(again.inputs.input_ids, two.inputs.input_ids)


def test_logits_are_those_of_each_window_alone(tiny, shards):
    model, tokenizer, vocabulary = tiny
    row = ForecastData(Shards.open(shards, "train"), tokenizer, vocabulary, objective="windows").batch([(0, 0), (1, 3)]).inputs
    with torch.no_grad():
        packed = PackedLM(model)(row, logits=True)
        with attention.plain_attention(model):
            alone = [model(input_ids=torch.from_numpy(row.input_ids[begin:end])[None], use_cache=False).logits[0] for begin, end, _ in row.layout]
    assert (packed - torch.cat(alone)[row.predict_at]).abs().max() < 1e-5


def test_what_windows_cannot_be_made_of_is_refused(tiny, shards):
    _, tokenizer, vocabulary = tiny
    with pytest.raises(UserError, match="--objective windows: .* ECG of 18 tokens, .* needs 19"):
        ForecastData(Shards.open(shards, "short"), tokenizer, vocabulary, objective="windows")


def test_a_report_is_predicted_from_the_whole_ecg_after_the_windows(tiny, shards):
    model, tokenizer, vocabulary = tiny
    data = ForecastData(Shards.open(shards, "train"), tokenizer, vocabulary, reports=True, objective="windows", seq_len=2200)
    without = ForecastData(Shards.open(shards, "train"), tokenizer, vocabulary, objective="windows").batch([(0, 0)])
    batch = data.batch([(0, 0)])
    assert batch.tokens <= 2200 // data.samples_per_row and data.samples_per_row == 2
    asked = tokenizer.encode("\nWrite the report of this ECG.\nReport:", add_special_tokens=False)
    answer = [*tokenizer.encode(" x", add_special_tokens=False), tokenizer.eos_token_id]
    assert batch.inputs.targets.tolist() == [*without.inputs.targets, *answer]
    assert batch.inputs.input_ids[len(without.inputs.input_ids) :].tolist() == [
        tokenizer.bos_token_id, vocabulary.start, *(data.shards.ids(0)[0].astype(int) + vocabulary.first), vocabulary.end, *asked, *answer
    ]  # fmt: skip
