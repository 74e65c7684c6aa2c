"""What every kind of record file is opened to, and what the kinds share: lead names, units, the error."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from toolkit.ecg.leads import LEADS, lead_order

MILLIVOLTS = {"": 1.0, "nu": 1.0, "v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}  # micro sign and Greek mu both occur
_PREFIX = re.compile(r"^(?:(?:e[ck]g|lead)[ _:]*)*")  # a hyphen stays: -II is II upside down
_SYNONYMS = {"di": "I", "dii": "II", "diii": "III"}  # Brazil, Spain, France (e.g. the CODE data)


class RecordError(Exception):
    """A record that cannot be used. `reason` is one word to count by, the message one line for people.

    The message names no folder (MIMIC-IV-ECG's hold patient numbers), no date and no text of the file.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both in args: the error crosses process boundaries by pickle
        self.reason, self.message = reason, message

    def __str__(self):
        return self.message


class Opened(NamedTuple):
    """A record whose header was read. `read(first, last)`: those samples as float32 [12, n] in mV at `rate`, and the leads it lacks (zeros)."""

    rate: float  # Hz
    samples: int
    read: Callable[[int, int], tuple[np.ndarray, list[str]]]


@functools.lru_cache(maxsize=1000)
def canonical(names: tuple[str, ...], units: tuple[str, ...]) -> tuple[list[tuple[int, int, float]], list[str]]:
    """(row of the canonical ECG, index in `names`, mV in a unit) of every lead there is, and the names of the missing ones.

    Names are taken in any case, with or without "ECG" and "Lead" before them ("Lead II", "ECG V1"); DI, DII, DIII are I, II, III. Nothing
    else is: MLII, for one, is recorded on the torso and is not II. Where a name occurs twice, the first counts. `NU` (z-scored upstream) is
    taken as it is. Raises `RecordError("unit")` for a unit that is neither V, mV, uV, nV nor that.
    """
    plain = [_PREFIX.sub("", name.strip().lower()) for name in names]
    order = lead_order([_SYNONYMS.get(name, name) for name in plain])
    if wrong := next((units[i] for i in order if i is not None and units[i].strip().lower() not in MILLIVOLTS), None):
        raise RecordError("unit", f"a unit of {len(wrong)} letters is none of V, mV, uV, nV and NU")
    found = [(row, i, MILLIVOLTS[units[i].strip().lower()]) for row, i in enumerate(order) if i is not None]
    return found, [lead for lead, i in zip(LEADS, order, strict=True) if i is None]
