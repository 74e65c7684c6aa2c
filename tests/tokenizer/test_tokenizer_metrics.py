"""Metrics against closed forms, scipy and slow loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, pearsonr

from toolkit.ecg.leads import LEADS
from toolkit.tokenizer.metrics import BAND_NAMES, BANDS, code_usage, ecg_metrics, summarise

T = np.arange(5000) / 500


def ecgs(seed=0, n=3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 12, 5000)).cumsum(-1).astype(np.float32) / 50 + 0.3


def sines(hertz: float, amplitude: float = 1.0) -> np.ndarray:
    """float [1, 12, 5000], every lead at another phase."""
    return amplitude * np.sin(2 * np.pi * (hertz * T + np.linspace(0, 1, 12)[:, None]))[None]


def measured(original, reconstruction) -> dict:
    return ecg_metrics(original, reconstruction) | {name: np.full(len(original), np.nan) for name in ("r_error_ms", "qrs_error_ms")}


def test_mse_prd_and_correlation_equal_a_slow_loop():
    x, y = ecgs(0), ecgs(0) * 0.8 + 0.3 * ecgs(1)
    found = ecg_metrics(x, y)
    for i in range(3):
        mse, prd, r = [], [], []
        for lead in range(12):
            a, b = x[i, lead].astype(float), y[i, lead].astype(float)
            mse.append(sum((a - b) ** 2) / 5000 / np.var(a))
            prd.append(100 * math.sqrt(sum((a - b) ** 2) / sum((a - a.mean()) ** 2)))
            r.append(pearsonr(a, b).statistic)
            assert found[f"correlation/{LEADS[lead]}"][i] == pytest.approx(r[-1], abs=1e-6)
        assert found["mse"][i] == pytest.approx(np.mean(mse), rel=1e-5)
        assert found["prd"][i] == pytest.approx(np.mean(prd), rel=1e-5)
        assert found["correlation"][i] == pytest.approx(np.mean(r), abs=1e-6)


def test_perfect_opposite_and_flat_reconstructions_have_their_known_figures():
    x = ecgs()
    mean = np.broadcast_to(x.mean(-1, keepdims=True), x.shape)
    for y, mse, r in ((x, 0, 1), (2 * mean - x, 4, -1), (mean, 1, 0)):
        found = ecg_metrics(x, y)
        np.testing.assert_allclose(found["mse"], mse, atol=1e-5)
        np.testing.assert_allclose(found["prd"], 100 * math.sqrt(mse), atol=0.01)
        np.testing.assert_allclose(found["correlation"], r, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(scale=st.floats(0.05, 50), shift=st.floats(-5, 5), lead=st.integers(0, 11))
def test_unit_and_offset_of_a_lead_do_not_matter(scale, shift, lead):
    x, y = ecgs(2, 1).astype(float), ecgs(3, 1).astype(float)
    before = ecg_metrics(x, y)
    for signal in (x, y):
        signal[:, lead] = signal[:, lead] * scale + shift
    for name, values in ecg_metrics(x, y).items():
        np.testing.assert_allclose(values, before[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("band, hertz", [(0, 0.25), (1, 2), (2, 9), (3, 25), (4, 60), (5, 180)])
def test_a_sinusoidal_error_stands_in_its_band_with_its_energy(band, hertz):
    """A sine of amplitude a has the variance a^2 / 2: 0.2^2 of the original's energy, all of it in one band but for what leaks."""
    x = sines(10)
    found = ecg_metrics(x, x + sines(hertz, 0.2))
    errors = np.array([found[f"error/{name}"][0] for name in BAND_NAMES])
    assert errors.argmax() == band
    assert errors[band] == pytest.approx(0.04, rel=0.07)
    assert errors.sum() - errors[band] < 0.004
    energies = np.array([found[f"energy/{name}"][0] for name in BAND_NAMES])
    assert energies[2] == pytest.approx(1, rel=0.01) and energies.sum() == pytest.approx(1, rel=0.01)


