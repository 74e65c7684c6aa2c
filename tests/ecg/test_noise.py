"""Noise has the SNR and the spectrum it is asked for, and augmentation is decided by the generator alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import welch

from toolkit.ecg.heart import draw, simulate
from toolkit.ecg.leads import LEADS, SAMPLES
from toolkit.ecg.noise import _LEADS_OF_ELECTRODES, NOISES, SNR, add_noise, augment, drop_leads
from toolkit.errors import UserError


def ecg(seed=0) -> np.ndarray:
    rng = np.random.default_rng([9, seed])
    return simulate(draw(rng), rng)


def decibels(clean, noisy) -> np.ndarray:
    """SNR of each lead, by the definition and in float64."""
    noise = noisy.astype(np.float64) - clean
    return 10 * np.log10(clean.astype(np.float64).var(axis=1) / (noise**2).mean(axis=1))


def added(kind, seed) -> np.ndarray:
    """The noise alone [12, 5000], as strong as the ECG."""
    return add_noise(ecg(), kind, 0, np.random.default_rng(seed)) - ecg()


def share(noise, low, high) -> float:
    """Share of the power of [n, 5000] between two frequencies, under a Hann window: the ends do not meet."""
    power = np.abs(np.fft.rfft(noise * np.hanning(SAMPLES), axis=1)) ** 2
    hertz = np.fft.rfftfreq(SAMPLES, 1 / 500)
    return (power[:, (hertz >= low) & (hertz <= high)].sum() / power.sum()).item()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NOISES), st.floats(-20, 40), st.integers(0, 2**32), st.floats(0.05, 20), st.floats(-2, 2))
def test_every_lead_has_the_snr_that_was_asked_for(kind, snr_db, seed, scale, offset):
    clean = (ecg(seed % 5) * scale + offset).astype(np.float32)
    before = clean.copy()
    noisy = add_noise(clean, kind, snr_db, np.random.default_rng(seed))
    assert noisy.dtype == np.float32 and noisy.shape == clean.shape
    np.testing.assert_array_equal(clean, before)
    # 0.01 dB: float32 rounds the sum, of which the noise is a hundredth at 40 dB.
    np.testing.assert_allclose(decibels(clean, noisy), snr_db, atol=0.01)
    np.testing.assert_array_equal(noisy, add_noise(clean, kind, snr_db, np.random.default_rng(seed)))
    assert (noisy != add_noise(clean, kind, snr_db, np.random.default_rng(seed + 1))).any()


@pytest.mark.parametrize("kind", NOISES)
def test_a_lead_without_power_stays_as_it_is(kind):
    clean = ecg()
    clean[3], clean[7] = 0, 0.1
    noisy = add_noise(clean, kind, -20, np.random.default_rng(0))
    changed = (noisy != clean).any(axis=1)
    assert changed.tolist() == [i not in (3, 7) for i in range(12)]


@pytest.mark.parametrize("kind, low, high, least", [
    ("wander", 0, 0.7, 0.999), ("muscle", 18, 152, 0.99), ("motion", 0, 12, 0.97), ("mains50", 49, 51, 0.95), ("mains60", 59, 61, 0.95),
])  # fmt: skip
def test_noise_lies_in_its_band(kind, low, high, least):
    assert all(share(added(kind, seed), low, high) > least for seed in range(10))


@pytest.mark.parametrize("kind, hertz", [("mains50", 50), ("mains60", 60)])
def test_mains_has_its_third_harmonic_and_one_phase_in_all_leads(kind, hertz):
    noise = added(kind, 1)
    bins, power = welch(noise, 500, nperseg=1000)
    third, other = power[:, np.abs(bins - 3 * hertz) <= 1].sum(), power[:, np.abs(bins - 2 * hertz) <= 1].sum()
    assert third > 1000 * other and 0.02 < third / power[:, np.abs(bins - hertz) <= 1].sum() < 0.06  # (1/5)**2 = 0.04
    assert (np.abs(np.corrcoef(noise)) > 0.999).all()  # the sign tells which electrode is stronger


def kurtosis(signal) -> np.ndarray:
    centred = signal - signal.mean(axis=1, keepdims=True)
    return (centred**4).mean(axis=1) / (centred**2).mean(axis=1) ** 2


def test_muscle_and_motion_come_and_go():
    """A Gaussian of constant strength has kurtosis 3; bursts have more."""
    for kind in ("muscle", "motion"):
        assert np.median([kurtosis(added(kind, seed)) for seed in range(20)]) > 3.5


def test_motion_has_sudden_steps_and_wander_none():
    def jump(kind):  # largest change within 2 ms, noise of standard deviation 1
        noises = [added(kind, seed) for seed in range(20)]
        return np.median([np.abs(np.diff(n / n.std(axis=1, keepdims=True), axis=1)).max() for n in noises])

    assert jump("motion") > 1 and jump("wander") < 0.05


def test_leads_come_from_electrodes_as_einthoven_goldberger_and_wilson_have_it():
    ra, la, ll, *chest = potentials = np.random.default_rng(0).standard_normal((9, 50))
    wilson = (ra + la + ll) / 3
    limb = {"I": la - ra, "II": ll - ra, "III": ll - la, "aVR": ra - (la + ll) / 2, "aVL": la - (ra + ll) / 2, "aVF": ll - (ra + la) / 2}
    slow = {**limb, **{f"V{i + 1}": electrode - wilson for i, electrode in enumerate(chest)}}
    np.testing.assert_allclose(_LEADS_OF_ELECTRODES @ potentials, [slow[lead] for lead in LEADS], atol=1e-6)


@pytest.mark.parametrize("kind, snr_db, array", [("hum", 6, ecg()), ("muscle", 6, ecg()[:11]), ("muscle", 6, ecg()[:, :4999]), ("muscle", np.nan, ecg())])
def test_mistakes_are_named(kind, snr_db, array):
    with pytest.raises(UserError, match="kind 'hum'|shape|snr_db"):
        add_noise(array, kind, snr_db, np.random.default_rng(0))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_some_leads_drop_and_the_others_stay(at_most, seed):
    clean = ecg()
    out = drop_leads(clean, np.random.default_rng(seed), at_most)
    dropped = ~out.any(axis=1)
    assert 1 <= dropped.sum() <= at_most and clean.any(axis=1).all() and out.dtype == np.float32
    np.testing.assert_array_equal(out[~dropped], clean[~dropped])


def test_every_lead_and_every_number_of_leads_drops():
    dropped = [~drop_leads(ecg(), np.random.default_rng(seed), 3).any(axis=1) for seed in range(100)]
    assert {d.sum().item() for d in dropped} == {1, 2, 3} and np.any(dropped, axis=0).all()
    for wrong in (0, 13):
        with pytest.raises(UserError, match="at_most"):
            drop_leads(ecg(), np.random.default_rng(0), wrong)


def test_augmentation_follows_its_probabilities():
    clean = ecg()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        np.testing.assert_array_equal(augment(clean, 0, 0, 0, rng), clean)
        noise, wander, dropped = augment(clean, 1, 0, 0, rng), augment(clean, 0, 1, 0, rng), augment(clean, 0, 0, 1, rng)
        low, high = SNR
        assert (low - 0.01 <= decibels(clean, noise)).all() and (decibels(clean, noise) <= high + 0.01).all()
        assert share(noise - clean, 0, 0.7) < 0.7 and share(wander - clean, 0, 0.7) > 0.99
        assert 1 <= (~dropped.any(axis=1)).sum() <= 3
        every = augment(clean, 1, 1, 1, np.random.default_rng(seed))
        assert every.dtype == np.float32 and 1 <= (~every.any(axis=1)).sum() <= 3
        np.testing.assert_array_equal(every, augment(clean, 1, 1, 1, np.random.default_rng(seed)))
    rng = np.random.default_rng(0)
    touched = np.mean([(augment(clean, 0, 0, 0.3, rng) != clean).any() for _ in range(1000)])
    assert abs(touched - 0.3) < 0.06  # four standard deviations of 1000 draws
