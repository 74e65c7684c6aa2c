"""Any record into the canonical ECG: float32 [12, 5000], mV, 500 Hz, 10 s, leads by name.

    from toolkit.ecg.records import read_record, windows
    ecg = read_record("ptbxl/records500/00000/00001_hr")
    for start in windows("holter/a01", "all"): ecg = read_record("holter/a01", start)

A 10 s record of 500 Hz in format 16 takes 0.15 ms, where wfdb.rdsamp takes 4.2; in FLAC 1.9 (6.4); one of 100 Hz 0.9 (4.0).
"""

import errno
import functools
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np

from toolkit.ecg.bare_arrays import open_array
from toolkit.ecg.leads import DURATION, LEADS, SAMPLES, SAMPLING_RATE
from toolkit.ecg.opened import Opened, RecordError
from toolkit.ecg.saturation import saturated
from toolkit.ecg.wfdb_files import open_wfdb

MIN_SAMPLES = SAMPLES // 2  # 5 s: about five beats; below that a 10 s canonical ECG would be mostly padding
LONGEST = 31 * 86_400  # s: a month of Holter; a header that states more is damaged, and its windows would fill the memory
RATES = (25, 100_000)  # Hz: below, no QRS complex is left; above, a header is damaged


def read_record(path: str | Path, start: float = 0.0, array: str = "") -> np.ndarray:
    """The 10 s from `start` (seconds; the nearest sample at 500 Hz) of the record at `path` as float32 [12, 5000] in mV.

    `path`: a WFDB record without extension (`.hea`, `.dat`, `.mat` are tolerated), or, where `array` describes it, a bare array `.npy` or
    `.mat` (see `bare_arrays.open_array`).

    - Leads come by name, in any order and case; leads beyond the twelve are ignored (`opened.canonical`).
    - V, mV, uV and nV become mV. `NU` (z-scored upstream) is taken as it is.
    - Other sampling rates are resampled to 500 Hz by a polyphase filter, which sees the real samples on both sides of the window.
    - Only the window is read, however long the record. Where 5 s to 10 s are left: zeros at the end, which is the isoelectric line, and
      which `quality.check` recognises (flag `padded`); holding the last value would stretch whatever wave it cuts.
    - Samples the file marks invalid and gaps are NaN and stay NaN: `quality.check` decides.

    Raises `RecordError` with reason `absent` (no file), `unreadable` (truncated, malformed, header and data disagree), `unit`, `missing_lead` or
    `too_short` (under 5 s from `start`). An error of the machine (input/output, network, permission, open files) is raised as the OSError it is.
    """
    ecg, missing, _ = read_leads(path, start, array)
    if missing:
        raise missing_lead(missing)
    return ecg


