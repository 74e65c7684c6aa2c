"""A record as if it were live: its signal at the pace it was recorded, the newest token ids, and how long each took.

    python -m toolkit.tokenizer.streaming --tokenizer runs/demo/causal --record records500/00000/00017_hr
    python -m toolkit.tokenizer.streaming --tokenizer runs/demo/causal --record holter/a01 --speed 0 | head    # ids alone, as fast as it goes

In a terminal three leads scroll by over the ids. Into a pipe goes one line of ids a second of signal, and what else there is to say to stderr. A record
may be of any length; 10 s of it are in memory. Research software; not for monitoring a patient.
"""

import argparse
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from toolkit.ecg.bare_arrays import open_array
from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE
from toolkit.ecg.records import RecordError, read_record, windows
from toolkit.ecg.wfdb_files import open_wfdb
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.tokenizer.normalise import LEFT, STRIDE
from toolkit.tokenizer.streaming import StreamingTokenizer, complete
from toolkit.tokenizer.tokenizer import ECGTokenizer

NOTE = "Research software; not for monitoring a patient."
DRAWN = ("II", "V1", "V5")
SHOWN = 5  # s of signal on the screen
REDRAW = 0.1  # s
LONGEST_CHUNK = 10_000  # ms
MENDS = {
    "absent": "give the path of a WFDB record without its extension, or of an array with --array",
    "unreadable": "download it again, or describe an array by --array",
    "unit": "state mV in its header",
    "missing_lead": "the tokenizer needs all twelve",
    "too_short": "give a longer one",
}
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # Unicode 2800: the bit of each of a character's 4 x 2 dots
# Latencies are counted in steps of 0.1 ms up to 10 s, so that a day of them takes no more memory than a minute.
STEPS_A_MS, LONGEST_MS = 10, 10_000


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError naming one that cannot be."""
    parser = argparse.ArgumentParser("python -m toolkit.tokenizer.streaming", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder written by launchers/train_tokenizer.py --causal true")
    parser.add_argument("--record", required=True, help="WFDB record without extension, or the .npy or .mat that --array describes")
    parser.add_argument("--array", default="", help='what a bare array cannot say: {"sampling_rate": 500, "unit": "mV", "leads": ["I", ...]}')
    parser.add_argument("--speed", type=float, default=1.0, help="times real time; 0: as fast as it goes (default: %(default)s)")
    parser.add_argument("--chunk", type=float, default=20.0, help="ms of signal a push (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.speed < math.inf:
        raise UserError(f"--speed {args.speed:g}: must be 0 (as fast as it goes) or above")
    if not 1000 / SAMPLING_RATE <= args.chunk <= LONGEST_CHUNK:
        raise UserError(f"--chunk {args.chunk:g}: must be from {1000 // SAMPLING_RATE} ms, one sample, to {LONGEST_CHUNK:,} ms")
    if args.record.endswith(".npy") and not args.array:
        raise UserError(f"--record {args.record}: an array cannot say its sampling rate, unit and leads; give them with --array")
    return args


def pieces(record: str, array: str) -> Iterator[np.ndarray]:
    """The whole record as float32 [12, n] mV at 500 Hz, 10 s at a time, gaps NaN. Raises UserError naming --record."""
    try:
        windows(record, "first", array)  # whether its header is sound
        opened = open_array(record, array) if array else open_wfdb(re.sub(r"\.(hea|dat|mat)$", "", record))
        samples = math.floor(opened.samples * SAMPLING_RATE / Fraction(opened.rate))
        for start in range(0, samples, SAMPLES):
            begin = max(min(start, samples - SAMPLES), 0)  # the last 10 s overlap the ones before: `read_record` takes no less than 5 s
            ecg = read_record(record, begin / SAMPLING_RATE, array)
            yield ecg[:, start - begin : samples - begin]
    except RecordError as error:
        raise UserError(f"--record {record}: {error.message}; {MENDS[error.reason]}") from error


def chunks(parts: Iterable[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """The same signal in stretches of so many samples; the last may be shorter."""
    rest = np.zeros((len(LEADS), 0), np.float32)
    for part in parts:
        rest = np.concatenate([rest, part], 1)
        whole = rest.shape[1] // samples * samples
        for start in range(0, whole, samples):
            yield rest[:, start : start + samples]
        rest = rest[:, whole:]
    if rest.shape[1]:
        yield rest


def played(stream: StreamingTokenizer, signals: Iterable[np.ndarray], speed: float, gaps: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(samples float32 [12, n], ids uint16 [k], latencies [k] in ms) of each stretch, at its time. Adds the samples without a value to gaps [12].

    A latency is from the moment a token's last sample would have come from the ECG machine, so the wait for the rest of its stretch is in it. At
    speed 0 there is no such moment, and it is the time of the push.
    """
    position, started = 0, 0.0
    for samples in signals:
        started = started or time.perf_counter()  # when the first are read, not before: a large file takes its time
        tokens = complete(position)
        position += samples.shape[1]
        bad = ~np.isfinite(samples)
        if bad.any():
            gaps += bad.sum(1)
            samples = np.where(bad, np.float32(0), samples)
        if speed:
            time.sleep(max(0.0, started + position / SAMPLING_RATE / speed - time.perf_counter()))
        since = time.perf_counter()
        ids = stream.push(samples)
        if speed:
            since = started + (STRIDE * np.arange(tokens + 1, tokens + len(ids) + 1) - LEFT) / SAMPLING_RATE / speed
        yield samples, ids, np.broadcast_to(1e3 * (time.perf_counter() - since), ids.shape)


