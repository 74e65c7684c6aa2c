"""Gains against plain standard deviations and the tokenizer's own divisor; bins against their definition; the text."""

import math
import statistics
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.ecg.gains import FLOOR, GAIN_BINS, gain_bins, gain_text, gains, rounded
from toolkit.ecg.leads import LEADS
from toolkit.ecg.records import read_record
from toolkit.tokenizer.normalise import zscore

AMPLITUDES = st.floats(FLOOR, 1e6)


def walk(seed):
    return np.random.default_rng(seed).normal(0, 0.02, (12, 5000)).cumsum(-1).astype(np.float32)


def test_gains_are_the_divisors_of_the_tokenizer():
    ecg = np.stack([walk(0), walk(1) + 3])
    ecg[1, 4] = 0.25  # flat
    found = gains(ecg)
    slow = [[max(1e-3, statistics.pstdev(lead)) for lead in one.astype(float).tolist()] for one in ecg]
    np.testing.assert_allclose(found, slow, rtol=1e-9)
    np.testing.assert_allclose(found, zscore(torch.from_numpy(ecg))[2][..., 0], rtol=1e-12)
    np.testing.assert_array_equal(found[0], gains(ecg[0]))
    assert found[1, 4] == 1e-3


def test_gains_of_a_recording_are_those_of_its_samples(ecg_data):
    record = sorted((ecg_data / "ptbxl_mv").rglob("*.hea"))[0]
    ecg = read_record(record.with_suffix(""))
    np.testing.assert_allclose(gains(ecg), [np.std(lead.astype(np.float64)) for lead in ecg])
    assert (gains(2 * ecg) == 2 * gains(ecg)).all()  # what z-scores do not know


@given(st.lists(AMPLITUDES, min_size=12, max_size=12))
def test_shards_hold_four_significant_digits(values):
    for kept, value in zip(rounded(values), values):
        assert kept == pytest.approx(value, rel=5e-4) and len(Decimal(repr(kept)).normalize().as_tuple().digits) <= 4
    assert rounded(rounded(values)) == rounded(values)


@given(AMPLITUDES, AMPLITUDES)
def test_bins_keep_the_order_and_the_scale(a, b):
    low, high = sorted((a, b))
    first, second = gain_bins([low, high])
    assert 0 <= first <= second < GAIN_BINS
    if 0.01 <= low and high < 2.56:
        assert abs((second - first) - 4 * math.log2(high / low)) < 1 + 1e-9


@given(st.integers(0, GAIN_BINS - 1), st.floats(0.01, 0.99))
def test_a_bin_is_a_quarter_of_an_octave(bin, share):
    assert gain_bins(0.01 * 2 ** ((bin + share) / 4)) == bin


def test_gains_in_words():
    one = [0.1, 0.123, 0.0456, 1, 1.25, 0.001, *[0.2] * 6]
    assert gain_text([one]) == (
        "Lead amplitudes (SD, mV): I 0.1, II 0.12, III 0.046, aVR 1, aVL 1.2, aVF 0.001, V1 0.2, V2 0.2, V3 0.2, V4 0.2, V5 0.2, V6 0.2."
    )
    first, second = gain_text([one, [0.3] * 12]).split("\n")
    assert first.startswith("Lead amplitudes of ECG 1 (SD, mV): I 0.1, ") and second.startswith("Lead amplitudes of ECG 2 (SD, mV): I 0.3, ")
    assert all(f" {lead} " in second for lead in LEADS)
