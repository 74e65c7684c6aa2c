"""Streamed ids against `encode` of the same ten seconds, and against another cut of the same stream."""

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.ecg.heart import draw, simulate
from toolkit.ecg.records import read_record
from toolkit.errors import UserError
from toolkit.tokenizer.fsq import ids_of
from toolkit.tokenizer.normalise import running
from toolkit.tokenizer.streaming import HISTORY, StreamingTokenizer
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


@cache
def causal() -> ECGTokenizer:
    """Random weights, those of the blocks too: they begin as the identity, and would hide a history that is too short."""
    torch.manual_seed(0)
    tokenizer = ECGTokenizer(TokenizerConfig(causal=True)).eval()
    for block in tokenizer.encoder.blocks:
        torch.nn.init.normal_(block.down.weight, std=0.1)
    return tokenizer


@cache
def ecg(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return simulate(draw(rng), rng)


@cache
def minute() -> np.ndarray:
    return np.concatenate([ecg(seed) for seed in range(6)], 1)


def pushed(signal: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Ids of `signal` in pushes of these sizes, and what is left in one more."""
    stream, cuts = StreamingTokenizer(causal()), np.cumsum([0, *sizes])
    ids = [stream.push(signal[:, a:b]) for a, b in zip(cuts, [*cuts[1:], signal.shape[1]])]
    return np.concatenate(ids)


def wandering(signal: np.ndarray, offset: float, drift: float) -> np.ndarray:
    return (signal + offset + drift * np.linspace(0, 1, signal.shape[1])).astype(np.float32)


SIZES = st.lists(st.one_of(st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 5001, 6000]), st.integers(0, 700)), max_size=30)


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(0, 5), st.floats(-3, 3), st.floats(-3, 3))
def test_ids_are_those_of_encode(sizes, seed, offset, drift):
    signal = wandering(ecg(seed), offset, drift)
    ids = pushed(signal, sizes)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, causal().encode(signal))


def test_real_ecgs_sample_by_sample(ecg_data):
    for path in sorted((ecg_data / "ptbxl_mv").rglob("*.hea"))[:2] + sorted((ecg_data / "cinc2021" / "georgia").glob("*.hea"))[:2]:
        signal = np.nan_to_num(read_record(path))
        np.testing.assert_array_equal(pushed(signal, [1] * 700 + [10] * 100), causal().encode(signal))


def test_the_ids_are_not_all_alike():
    assert len(np.unique(causal().encode(ecg(0)))) > 20  # or the tests above would pass with a stream that returns a constant


@settings(max_examples=10, deadline=None)
@given(SIZES)
def test_a_minute_cut_anyhow(sizes):
    ids = pushed(minute(), sizes)
    assert len(ids) == (30_000 + 8) // 16
    np.testing.assert_array_equal(ids, pushed(minute(), []))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 1874), max_size=30, unique=True), st.sampled_from([0.0, 300.0, -1e5]))
def test_running_statistics_are_the_same_bits_for_any_cut(tokens, offset):
    signal = torch.from_numpy((minute()[None, :, :29_992] + offset).astype(np.float32))
    whole, state, parts = running(signal), None, []
    cuts = [0, *(16 * k - 8 for k in sorted(tokens)), 29_992]
    for a, b in zip(cuts, cuts[1:]):
        x, _, _, state = running(signal[..., a:b], state)
        parts.append(x)
    assert torch.equal(torch.cat(parts, -1), whole[0]) and torch.equal(state, whole[3])


def test_a_stream_goes_on_as_the_encoder_would_without_a_cut():
    """A minute in one piece through `normalise` and the encoder in float64: no history, no running sums handed on."""
    with torch.no_grad():
        x = causal().normalise(torch.from_numpy(minute()[:, :29_992])[None])[0]  # 29,992 + 8 are whole tokens
        whole = ids_of(torch.sigmoid(copy.deepcopy(causal().encoder).double()(x.double())), causal().config.levels)[0]
    np.testing.assert_array_equal(pushed(minute(), [1000] * 29)[:1875], whole.numpy())


def test_the_history_is_no_longer_than_it_has_to_be():
    """A token feels a change of the first sample of its history's clean part, and none of a sample before it."""
    x = torch.from_numpy(minute()[None, :, : 16 * 60 - 8])
    with torch.no_grad():
        last = causal().encoder(x)[0, -1]
        reach = []
        for sample in range(16 * 60 - 8 - HISTORY - 32, 16 * 60 - 8):
            changed = x.clone()
            changed[..., sample] += 1
            reach.append((causal().encoder(changed)[0, -1] - last).abs().max().item() > 0)
    first = 16 * 60 - 8 - HISTORY - 32 + reach.index(True)
    assert 0 <= first - (16 * 59 - 8 - HISTORY) < 16


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 312), st.floats(-100, 100))
def test_the_future_changes_no_token(token, size):
    signal = ecg(1).copy()
    signal[:, 16 * token + 8 :] = size
    known = token + 1
    np.testing.assert_array_equal(causal().encode(signal)[:known], causal().encode(ecg(1))[:known])
    np.testing.assert_array_equal(pushed(signal, [300] * 10)[:known], causal().encode(ecg(1))[:known])


