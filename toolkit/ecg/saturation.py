"""Leads that sit at the end of an amplifier's or converter's range."""

import numpy as np

SATURATED_TIME = 0.04  # s at a lead's own extreme: a wave's crest holds 20 ms at most
SATURATED_FROM = 1.0  # mV from the lead's median: nearer, a long extreme is a quiet baseline


def saturated(signal: np.ndarray, rate: float) -> list[int]:
    """Rows of `signal` [leads, n], mV at `rate` Hz as it was recorded, that hold an extreme for 40 ms or more (at least 4 samples).

    Before resampling, which turns a plateau into ripple. Runs at the record's ends do not count: PTB-XL holds the last value for about 55 samples.
    """
    run, found = max(4, round(SATURATED_TIME * rate)), set()
    for extreme in (np.fmax.reduce(signal, axis=1), np.fmin.reduce(signal, axis=1)):  # NaN is ignored
        at = signal == extreme[:, None]
        for lead in np.flatnonzero(np.count_nonzero(at, axis=1) >= run):  # few: the median is the slow part
            inside = at[lead]
            if abs(extreme[lead] - np.nanmedian(signal[lead])) < SATURATED_FROM:
                continue
            inside[: np.argmin(inside)] = False
            inside[len(inside) - np.argmin(inside[::-1]) :] = False
            if inside.any() and run_lengths(inside).max() >= run:
                found.add(int(lead))
    return sorted(found)


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True in a boolean [n], in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    return edges[1::2] - edges[::2]
