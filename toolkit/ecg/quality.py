"""The quality rule: which canonical ECGs are used, which are mended, which are quarantined and why.

    ecg, flags = check(read_record(path))

The thresholds were set on real records (PTB-XL 85 in mV and 1,625 z-scored, Georgia 73, Ningbo 85): they quarantine 6 of 1,868, all with a
lead that is constant for 10 s, and flag 63 as `high_amplitude`.
"""

import numpy as np
from scipy.ndimage import maximum_filter1d, minimum_filter1d

from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE
from toolkit.ecg.records import MIN_SAMPLES, RecordError

NAN_RUN = 50  # samples, 100 ms: about one QRS complex. A straight line over more than that would invent or erase a beat
FLAT_WINDOW = 5 * SAMPLING_RATE  # 5 s without a beat at all; the longest constant run in a sane record is 1.4 s
FLAT_RANGE = 0.005  # mV, five steps of PTB-XL's 1 uV: resampling a constant lead leaves ripple. The smallest sane lead spans 0.11 mV
HIGH_AMPLITUDE = 10.0  # mV: pacing spikes and artefacts reach 12.5 mV, and 18.7 SD in z-scored records
IMPOSSIBLE_AMPLITUDE = 50.0  # mV: a unit error. 16 bits at 1 uV end at 33 mV; uV taken for mV makes 1,000
SATURATED_RUN = 20  # samples, 40 ms at a lead's own extreme: a wave's crest holds 10 at most
SATURATED_FROM = 1.0  # mV from the lead's median: nearer, a long extreme is a quiet baseline


def check(ecg: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """`ecg` float32 [12, 5000] in mV, mended where that is honest, and its flags, sorted. What is returned is finite.

    Flags: `nan_interpolated` (runs of up to 100 ms replaced by straight lines, at the ends by the nearest value), `padded` (the last
    samples, at most 5 s, are 0 in all leads), `high_amplitude` (over 10 mV), `saturated` (a lead sits at its extreme for 40 ms or more).

    Raises `RecordError` with reason `nan` (a longer run, or an infinity), `flat_lead` (a lead within 5 uV for 5 s) or
    `amplitude` (over 50 mV).
    """
    assert ecg.shape == (len(LEADS), SAMPLES), ecg.shape
    flags = []

    # NaN is not 0, so it counts as signal here. More than 5 s of zeros is no padding (`read_record`) but twelve flat leads.
    body = SAMPLES - int(np.argmax((ecg != 0).any(axis=0)[::-1]))
    if MIN_SAMPLES <= body < SAMPLES:
        flags.append("padded")
    else:
        body = SAMPLES

    if not np.isfinite(ecg).all():
        ecg = _interpolate(ecg, body)
        flags.append("nan_interpolated")
    signal = ecg[:, :body]

    largest = np.abs(signal).max(axis=1)
    if largest.max() > IMPOSSIBLE_AMPLITUDE:
        where = f"lead {LEADS[largest.argmax()]} reaches {largest.max():.4g} mV"
        raise RecordError("amplitude", f"{where}, over {IMPOSSIBLE_AMPLITUDE:g}: a unit error?")
    if largest.max() > HIGH_AMPLITUDE:
        flags.append("high_amplitude")

    middle = slice(FLAT_WINDOW // 2, body - FLAT_WINDOW // 2 + 1)  # only windows that lie wholly inside
    span = (maximum_filter1d(signal, FLAT_WINDOW, axis=1) - minimum_filter1d(signal, FLAT_WINDOW, axis=1))[:, middle].min(axis=1)
    if span.min() < FLAT_RANGE:
        raise RecordError("flat_lead", f"lead {', '.join(LEADS[i] for i in np.flatnonzero(span < FLAT_RANGE))} is flat for 5 s or more")

    if _saturated(signal):
        flags.append("saturated")
    return ecg, sorted(flags)


def _interpolate(ecg: np.ndarray, body: int) -> np.ndarray:
    """A copy of `ecg` without its NaN runs, none of which may be longer than NAN_RUN; samples from `body` on are padding."""
    if np.isinf(ecg).any():
        raise RecordError("nan", "infinite values")
    ecg = ecg.copy()
    at = np.arange(body)
    for lead in np.flatnonzero(np.isnan(ecg).any(axis=1)):
        bad = np.isnan(ecg[lead, :body])
        longest = int(_run_lengths(bad).max())
        if longest > NAN_RUN:
            raise RecordError("nan", f"lead {LEADS[lead]} lacks {longest} samples in a row, over {NAN_RUN}")
        ecg[lead, :body][bad] = np.interp(at[bad], at[~bad], ecg[lead, :body][~bad])
    return ecg


def _saturated(signal: np.ndarray) -> bool:
    """Whether a lead holds its extreme. Runs at the record's ends do not count: PTB-XL holds the last value for about 55 samples."""
    median = np.median(signal, axis=1, keepdims=True)
    for extreme in (signal.max(axis=1, keepdims=True), signal.min(axis=1, keepdims=True)):
        for lead in np.flatnonzero(np.abs(extreme - median) >= SATURATED_FROM):
            inside = signal[lead] == extreme[lead]
            inside[: np.argmin(inside)] = False
            inside[len(inside) - np.argmin(inside[::-1]) :] = False
            if inside.any() and _run_lengths(inside).max() >= SATURATED_RUN:
                return True
    return False


def _run_lengths(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True in a boolean [n], in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    return edges[1::2] - edges[::2]
