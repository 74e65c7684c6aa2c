"""The quality rule: which canonical ECGs are used, which are mended, which are quarantined and why.

    ecg, flags = read_checked("ptbxl/records500/00000/00001_hr")

The thresholds were set on real records (PTB-XL 85 in mV and 1,625 z-scored, Georgia 73, Ningbo 85): they quarantine 6 of 1,868, all with a
lead that is constant for 10 s, and flag 63 as `high_amplitude`; none is saturated. An ECG takes 0.12 ms.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE
from toolkit.ecg.records import MIN_SAMPLES, RecordError, missing_lead, read_leads
from toolkit.ecg.saturation import run_lengths, saturated

NAN_RUN = 50  # samples, 100 ms: about one QRS complex. A straight line over more than that would invent or erase a beat
FLAT_WINDOW = 5 * SAMPLING_RATE  # 5 s without a beat at all; the longest constant run in a sane record is 1.4 s
FLAT_RANGE = 0.005  # mV, five steps of PTB-XL's 1 uV: resampling a constant lead leaves ripple. The smallest sane lead spans 0.11 mV
HIGH_AMPLITUDE = 10.0  # mV: pacing spikes and artefacts reach 12.5 mV, and 18.7 SD in z-scored records
IMPOSSIBLE_AMPLITUDE = 50.0  # mV: a unit error. 16 bits at 1 uV end at 33 mV; uV taken for mV makes 1,000
UNUSABLE_AMPLITUDE = 1e6  # mV: no recording at all, and near float32's end (3e38) a mean overflows to NaN


def read_checked(path: str | Path, start: float = 0.0, array: str = "", qc: str = "drop") -> tuple[np.ndarray, list[str]]:
    """`read_record` and `check`: float32 [12, 5000] in mV, finite, and its flags, sorted.

    Raises `RecordError` with the reasons of both. With `qc` "flag", `missing_lead`, `flat_lead`, `saturated` and `amplitude` are flags
    instead; a missing lead is zeros. A record without any of the twelve leads is an error under both.
    """
    ecg, missing, held = read_leads(path, start, array)
    return check(ecg, missing, qc, held)


def check(ecg: np.ndarray, missing: Sequence[str] = (), qc: str = "drop", saturated_before: Sequence[int] = ()) -> tuple[np.ndarray, list[str]]:
    """`ecg` float32 [12, 5000] in mV, mended where that is honest, and its flags, sorted. What is returned is finite.

    Flags: `nan_interpolated` (runs of up to 100 ms replaced by straight lines, at the ends by the nearest value), `padded` (the last
    samples, at most 5 s, are 0 in all leads), `high_amplitude` (over 10 mV).

    Defects: `missing_lead` (those named in `missing`, zeros in `ecg`), `amplitude` (over 50 mV), `flat_lead` (a lead that is there lies
    within 5 uV for 5 s), `saturated` (a lead sits at its extreme for 40 ms or more, or did before it was resampled: the rows in
    `saturated_before`). With `qc` "drop" the first of them in this order is raised as `RecordError`, with "flag" all are flags.

    Raises `RecordError` with reason `nan` (a longer run, or an infinity) or `amplitude` (over 1e6 mV) under both.
    """
    assert ecg.shape == (len(LEADS), SAMPLES), ecg.shape
    assert qc in ("drop", "flag"), qc
    flags = []

    def defect(error: RecordError) -> None:
        if qc == "drop":
            raise error
        flags.append(error.reason)

    if missing:
        defect(missing_lead(missing))

    body = SAMPLES
    if not ecg[:, -1].any():
        # NaN is not 0, so it counts as signal here. More than 5 s of zeros is no padding (`read_record`) but twelve flat leads.
        body -= int(np.argmax((ecg != 0).any(axis=0)[::-1]))
        if MIN_SAMPLES <= body < SAMPLES:
            flags.append("padded")
        else:
            body = SAMPLES

    if not np.isfinite(ecg).all():
        ecg = _interpolate(ecg, body)
        flags.append("nan_interpolated")
    signal = ecg[:, :body]

    top, bottom = signal.max(axis=1), signal.min(axis=1)
    largest = np.maximum(top, -bottom)
    if largest.max() > IMPOSSIBLE_AMPLITUDE:
        where = f"lead {LEADS[largest.argmax()]} reaches {largest.max():.4g} mV"
        error = RecordError("amplitude", f"{where}, over {IMPOSSIBLE_AMPLITUDE:g}: a unit error?")
        if largest.max() > UNUSABLE_AMPLITUDE:
            raise error
        defect(error)
    elif largest.max() > HIGH_AMPLITUDE:
        flags.append("high_amplitude")

    flat = [LEADS[i] for i in _flat(signal) if LEADS[i] not in missing]
    if flat:
        defect(RecordError("flat_lead", f"lead {', '.join(flat)} is flat for 5 s or more"))

    held = sorted({*saturated(signal, SAMPLING_RATE), *saturated_before})
    if held:
        defect(RecordError("saturated", f"lead {', '.join(LEADS[i] for i in held)} sits at its extreme for 40 ms or more"))
    return ecg, sorted(flags)


def _flat(signal: np.ndarray) -> list[int]:
    """Leads with a window of FLAT_WINDOW samples within FLAT_RANGE."""
    # Every such window holds one of the blocks of half its length whole: where no block is flat, and that is nearly always, no window is.
    half = FLAT_WINDOW // 2
    blocks = signal[:, : signal.shape[1] // half * half].reshape(len(signal), -1, half)
    suspects = np.flatnonzero((blocks.max(axis=2) - blocks.min(axis=2) < FLAT_RANGE).any(axis=1))
    if not len(suspects):
        return []
    from scipy.ndimage import maximum_filter1d, minimum_filter1d  # here: 0.4 s of every worker's start

    middle = slice(half, signal.shape[1] - half + 1)  # only windows that lie wholly inside
    signal = signal[suspects]
    span = (maximum_filter1d(signal, FLAT_WINDOW, axis=1) - minimum_filter1d(signal, FLAT_WINDOW, axis=1))[:, middle].min(axis=1)
    return suspects[span < FLAT_RANGE].tolist()


def _interpolate(ecg: np.ndarray, body: int) -> np.ndarray:
    """A copy of `ecg` without its NaN runs, none of which may be longer than NAN_RUN; samples from `body` on are padding."""
    if np.isinf(ecg).any():
        raise RecordError("nan", "infinite values")
    ecg = ecg.copy()
    at = np.arange(body)
    for lead in np.flatnonzero(np.isnan(ecg).any(axis=1)):
        bad = np.isnan(ecg[lead, :body])
        longest = int(run_lengths(bad).max())
        if longest > NAN_RUN:
            raise RecordError("nan", f"lead {LEADS[lead]} lacks {longest} samples in a row, over {NAN_RUN}")
        ecg[lead, :body][bad] = np.interp(at[bad], at[~bad], ecg[lead, :body][~bad])
    return ecg