def test_token_k_comes_with_sample_16k_plus_8():
    stream, came = StreamingTokenizer(causal()), []
    for sample in range(1, 501):
        came += [sample] * len(stream.push(ecg(0)[:, sample - 1 : sample]))
    assert came == [16 * k + 8 for k in range(31)]


def test_a_long_stream_takes_no_more_memory():
    stream, sizes = StreamingTokenizer(causal()), []
    for _ in range(10):
        stream.push(minute())
        sizes.append(len(pickle.dumps((stream.waiting, stream.sums, stream.history))))
        held = [stream.sums.untyped_storage().nbytes(), stream.history.untyped_storage().nbytes(), stream.waiting.base is None]
        assert held == [12 * 3 * 8, 12 * HISTORY * 4, True]  # no view that keeps a whole push
    assert max(sizes) - min(sizes) <= 15 * 12 * 4


@pytest.mark.parametrize("lead", [0, 6])
def test_flat_and_silent_leads(lead):
    for value in (0.0, 5.0):
        signal = ecg(2).copy()
        signal[lead, 2000:] = value
        np.testing.assert_array_equal(pushed(signal, [33] * 100), causal().encode(signal))
    silence = np.zeros((12, 5000), np.float32)
    np.testing.assert_array_equal(pushed(silence, [33] * 100), causal().encode(silence))


def test_ids_at_a_boundary_are_those_of_float64():
    """The bias is moved until one output lies on the boundary of two digits, to 1e-8; float32, off by 1e-6, would toss a coin at every cut."""
    tokenizer = copy.deepcopy(causal())
    x = tokenizer.normalise(torch.from_numpy(ecg(3))[None])[0]
    exact, unlike = copy.deepcopy(tokenizer.encoder).double(), 0
    with torch.no_grad():
        for token in range(5, 313, 75):
            exact.to_code.bias -= exact(x.double())[0, token]  # sigmoid(0) * 5 = 2.5
            tokenizer.encoder.to_code.bias.copy_(exact.to_code.bias)
            exact.to_code.bias.copy_(tokenizer.encoder.to_code.bias)
            digits = torch.round(torch.sigmoid(exact(x.double())[0]) * 5).long()
            expected = (digits * 6 ** torch.arange(4)).sum(-1).numpy()
            for size in (160, 1700):
                stream = StreamingTokenizer(tokenizer)
                ids = np.concatenate([stream.push(ecg(3)[:, a : a + size]) for a in range(0, 5000, size)])
                np.testing.assert_array_equal(ids, expected)
            unlike += int((torch.round(torch.sigmoid(tokenizer.encoder(x)[0]) * 5).long() != digits).sum())
    assert unlike > 0  # float32 alone does toss it


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((11, 5), np.float32), r"expected \[12, n\]"),
        (np.zeros(12, np.float32), r"expected \[12, n\]"),
        (np.zeros((12, 5), np.int16), "floating point"),
        (np.full((12, 5), np.nan, np.float32), "NaN"),
        (np.full((12, 5), 1e39), "finite"),  # an infinity in float32
    ],
)
def test_after_an_error_the_stream_stands_where_it_stood(samples, message):
    stream = StreamingTokenizer(causal())
    first = stream.push(ecg(0)[:, :1003])
    with pytest.raises(ValueError, match=message):
        stream.push(samples)
    np.testing.assert_array_equal(np.concatenate([first, stream.push(ecg(0)[:, 1003:])]), causal().encode(ecg(0)))


def test_an_encoder_that_fails_leaves_the_stream_where_it_stood():
    tokenizer = copy.deepcopy(causal())
    stream, bias = StreamingTokenizer(tokenizer), tokenizer.encoder.to_code.bias.detach().clone()
    first = stream.push(ecg(0)[:, :1003])
    with torch.no_grad():
        tokenizer.encoder.to_code.bias.fill_(torch.nan)
        with pytest.raises(ValueError, match="not finite"):
            stream.push(ecg(0)[:, 1003:])
        tokenizer.encoder.to_code.bias.copy_(bias)
    np.testing.assert_array_equal(np.concatenate([first, stream.push(ecg(0)[:, 1003:])]), causal().encode(ecg(0)))


def test_what_cannot_stream_is_named():
    with pytest.raises(UserError, match="--causal true"):
        StreamingTokenizer(ECGTokenizer(TokenizerConfig()))
    with pytest.raises(ValueError, match="500 Hz, got 250"):
        StreamingTokenizer(causal(), 250)
    with pytest.raises(ValueError, match="bfloat16"):
        StreamingTokenizer(copy.deepcopy(causal()).bfloat16())
    with pytest.raises(ValueError, match="on meta"):
        StreamingTokenizer(copy.deepcopy(causal()).to("meta"))
