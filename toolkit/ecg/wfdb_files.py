"""WFDB records: the forms ECG datasets come in are read here, every other one by the `wfdb` package, with the same samples.

Read here: formats 16 and 212, and FLAC (508, 516, 524), in one or several files, with a byte offset (CinC's `.mat` are `16+24`). The
package spends 3.5 ms of a record's 4 on the header (regular expressions and a table look-up for every field).

Formats: https://physionet.org/physiotools/wag/header-5.htm and signal-5.htm.
"""

import itertools
import math
import os
import re
from typing import NamedTuple

import numpy as np

from toolkit.ecg.leads import LEADS
from toolkit.ecg.opened import Opened, RecordError, canonical

INVALID = {"16": -(2**15), "212": -(2**11), "508": -(2**7), "516": -(2**15), "524": -(2**23)}  # a sample that was not measured
FLAC = {"PCM_S8": (8, "int16", 8), "PCM_16": (16, "int16", 0), "PCM_24": (24, "int32", 8)}  # bits, read as, libsndfile's shift to the left

# NAME[/SEGMENTS] SIGNALS [RATE[/COUNTER[(BASE)]] [SAMPLES [time and date, unused]]]. The limits keep absurd headers from filling the memory.
RECORD_LINE = re.compile(
    r"[-\w]+ (?P<segments>/\d+)? [ \t]+ (?P<signals>\d{1,3})"
    r"(?: [ \t]+ (?P<rate>\d{1,9}(?:\.\d*)?) (?:/-?[\d.]+(?:\(-?[\d.]+\))?)? (?: [ \t]+ (?P<samples>\d{1,15}) (?:[ \t].*)? )? )?",
    re.VERBOSE | re.ASCII,
)
# FILE FORMAT[x1][:0][+OFFSET] [GAIN[(BASELINE)][/UNIT] [RESOLUTION [ZERO [FIRST VALUE [CHECKSUM [BLOCK [NAME]]]]]]]. More samples a frame than one (x), a
# skew (:) other than 0 and everything else do not match. A file name has no place for a path.
SIGNAL_LINE = re.compile(
    r"(?P<file>[-\w]+\.?\w*) [ \t]+ (?P<format>\d+) (?:x1)? (?::0)? (?:\+(?P<offset>\d{1,15}))?"
    r"(?: [ \t]+ (?P<gain>-?\d{1,9}(?:\.\d{0,20})?(?:e[+-]?0?\d)?) (?:\((?P<baseline>-?\d{1,9})\))? (?:/(?P<unit>[\w^?%/µμ-]+))?"
    r"(?: [ \t]+ \d+ (?: [ \t]+ (?P<zero>-?\d{1,9}) (?: [ \t]+ -?\d+ (?: [ \t]+ -?\d+ (?: [ \t]+ \d+ (?: [ \t]+ (?P<name>[^\t\v\f]*)"
    r")?)?)?)?)?)?)?",
    re.VERBOSE | re.ASCII,
)


class SignalFile(NamedTuple):
    """One file and the signals in it, which are the header's from `first` on, with their `gain` and `baseline`."""

    path: str
    format: str
    offset: int  # bytes; frames in FLAC
    first: int
    signals: int
    gain: list[float]
    baseline: list[int]


def open_wfdb(name: str) -> Opened:
    """The record `name` (a path without extension). Its header is read, its signals are not.

    Raises `RecordError("unreadable")`, or any other error where a file is damaged, also while reading. Header and files must agree: another
    number of signal lines than the header states, or a file shorter or longer than it, is unreadable, because with a wrong number of
    signals the leads would be interleaved into something that may still look like an ECG. (`wfdb` reads a longer file without a word.)
    """
    with open(name + ".hea", "rb") as file:
        content = file.read()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = [line for line in map(str.strip, text.splitlines()) if line and line[0] != "#"]
    about = RECORD_LINE.fullmatch(lines[0]) if lines else None
    if about is None:
        raise RecordError("unreadable", "malformed header: its first line is not that of a record")
    rate, samples = float(about["rate"] or 250), int(about["samples"] or 0)  # defaults of the format: 250 Hz, length by the file's
    if about["segments"]:
        return _open_with_wfdb(name, rate, samples)
    if len(lines) - 1 != int(about["signals"]):
        raise RecordError("unreadable", f"the header describes {len(lines) - 1} signals and states {int(about['signals'])}")
    matches = [SIGNAL_LINE.fullmatch(line) for line in lines[1:]]
    files = None if None in matches else _files(os.path.dirname(name), matches)
    if not files:
        # Format 8 stores differences, from which the package gets a window right only by reading from the beginning.
        differences = any(re.match(r"\S+\s+8\b", line) for line in lines[1:])
        return _open_with_wfdb(name, rate, 0 if differences else samples)

    samples = samples or _samples(files[0])
    names, units = tuple(match["name"] or "" for match in matches), tuple(match["unit"] or "mV" for match in matches)
    return Opened(rate, samples, lambda first, last: _read(files, names, units, samples, first, last))


def _files(folder: str, matches: list[re.Match]) -> list[SignalFile] | None:
    """The signal files of matched signal lines, or None where they are not of the kinds read here."""
    files, first = [], 0
    for file, group in itertools.groupby(matches, lambda match: match["file"]):
        group = list(group)
        if len({(match["format"], match["offset"]) for match in group}) > 1 or group[0]["format"] not in INVALID:
            return None
        gain = [float(match["gain"] or 200) or 200.0 for match in group]  # absent or 0: the format's default
        baseline = [int(match["baseline"] or match["zero"] or 0) for match in group]
        files.append(SignalFile(os.path.join(folder, file), group[0]["format"], int(group[0]["offset"] or 0), first, len(group), gain, baseline))
        first += len(group)
    return files if len({file.path for file in files}) == len(files) else None


