"""Noise added to an ECG at a stated signal-to-noise ratio, and the augmentations of tokenizer training. numpy and scipy only.

    from toolkit.ecg.noise import add_noise, augment
    noisy = add_noise(ecg, "motion", snr_db=6, rng=np.random.default_rng(0))

The three kinds of Moody, Muldrow & Mark, "A noise stress test for arrhythmia detectors" (Computers in Cardiology 1984; their recordings
are PhysioNet's NSTDB: bw, ma, em), and the mains of Friesen et al., "A comparison of the noise sensitivity of nine QRS detection algorithms"
(IEEE Trans Biomed Eng 1990). The recordings have two leads, so twelve-lead noise is modelled here, where it arises: at the electrodes.
"""

import numpy as np
from scipy.fft import irfft

from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE
from toolkit.errors import UserError

NOISES = ("wander", "muscle", "motion", "mains50", "mains60")
SNR = (6.0, 24.0)  # dB, of an augmentation: the four better of NSTDB's six levels (24, 18, 12, 6, 0, -6)

_TIME = np.arange(SAMPLES, dtype=np.float32) / SAMPLING_RATE
_KNOTS = 21  # of a slow amplitude: every 0.5 s
_HATS = np.maximum(0, 1 - np.abs(_TIME * 2 - np.arange(_KNOTS)[:, None])).astype(np.float32)  # [21, 5000]: linear interpolation between the knots

# Leads from the potentials of RA, LA, LL, V1..V6: Einthoven's and Goldberger's limb leads, chest leads against Wilson's terminal.
_LIMB = [[-1, 1, 0], [-1, 0, 1], [0, -1, 1], [1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1]]
_LEADS_OF_ELECTRODES = np.block([[np.array(_LIMB), np.zeros((6, 6))], [np.full((6, 3), -1 / 3), np.eye(6)]]).astype(np.float32)


