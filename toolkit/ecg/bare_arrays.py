"""Bare arrays, `.npy` and `.mat`: signals without a header, described by the manifest's `array` column."""

import json

import numpy as np

from toolkit.ecg.leads import LEADS
from toolkit.ecg.opened import Opened, RecordError, canonical


def open_array(path: str, array: str) -> Opened:
    """The array in `path`, described by `array`, a JSON object {"sampling_rate": Hz, "unit": "mV", "leads": ["I", ...]}.

    `.npy` is memory-mapped and never unpickled. `.mat` is MATLAB's version 4 or 5: the variable `val`, else the only numeric one that fits.
    [leads, n] or [n, leads]; where both sides are as long as `leads`, the first is meant. Integers are in the stated unit, as floats are.

    Raises `RecordError("unreadable")`, or any other error where the file is damaged.
    """
    try:
        about = json.loads(array)
        rate, unit, leads = float(about["sampling_rate"]), about["unit"], about["leads"]
        if not (isinstance(unit, str) and isinstance(leads, list) and leads and all(isinstance(lead, str) for lead in leads)):
            raise TypeError
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise RecordError("unreadable", 'an array needs {"sampling_rate": Hz, "unit": "mV", "leads": ["I", ...]}') from error

    signal = np.load(path, mmap_mode="r", allow_pickle=False) if path.endswith(".npy") else _matlab(path, len(leads))
    if not _fits(signal, len(leads)):
        raise RecordError("unreadable", f"no numeric array [{len(leads)}, n] or [n, {len(leads)}] as its description says")
    if signal.shape[0] != len(leads):
        signal = signal.T
    found, missing = canonical(tuple(leads), (unit,) * len(leads))

    def read(first: int, last: int) -> tuple[np.ndarray, list[str]]:
        out = np.zeros((len(LEADS), last - first), np.float32)
        with np.errstate(over="ignore"):  # becomes an infinity, which the quality rule refuses
            for row, i, scale in found:
                out[row] = signal[i, first:last] * np.float64(scale)
        return out, missing

    return Opened(rate, signal.shape[1], read)


def _fits(value, leads: int) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind in "iuf" and leads in value.shape


def _matlab(path: str, leads: int) -> np.ndarray:
    from scipy.io import loadmat

    try:
        variables = loadmat(path)
    except NotImplementedError as error:
        raise RecordError("unreadable", "MATLAB 7.3 files are HDF5: save with -v7") from error
    if "val" in variables:
        return variables["val"]
    fitting = [value for value in variables.values() if _fits(value, leads)]
    if len(fitting) != 1:
        raise RecordError("unreadable", f"{len(fitting)} variables could be the signal of {leads} leads, and none is called val")
    return fitting[0]