def read_leads(path: str | Path, start: float = 0.0, array: str = "") -> tuple[np.ndarray, list[str], list[int]]:
    """As `read_record`, but leads that the record lacks are zeros and come back by name; without any of the twelve it is an error.

    Last, the rows that were saturated before they were resampled (none where nothing was).
    """
    path, held = str(path), []
    try:
        record = _open(path, array)
        ratio = _ratio(record.rate)
        begin = _begin(start)
        left = record.samples * ratio - begin  # at 500 Hz
        if left < MIN_SAMPLES:
            raise RecordError("too_short", f"{max(float(left), 0) / SAMPLING_RATE:.2f} s, at least {MIN_SAMPLES // SAMPLING_RATE} s are needed")
        if ratio == 1:
            signal, missing = record.read(begin, min(begin + SAMPLES, record.samples))
        else:
            # The filter's reach on both sides, and a first sample that falls on one at 500 Hz, so that the phase is that of the whole record.
            reach = math.ceil(10 * max(1, 1 / ratio)) + 1
            first = max(0, (math.floor(begin / ratio) - reach) // ratio.denominator * ratio.denominator)
            last = min(record.samples, math.ceil((begin + SAMPLES) / ratio) + reach)
            signal, missing = record.read(first, last)
            held = saturated(signal, record.rate)
            signal = _resample(signal, ratio)[:, begin - int(first * ratio) :][:, :SAMPLES]
    except Exception as error:
        if fault := _fault(error):
            raise fault from error
        raise
    if len(missing) == len(LEADS):
        raise missing_lead(missing)
    if signal.shape[1] == SAMPLES:
        return np.ascontiguousarray(signal), missing, held
    ecg = np.zeros((len(LEADS), SAMPLES), np.float32)
    ecg[:, : signal.shape[1]] = signal
    return ecg, missing, held


def windows(path: str | Path, which: str, array: str = "") -> list[float]:
    """Where the 10 s windows of a record start, in seconds, from its header alone: what `read_record` takes as `start`.

    "first": [0.0]. "middle": the 10 s in the centre. "all": one after another without overlap; a last one of 5 s or more is kept (and
    padded), a shorter one is not. A record of under 10 s has one window, [0.0]. Raises `RecordError("unreadable")`.
    """
    assert which in ("first", "middle", "all"), which
    path = str(path)
    try:
        record = _open(path, array)
        samples = math.floor(record.samples * _ratio(record.rate))  # at 500 Hz
    except Exception as error:
        if fault := _fault(error):
            raise fault from error
        raise
    if samples > LONGEST * SAMPLING_RATE:
        raise RecordError("unreadable", f"its header states {samples / SAMPLING_RATE / 86400:.0f} days")
    if which == "first" or samples < SAMPLES:
        return [0.0]
    if which == "middle":
        return [(samples - SAMPLES) // 2 / SAMPLING_RATE]
    full, rest = divmod(samples, SAMPLES)
    return [float(DURATION * i) for i in range(full + (rest >= MIN_SAMPLES))]


def missing_lead(missing: list[str]) -> RecordError:
    return RecordError("missing_lead", f"no lead {', '.join(missing)}")


def _open(path: str, array: str) -> Opened:
    if array:
        return open_array(path, array)
    return open_wfdb(re.sub(r"\.(hea|dat|mat)$", "", path))


def _begin(start: float) -> int:
    """`start` in samples at 500 Hz."""
    if not 0 <= start < 1e9:  # also NaN
        raise RecordError("unreadable", f"a window cannot start at {start} s")
    return round(start * SAMPLING_RATE)


def _fault(error: Exception) -> RecordError | None:
    """What an error while reading says of the record; None where it is the machine's (or says so itself).

    On purpose wide: damaged files make wfdb, numpy and soundfile raise IndexError, ValueError, MemoryError, LibsndfileError, ... Only the kind
    is told: file names may be patients' names, and the texts of other libraries hold paths, dates and pieces of the file.
    """
    if isinstance(error, RecordError):
        return None
    number = getattr(error, "errno", None)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return RecordError("absent", "a file of the record is not there")
    if number is not None and number not in (errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG):  # EIO, ESTALE, EACCES, EMFILE, ...
        return None
    return RecordError("unreadable", type(error).__name__)


@functools.lru_cache(maxsize=1000)
def _ratio(rate: float) -> Fraction:
    """500 Hz over `rate`, exact for two decimals up to 500 Hz. The limit keeps the filter under a million taps."""
    if not RATES[0] <= rate <= RATES[1]:
        raise RecordError("unreadable", f"a sampling rate of {rate:g} Hz")
    return (SAMPLING_RATE / Fraction(rate)).limit_denominator(int(100 * min(rate, SAMPLING_RATE)))


def _resample(signal: np.ndarray, ratio: Fraction) -> np.ndarray:
    """`signal` [leads, n] at `ratio` times its rate. A NaN stays where it was: the filter, 20 input samples wide, would spread it."""
    from scipy.signal import resample_poly  # here: 0.7 s of every worker's start

    bad = np.isnan(signal)
    at = np.arange(signal.shape[1])
    whole = signal.astype(np.float64)
    for lead in np.flatnonzero(bad.any(axis=1)):
        good = ~bad[lead]
        whole[lead] = np.interp(at, at[good], signal[lead, good]) if good.any() else 0.0
    up, down = ratio.numerator, ratio.denominator
    # Ends held: zeros beyond them, the default, would pull a lead with an offset towards 0 within 10 samples of either end.
    out = resample_poly(whole, up, down, axis=1, padtype="edge").astype(np.float32)
    if bad.any():
        nearest = np.minimum(np.rint(np.arange(out.shape[1]) / float(ratio)).astype(int), signal.shape[1] - 1)
        out[bad[:, nearest]] = np.nan
    return out