def _band(low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of the nine electrodes with a flat spectrum from `low` to `high` Hz and nothing elsewhere: [9, 5000]."""
    first, last = round(low * SAMPLES / SAMPLING_RATE), round(high * SAMPLES / SAMPLING_RATE)
    spectrum = np.zeros((9, SAMPLES // 2 + 1), np.complex64)
    spectrum[:, first : last + 1] = rng.standard_normal((9, (last - first + 1) * 2), dtype=np.float32).view(np.complex64)
    return irfft(spectrum, axis=1)


def _swell(spread: float, rng: np.random.Generator) -> np.ndarray:
    """Log-normal amplitude of each electrode, varying within half a second: [9, 5000]."""
    return np.exp(spread * rng.standard_normal((9, _KNOTS), dtype=np.float32)) @ _HATS


def _wander(rng: np.random.Generator) -> np.ndarray:
    """Breathing: four sinusoids of 0.05-0.5 Hz, the slower the larger; every electrode has its own amplitudes and phases."""
    hertz = rng.uniform([0.05, 0.15, 0.25, 0.35], [0.15, 0.25, 0.35, 0.5])[:, None]
    angle = 2 * np.pi * hertz.astype(np.float32) * _TIME
    amplitudes = rng.standard_normal((9, 8), dtype=np.float32) * np.tile(0.15 / hertz[:, 0], 2).astype(np.float32)
    return amplitudes @ np.concatenate([np.sin(angle), np.cos(angle)])


def _muscle(rng: np.random.Generator) -> np.ndarray:
    """Surface EMG: 20-150 Hz, in bursts (contractions)."""
    return _band(20, 150, rng) * _swell(0.7, rng)


def _motion(rng: np.random.Generator) -> np.ndarray:
    """Transients of 1-10 Hz, the band of P, QRS and T, and sudden steps that decay as skin and electrode settle (0.1-1 s).

    The most troublesome of the three, "since it can mimic the appearance of ectopic beats" (NSTDB).
    """
    transients = _band(1, 10, rng)
    transients *= _swell(1.2, rng) / transients.std()
    for electrode, count in enumerate(rng.poisson(1.5, 9)):
        for start in rng.integers(0, SAMPLES - SAMPLING_RATE // 10, count):
            settling = rng.uniform(0.1, 1.0)
            transients[electrode, start:] += 6 * rng.standard_normal() * np.exp(-_TIME[: SAMPLES - start] / np.float32(settling))
    return transients


def _mains(hertz: int, rng: np.random.Generator) -> np.ndarray:
    """A sinusoid and its third harmonic (a fifth of it) of slowly varying amplitude, in phase at all electrodes, which differ in strength."""
    angle = 2 * np.pi * (hertz * _TIME + np.float32(rng.random()))
    course = (1 + 0.3 * rng.uniform(-1, 1, _KNOTS).astype(np.float32)) @ _HATS * (np.sin(angle) + 0.2 * np.sin(3 * angle))
    return rng.standard_normal((9, 1), dtype=np.float32) * course


_MODELS = {
    "wander": _wander,
    "muscle": _muscle,
    "motion": _motion,
    "mains50": lambda rng: _mains(50, rng),
    "mains60": lambda rng: _mains(60, rng),
}


def add_noise(ecg: np.ndarray, kind: str, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """`ecg` (float32 [12, 5000], any unit) with noise of one of `NOISES`: a new float32 [12, 5000].

    In every lead 10 log10(P_ecg / P_noise) is `snr_db`, powers about the lead's mean over the 10 s; a lead without power stays as it is.
    (NSTDB's SNR takes the QRS amplitude for the signal instead, so its numbers are not these.)
    Noise arises at the electrodes RA, LA, LL, V1..V6 and reaches the leads as Einthoven and Wilson have it, so neighbours share it; scaling each
    lead to its SNR then keeps the waveforms and gives up the sums between leads.
    Raises UserError for another kind, shape, or an SNR that is no number.
    """
    if kind not in _MODELS:
        raise UserError(f"kind {kind!r}: one of {', '.join(NOISES)}")
    if ecg.shape != (len(LEADS), SAMPLES):
        raise UserError(f"ecg of shape {list(ecg.shape)}: [12, 5000] is needed (toolkit.ecg.records.read_record gives it)")
    if not np.isfinite(snr_db):
        raise UserError(f"snr_db {snr_db}: give a number of decibels")
    noise = _LEADS_OF_ELECTRODES @ _MODELS[kind](rng)
    noise -= noise.mean(axis=1, keepdims=True)
    # The mean in float64 is exact for a constant lead, whose power is then 0 and not a rounding error.
    centred = ecg - ecg.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    powers = np.einsum("lt,lt->l", centred, centred), np.einsum("lt,lt->l", noise, noise)
    return ecg + noise * np.sqrt(powers[0] / powers[1] * 10 ** (-snr_db / 10)).astype(np.float32)[:, None]


def drop_leads(ecg: np.ndarray, rng: np.random.Generator, at_most: int) -> np.ndarray:
    """A copy of `ecg` [12, 5000] with 1 to `at_most` leads, drawn at random, set to 0: electrodes that came off. UserError unless 1 <= at_most <= 12."""
    if not 1 <= at_most <= len(LEADS):
        raise UserError(f"at_most {at_most}: from 1 to {len(LEADS)} leads")
    out = ecg.copy()
    out[rng.permutation(len(LEADS))[: rng.integers(1, at_most + 1)]] = 0
    return out


def augment(ecg: np.ndarray, noise: float, wander: float, lead_dropout: float, rng: np.random.Generator) -> np.ndarray:
    """One training view of `ecg` (float32 [12, 5000]): float32 [12, 5000], or `ecg` itself where nothing was drawn; `rng` decides everything.

    Each argument is the probability of its augmentation, 0 for never: `noise` adds muscle noise, electrode motion or mains, `wander` baseline
    wander, both at a random SNR of 6-24 dB; `lead_dropout` zeroes 1-3 leads.
    """
    if rng.random() < noise:
        ecg = add_noise(ecg, NOISES[rng.integers(1, len(NOISES))], rng.uniform(*SNR), rng)
    if rng.random() < wander:
        ecg = add_noise(ecg, "wander", rng.uniform(*SNR), rng)
    if rng.random() < lead_dropout:
        ecg = drop_leads(ecg, rng, 3)
    return ecg
