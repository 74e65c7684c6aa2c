"""Per-lead gains: what z-scoring takes from an ECG, kept beside its tokens as numbers, prompt text or one of 32 tokens a lead.

A gain is a lead's standard deviation over the 10 s, by which the tokenizer divides it (a causal one by an estimate from the past alone). An archive
that was z-scored upstream has gains of 1 throughout. A record shorter than 10 s (flag `padded`) has smaller ones, as zeros fill it: 5 s of 0.21 mV are 0.15.
"""

from collections.abc import Sequence

import numpy as np

from toolkit.ecg.leads import LEADS

FLOOR = 1e-3  # mV, that of the tokenizer's `normalise`: a flat lead
ZSCORED = 0.01  # 400 records that were z-scored upstream have SDs within 0.00002 of 1 in all leads; of 243 in mV none had all twelve within 0.5
DIGITS = 4  # significant ones that shards hold
GAIN_BINS = 32
# mV, lower edges of the bins 1 to 31, a quarter octave (19 %) apart; bin 0 goes on to 0, bin 31 beyond 2.56. The leads of 237 records in mV (85 PTB-XL,
# 152 Georgia and Ningbo) lie between 0.013 and 1.9.
EDGES = 0.01 * 2 ** (np.arange(1, GAIN_BINS) / 4)


def gains(ecg: np.ndarray) -> np.ndarray:
    """float [12, 5000] or [B, 12, 5000] mV -> float64 [12] or [B, 12]: population standard deviation of each lead in mV, at least 1e-3."""
    # in float64, so that the digits that shards hold do not depend on a processor's order of summation: 0.08 ms an ECG, float32 0.04
    return np.maximum(ecg.std(-1, dtype=np.float64), FLOOR)


def zscored(gains: np.ndarray) -> bool:
    """Whether the leads of these gains [12], those that are not flat, were z-scored upstream, so that the ECG's amplitudes are lost."""
    gains = np.asarray(gains)
    return bool(np.abs(gains[gains > FLOOR] - 1).max(initial=0) < ZSCORED)


def rounded(gains: np.ndarray) -> list[float]:
    """Gains [12] as a shard's json holds them."""
    return [float(f"{gain:.{DIGITS}g}") for gain in gains]


def gain_bins(gains: Sequence | np.ndarray) -> np.ndarray:
    """Gains in mV, any shape -> int64, same shape: which of the 32 bins on a logarithmic scale each falls in."""
    return np.searchsorted(EDGES, gains, side="right")


def gain_text(gains: Sequence[Sequence[float]]) -> str:
    """Gains [n_ecgs, 12] in words, a line an ECG: "Lead amplitudes (SD, mV): I 0.12, II 0.15, ..., V6 0.21."."""

    def line(one: Sequence[float], which: str) -> str:
        # two significant digits: with two decimals a limb lead of low voltage (0.05 mV) would be known to 20 %
        return f"Lead amplitudes{which} (SD, mV): " + ", ".join(f"{lead} {gain:.2g}" for lead, gain in zip(LEADS, one, strict=True)) + "."

    return "\n".join(line(one, f" of ECG {number}" if len(gains) > 1 else "") for number, one in enumerate(gains, 1))