def count(latencies: np.ndarray, counts: np.ndarray) -> None:
    np.add.at(counts, np.clip(latencies * STEPS_A_MS, 0, len(counts) - 1).astype(int), 1)


def quantile(counts: np.ndarray, q: float) -> float:
    """The latency in ms that a share q of the tokens stays below, to 0.1 ms upwards."""
    return float(np.searchsorted(counts.cumsum(), q * counts.sum()) + 1) / STEPS_A_MS if counts.any() else math.nan


def write_lines(stretches: Iterable[tuple]) -> Iterator[tuple]:
    """Pass on what `played` gives, and print one line of ids a second of signal, those of the tokens that end in it."""
    waiting, position, second = [], 0, 0
    for stretch in stretches:
        position += stretch[0].shape[1]
        waiting += stretch[1].tolist()
        while position >= (second + 1) * SAMPLING_RATE:
            ready = complete((second + 1) * SAMPLING_RATE) - complete(second * SAMPLING_RATE)
            print(*waiting[:ready], flush=True)
            waiting, second = waiting[ready:], second + 1
        yield stretch
    if waiting:
        print(*waiting, flush=True)


def draw(stretches: Iterable[tuple], counts: np.ndarray, gaps: np.ndarray, speed: float) -> Iterator[tuple]:
    """Pass on what `played` gives, and keep a picture of it on the terminal's other screen, so that this one is as it was before."""
    rows, position, tokens, ids, last = [LEADS.index(lead) for lead in DRAWN], 0, 0, [], math.nan
    shown, drawn = np.zeros((len(rows), 0), np.float32), -math.inf

    def picture() -> str:
        latency = f"latency {last:.1f} ms, p99 {quantile(counts, 0.99):.1f}"
        return "".join(f"{line}\x1b[K\n" for line in frame(shown, position, tokens, ids, latency, gaps, speed))

    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        for stretch in stretches:
            samples, new, latencies = stretch
            shown = np.concatenate([shown, samples[rows]], 1)[:, -SHOWN * SAMPLING_RATE :]
            position, tokens, ids = position + samples.shape[1], tokens + len(new), (ids + new.tolist())[-500:]
            last = float(latencies[-1]) if len(new) else last
            yield stretch
            if time.perf_counter() - drawn >= REDRAW:
                drawn = time.perf_counter()
                sys.stdout.write(f"\x1b[H{picture()}\x1b[J")
                sys.stdout.flush()
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l" + (picture() if position else ""))
        sys.stdout.flush()


