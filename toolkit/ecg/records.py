"""Any WFDB record into the canonical ECG: float32 [12, 5000], mV, 500 Hz, 10 s, leads by name.

    from toolkit.ecg.records import read_record
    ecg = read_record("ptbxl/records500/00000/00001_hr")

Of a 10 s record's 5 ms (format 16; 9 ms FLAC), 4.5 ms is wfdb parsing the header: read it once, never with `rdheader` beforehand.
"""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import wfdb
from scipy.signal import resample_poly

from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE, lead_order

MIN_SAMPLES = SAMPLES // 2  # 5 s: about five beats; below that a 10 s canonical ECG would be mostly padding
MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}  # micro sign and Greek mu both occur


class RecordError(Exception):
    """A record that cannot be used. `reason` is one word to count by, the message one line for people."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both in args: the error crosses process boundaries by pickle
        self.reason, self.message = reason, message

    def __str__(self):
        return self.message


def read_record(path: str | Path) -> np.ndarray:
    """The record at `path` (no extension, as PTB-XL's `filename_hr`; `.hea`, `.dat`, `.mat` are tolerated) as float32 [12, 5000].

    - Leads come by name, in any order and case; leads beyond the twelve are ignored.
    - V, mV, uV and nV become mV. Other units (`NU`: z-scored upstream) are taken as they are.
    - Other sampling rates are resampled to 500 Hz by a polyphase filter.
    - Longer than 10 s: the first 10 s (the whole record is read: a 30 min one costs 45 MB). 5 s to 10 s: zeros at the end, which is the
      isoelectric line, and which `quality.check` recognises (flag `padded`); holding the last value would stretch whatever wave it cuts.
    - Samples the file marks invalid are NaN and stay NaN: `quality.check` decides.

    Raises `RecordError` with reason `unreadable` (no file, truncated, malformed), `missing_lead` or `too_short` (under 5 s).
    """
    name = re.sub(r"\.(hea|dat|mat)$", "", str(path))
    try:
        record = wfdb.rdrecord(name)
        signal, rate = record.p_signal.T, Fraction(record.fs).limit_denominator(100)
        names, units = [name or "" for name in record.sig_name], [(unit or "").strip().lower() for unit in record.units]
        ratio = SAMPLING_RATE / rate
    # On purpose wide: damaged files make wfdb and soundfile raise IndexError, ValueError, MemoryError, AttributeError, LibsndfileError, ...
    except Exception as error:
        raise RecordError("unreadable", f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    order = lead_order(names)
    missing = [lead for lead, i in zip(LEADS, order, strict=True) if i is None]
    if missing:
        raise RecordError("missing_lead", f"no lead {', '.join(missing)} among {', '.join(names)}")
    if signal.shape[1] * ratio < MIN_SAMPLES:
        raise RecordError("too_short", f"{float(signal.shape[1] / rate):.2f} s, at least {MIN_SAMPLES // SAMPLING_RATE} s are needed")

    scale = np.array([MILLIVOLTS.get(units[i], 1.0) for i in order])
    # One second more than needed: the filter then sees real samples beyond the cut.
    signal = signal[order, : int(11 * rate)] * scale[:, None]
    ecg = np.zeros((len(LEADS), SAMPLES), np.float32)
    resampled = _resample(signal, ratio)[:, :SAMPLES]
    ecg[:, : resampled.shape[1]] = resampled
    return ecg


def _resample(signal: np.ndarray, ratio: Fraction) -> np.ndarray:
    """`signal` [leads, n] at `ratio` times its rate. A NaN stays where it was: the filter, 20 input samples wide, would spread it."""
    if ratio == 1:
        return signal
    bad = np.isnan(signal)
    at = np.arange(signal.shape[1])
    whole = signal.copy()
    for lead in np.flatnonzero(bad.any(axis=1)):
        good = ~bad[lead]
        whole[lead] = np.interp(at, at[good], signal[lead, good]) if good.any() else 0.0
    # Ends held: zeros beyond them, the default, would pull a lead with an offset towards 0 within 10 samples of either end.
    out = resample_poly(whole, ratio.numerator, ratio.denominator, axis=1, padtype="edge")
    nearest = np.minimum(np.rint(np.arange(out.shape[1]) / float(ratio)).astype(int), signal.shape[1] - 1)
    out[bad[:, nearest]] = np.nan
    return out