def _samples(file: SignalFile) -> int:
    """Length of a record whose header does not state it."""
    if file.format not in ("16", "212"):
        raise RecordError("unreadable", "the header states no length")
    return int((os.path.getsize(file.path) - file.offset) / ({"16": 2, "212": 1.5}[file.format] * file.signals))


def _read(files: list[SignalFile], names: tuple, units: tuple, samples: int, first: int, last: int) -> tuple[np.ndarray, list[str]]:
    """`Opened.read`: float32 of (digital - baseline) / gain, which wfdb computes in float64, to the last bit."""
    found, missing = canonical(names, units)
    out = (np.zeros if missing else np.empty)((len(LEADS), last - first), np.float32)
    for file in files:
        digital = (_flac if file.format in ("508", "516", "524") else _212 if file.format == "212" else _16)(file, samples, first, last)
        any_invalid = digital.min(initial=0) == INVALID[file.format]
        # Lead by lead: no second array of the record's size, which the allocator would fetch from the system each time (150 us, not 350).
        for row, i, scale in found:
            column = i - file.first
            if not 0 <= column < file.signals:
                continue
            lead, gain, baseline = out[row], file.gain[column], file.baseline[column]
            if scale == 1 and abs(baseline) <= 2**23 and float(np.float32(gain)) == gain:
                # All exact in float32, and its quotient of two float32 numbers is the float64 quotient rounded (53 bits are over 2 * 24 + 2).
                lead[:] = digital[:, column]
                if baseline:
                    lead -= baseline
                lead /= gain
            else:
                lead[:] = (digital[:, column] - np.float64(baseline)) / gain * scale
            if any_invalid:
                lead[digital[:, column] == INVALID[file.format]] = np.nan
    return out, missing


def _bytes(file: SignalFile, least: int, most: int, start: int, count: int) -> bytes:
    """`count` bytes from `start` (the offset not counted) of a file that must hold `least` to `most`."""
    with open(file.path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size - file.offset
        if not least <= size <= most:
            raise RecordError("unreadable", f"a signal file is {'shorter' if size < least else 'longer'} than the header states")
        stream.seek(file.offset + start)
        return stream.read(count)


def _16(file: SignalFile, samples: int, first: int, last: int) -> np.ndarray:
    """Digital samples [n, signals]: little-endian 16-bit."""
    frame = 2 * file.signals
    content = _bytes(file, samples * frame, samples * frame, first * frame, (last - first) * frame)
    return np.frombuffer(content, "<i2").reshape(-1, file.signals)


def _212(file: SignalFile, samples: int, first: int, last: int) -> np.ndarray:
    """Digital samples [n, signals]: two of 12 bits in three bytes. An odd one at the end has two bytes or three."""
    total, begin, end = samples * file.signals, first * file.signals, last * file.signals
    pair = begin // 2
    size = math.ceil(total * 1.5)
    content = _bytes(file, size, size + total % 2, pair * 3, math.ceil(end / 2) * 3 - pair * 3)
    low, middle, high = np.frombuffer(content + bytes(-len(content) % 3), np.uint8).reshape(-1, 3).T.astype(np.int16)
    both = np.stack([low | (middle & 0x0F) << 8, high | (middle & 0xF0) << 4], axis=1).ravel()
    both = (both ^ 0x800) - 0x800  # two's complement
    return both[begin - 2 * pair :][: end - begin].reshape(-1, file.signals)


def _flac(file: SignalFile, samples: int, first: int, last: int) -> np.ndarray:
    """Digital samples [n, signals] of a FLAC stream with at most the format's bits."""
    import soundfile

    with soundfile.SoundFile(file.path) as stream:
        bits, dtype, shift = FLAC[stream.subtype]
        if stream.format != "FLAC" or bits > int(file.format) - 500 or (stream.channels, stream.frames) != (file.signals, samples + file.offset):
            raise RecordError("unreadable", "a FLAC file does not have the channels, length or bits that the header states")
        stream.seek(first + file.offset)
        digital = stream.read(last - first, dtype=dtype, always_2d=True) >> shift
    if len(digital) != last - first:
        raise RecordError("unreadable", "a FLAC file ends early")
    return digital


def _open_with_wfdb(name: str, rate: float, samples: int) -> Opened:
    """The same by the package: multi-segment records (gaps are NaN), skew, several samples a frame, rare formats, odd headers.

    Without `samples` the whole record is read.
    """

    def read(first: int, last: int | None) -> tuple[np.ndarray, list[str]]:
        import wfdb  # here, as scipy elsewhere: 0.4 s of every worker's start, which most datasets never need

        record = wfdb.rdrecord(name, sampfrom=first, sampto=last)
        found, missing = canonical(tuple(n or "" for n in record.sig_name), tuple(unit or "" for unit in record.units))
        out = np.zeros((len(LEADS), len(record.p_signal)), np.float32)
        for row, i, scale in found:
            out[row] = record.p_signal[:, i] * scale
        return out, missing

    if samples:
        return Opened(rate, samples, read)
    whole, missing = read(0, None)  # only the package knows the length
    return Opened(rate, whole.shape[1], lambda first, last: (whole[:, first:last], missing))