def frame(shown: np.ndarray, position: int, tokens: int, ids: list[int], latency: str, gaps: np.ndarray, speed: float) -> list[str]:
    """The picture as lines that fit the terminal."""
    width, height = shutil.get_terminal_size()
    minutes, seconds = divmod(position / SAMPLING_RATE, 60)
    pace = f"{speed:g} x" if speed else "as fast as it goes"
    lines = [f"{int(minutes):02d}:{seconds:04.1f}  {tokens:,} tokens  {latency}  ({pace})"]
    for lead, trace in zip(DRAWN, shown):
        label = f"{lead:<3}{np.ptp(trace):>5.1f} mV "
        plot = braille(trace, position, width - len(label) - 1, max(1, min(5, (height - 5) // len(DRAWN))))
        lines += [(label if row == len(plot) // 2 else " " * len(label)) + text for row, text in enumerate(plot)]
    lines.append("ids " + "".join(f"{i:>6}" for i in ids[-((width - 5) // 6) :]).rjust(width - 5))
    lines.append(missing(gaps) or NOTE)
    return [line[: width - 1] for line in lines[: height - 1]]


def braille(trace: np.ndarray, position: int, width: int, rows: int) -> list[str]:
    """`trace` [n], which ends at sample `position` of the stream, as `rows` lines of `width` characters, the newest at the right.

    A column of dots spans from the lowest to the highest of its samples and up to the column before. Columns begin at multiples of their length in
    the stream, not in the trace: as the trace moves on, each keeps its height instead of flickering.
    """
    width = max(width, 1)
    a_column = -(-SHOWN * SAMPLING_RATE // (2 * width))
    whole = trace[: len(trace) - position % a_column]
    columns = whole[len(whole) % a_column :].reshape(-1, a_column)[-2 * width :]
    dots = np.zeros((4 * rows, 2 * width), bool)
    if len(columns):
        middle, half = (trace.max() + trace.min()) / 2, max(np.ptp(trace) / 2, 0.25)  # 0.5 mV at least: the noise of a flat lead should look flat
        level = np.rint((1 - (columns - middle) / half) / 2 * (4 * rows - 1)).astype(int)  # 0: the top
        top, bottom = level.min(1), level.max(1)
        top[1:], bottom[1:] = np.minimum(top[1:], bottom[:-1]), np.maximum(bottom[1:], top[:-1])
        row = np.arange(4 * rows)[:, None]
        dots[:, -len(columns) :] = (row >= top) & (row <= bottom)
    codes = (dots.reshape(rows, 4, width, 2) * BRAILLE[:, None]).sum((1, 3)) + 0x2800
    return ["".join(map(chr, line)) for line in codes]


def missing(gaps: np.ndarray) -> str:
    """What is said of samples without a value; nothing where there are none."""
    return "samples without a value, taken as 0: " + ", ".join(f"{lead} {n:,}" for lead, n in zip(LEADS, gaps) if n) if gaps.any() else ""


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Show a record live; exits with 130 on Ctrl-C, after the summary."""
    args = parse(argv)
    torch.set_num_threads(1)  # a second thread gains nothing on 15 tokens
    stream = StreamingTokenizer(ECGTokenizer.from_pretrained(args.tokenizer))
    counts, gaps, samples = np.zeros(LONGEST_MS * STEPS_A_MS, np.int64), np.zeros(len(LEADS), np.int64), 0
    signals = chunks(pieces(args.record, args.array), round(args.chunk * SAMPLING_RATE / 1000))
    stretches = played(stream, signals, args.speed, gaps)
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `timeout` ends it: the terminal gets its screen back all the same
        stretches = draw(stretches, counts, gaps, args.speed)
    else:
        stretches = write_lines(stretches)
    interrupted = False
    try:
        for stretch in stretches:
            samples += stretch[0].shape[1]
            count(stretch[2], counts)
    except KeyboardInterrupt:
        interrupted = True
    took = f", latency p50 {quantile(counts, 0.5):.1f} ms, p99 {quantile(counts, 0.99):.1f} ms" if counts.any() else ""
    said = [f"{samples / SAMPLING_RATE:.1f} s of signal, {counts.sum():,} tokens{took}", missing(gaps), NOTE]
    print(". ".join(filter(None, said)), file=sys.stderr)
    if interrupted:
        sys.exit(130)