def test_bands_cover_the_spectrum_and_add_up_to_the_error():
    assert [high for _, high in BANDS[:-1]] == [low for low, _ in BANDS[1:]] and BANDS[0][0] == 0 and BANDS[-1][1] == 250
    noise = np.random.default_rng(0).standard_normal((4, 12, 5000))
    found = ecg_metrics(ecgs(0, 4), ecgs(0, 4) + noise)
    np.testing.assert_allclose(sum(found[f"error/{name}"] for name in BAND_NAMES), found["mse"], rtol=1e-9)
    # white: each band's part of the energy is its part of the width
    for (low, high), name in zip(BANDS[2:], BAND_NAMES[2:]):
        np.testing.assert_allclose(found[f"error/{name}"].sum() / found["mse"].sum(), (high - low) / 250, rtol=0.05)


def test_a_flat_lead_is_left_out_and_an_ecg_of_flat_leads_is_nan():
    x, y = ecgs(4, 2), ecgs(5, 2)
    whole = ecg_metrics(x, y)
    x[0, 3], x[1] = 0, 0.7
    found = ecg_metrics(x, y)
    assert np.isnan(found["correlation/aVR"][0]) and not np.isnan(found["correlation/V1"][0])
    leads = [whole[f"correlation/{lead}"][0] for lead in LEADS if lead != "aVR"]
    assert found["correlation"][0] == pytest.approx(np.mean(leads))
    assert all(np.isnan(values[1]) for values in found.values())


@pytest.mark.parametrize("shapes", [((2, 12, 5000), (3, 12, 5000)), ((12, 5000), (12, 5000)), ((2, 11, 5000), (2, 11, 5000))])
def test_wrong_shapes_are_named(shapes):
    with pytest.raises(ValueError, match=r"expected two arrays \[N, 12, samples\]"):
        ecg_metrics(*(np.zeros(shape) for shape in shapes))


def test_a_group_pools_bands_and_beats_and_leaves_out_what_is_missing():
    x = np.concatenate([sines(10), sines(10) + sines(60, 0.5)])
    y = np.concatenate([sines(10), sines(10)])  # nothing at 60 Hz is kept; the first ECG has nothing there
    rows = measured(x, y) | {"beats": np.array([10.0, 20, 0]), "missed": np.array([2.0, 20, 0]), "extra": np.array([0.0, 3, 1])}
    rows = {name: np.append(values, np.nan) if len(values) == 2 else values for name, values in rows.items()}  # a third ECG of flat leads
    rows["r_error_ms"], rows["qrs_error_ms"] = np.array([4, np.nan, np.nan]), np.array([np.nan, 12, np.nan])
    found = summarise(rows)
    assert found["ecgs"] == 3
    assert found["band_error"]["40-100 Hz"] == pytest.approx(1, rel=0.01)
    assert found["band_error"]["5-15 Hz"] < 0.01 and found["band_error"]["0-0.67 Hz"] is None
    assert sum(found["band_mse"].values()) == pytest.approx(found["mse"], rel=1e-9) and sum(found["band_energy"].values()) == pytest.approx(1, rel=0.01)
    assert found["mse"] == pytest.approx(np.nanmean(rows["mse"]))
    assert found["r_error_ms"] == 4 and found["qrs_error_ms"] == 12
    assert found["missed"] == pytest.approx(22 / 30) and found["extra"] == pytest.approx(4 / 30)


def test_r_errors_weigh_beats_alike():
    rows = measured(ecgs(0, 2), ecgs(1, 2)) | {"beats": np.array([10.0, 31]), "missed": np.array([0.0, 1]), "extra": np.zeros(2)}
    found = summarise(rows | {"r_error_ms": np.array([8.0, 2])})
    assert found["r_error_ms"] == pytest.approx((10 * 8 + 30 * 2) / 40)
    assert found["qrs_error_ms"] is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(any))
def test_perplexity_is_that_of_scipy(counts):
    found = code_usage(np.array(counts), 0.032)
    assert found["perplexity"] == pytest.approx(math.exp(entropy(counts)))
    assert found["used"] + found["dead"] == found["codes"] == len(counts) and found["dead"] == counts.count(0)
    assert 1 <= found["perplexity"] <= found["used"] * (1 + 1e-12)


def test_bits_per_second():
    found = code_usage(np.full(1296, 3), 16 / 500)
    assert found["perplexity"] == pytest.approx(1296) and found["dead"] == 0
    assert found["bits_per_second"] == found["entropy_bits_per_second"] == pytest.approx(math.log2(1296) * 31.25)
