"""The live view from end to end: into a pipe, into a terminal, and with what cannot be shown."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.tokenizer.test_streaming import causal, minute, pushed
from toolkit.ecg.leads import LEADS
from toolkit.ecg.synthetic import write_record
from toolkit.tokenizer import live
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """tokenizer/, record `long` (22.3 s, its last window under 5 s) and the same as long.npy with a gap in V3."""
    folder = tmp_path_factory.mktemp("live")
    causal().save_pretrained(folder / "tokenizer")
    write_record(folder, "long", minute()[:, :11_150])
    signal = read_whole(folder)
    signal[LEADS.index("V3"), 6000:6100] = np.nan
    np.save(folder / "long.npy", signal)
    return folder


def read_whole(folder) -> np.ndarray:
    steps = np.fromfile(folder / "long.dat", "<i2").reshape(-1, 12).T
    return (steps / np.float64(1000)).astype(np.float32)


def run(capsys, *words) -> tuple[list[list[int]], str]:
    live.main(list(map(str, words)))
    out, err = capsys.readouterr()
    return [list(map(int, line.split())) for line in out.splitlines()], err


@pytest.mark.parametrize("chunk", [2, 20, 46, 10_000])
def test_the_whole_record_one_line_a_second(files, capsys, chunk):
    lines, err = run(capsys, "--tokenizer", files / "tokenizer", "--record", files / "long", "--speed", 0, "--chunk", chunk)
    np.testing.assert_array_equal(sum(lines, []), pushed(read_whole(files), []))
    ends = [sum(1 for k in range(697) if s <= (16 * k + 7) / 500 < s + 1) for s in range(23)]  # token k ends with sample 16 k + 7, from 0
    assert [len(line) for line in lines] == ends
    assert "22.3 s of signal, 697 tokens, latency p50" in err and "not for monitoring a patient" in err


def test_a_gap_is_0_and_said_once(files, capsys):
    about = '{"sampling_rate": 500, "unit": "mV", "leads": ' + str(list(LEADS)).replace("'", '"') + "}"
    lines, err = run(capsys, "--tokenizer", files / "tokenizer", "--record", files / "long.npy", "--array", about, "--speed", 0)
    signal = np.load(files / "long.npy")
    np.testing.assert_array_equal(sum(lines, []), pushed(np.where(np.isnan(signal), np.float32(0), signal), []))
    assert err.count("taken as 0: V3 100") == 1


def test_a_short_record_and_its_pace(files, capsys):
    write_record(files, "short", minute()[:, :2_600])
    started = time.perf_counter()
    lines, err = run(capsys, "--tokenizer", files / "tokenizer", "--record", files / "short.hea", "--speed", 10)
    assert time.perf_counter() - started > 0.52  # 5.2 s at ten times the pace: never faster
    assert len(sum(lines, [])) == 163 and "5.2 s of signal, 163 tokens" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--record", "none"], "--record none: .* without its extension"),
        (["--record", "long.npy"], "--array"),
        (["--record", "long", "--speed", "-1"], "--speed -1"),
        (["--record", "long", "--speed", "nan"], "--speed nan"),
        (["--record", "long", "--chunk", "1"], "--chunk 1"),
        (["--record", "long", "--tokenizer", "offline"], "--causal true"),
        (["--record", "two", "--speed", "0"], "no lead V6; the tokenizer needs all twelve"),
        (["--record", "brief", "--speed", "0"], "at least 5 s"),
    ],
)
def test_errors_name_the_argument(files, monkeypatch, capsys, words, message):
    monkeypatch.chdir(files)
    ECGTokenizer(TokenizerConfig()).save_pretrained("offline")
    write_record(files, "brief", minute()[:, :2000])
    write_record(files, "two", minute()[:, :5000])
    header = files / "two.hea"
    header.write_text(header.read_text().replace(" V6", " X"))
    with pytest.raises(SystemExit) as stop:
        live.main(["--tokenizer", "tokenizer", *words])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err), err


def test_a_terminal_is_left_as_it_was(files):
    """The command on a pseudo-terminal, ended by Ctrl-C."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "toolkit.tokenizer.streaming", "--tokenizer", files / "tokenizer", "--record", files / "long"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "LINES": "24", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    # a shell that runs the tests in the background has them, and what they start, ignore Ctrl-C
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, preexec_fn=heeds)
    os.close(theirs)
    seen = b""
    while b"00:01" not in seen:  # until a second was shown
        seen += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # Linux's end of a pseudo-terminal
        while part := os.read(ours, 65536):
            seen += part
    err = process.communicate(timeout=20)[1].decode()
    os.close(ours)
    text = seen.decode(errors="replace")  # Ctrl-C may cut a frame within a character
    assert process.returncode == 130 and "Traceback" not in err and "not for monitoring a patient" in err
    assert text.startswith("\x1b[?1049h\x1b[?25l") and text.count("\x1b[?1049l") == text.count("\x1b[?25h") == 1
    frames = text.split("\x1b[H")[1:]
    assert len(frames) > 3 and all(len(line.split("\x1b")[0]) < 80 for frame in frames[:-1] for line in frame.splitlines())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 200), st.integers(1, 8))
def test_the_trace_draws_every_sample(samples, width, rows):
    """Dots of each column against a slow loop over its samples: highest and lowest are drawn, nothing outside them and the column before."""
    trace = np.random.default_rng(samples).normal(size=samples).astype(np.float32)[-2500:]
    lines = live.braille(trace, samples, width, rows)
    assert [len(line) for line in lines] == [width] * rows
    bits = {(y, x): bit for x, column in enumerate([(1, 2, 4, 64), (8, 16, 32, 128)]) for y, bit in enumerate(column)}
    dots = np.array([[ord(lines[y // 4][x // 2]) - 0x2800 & bits[y % 4, x % 2] > 0 for x in range(2 * width)] for y in range(4 * rows)])
    length = -(-2500 // (2 * width))
    newest = samples // length - 1  # number of the last whole column of the stream
    heights = []
    for x in range(2 * width):
        start = (newest - (2 * width - 1 - x)) * length - (samples - len(trace))
        part = trace[start : start + length] if start >= 0 else []
        if len(part) == 0:
            assert not dots[:, x].any()
            continue
        middle, half = (trace.max() + trace.min()) / 2, max((trace.max() - trace.min()) / 2, 0.25)
        here = [round(float((1 - (v - middle) / half) / 2 * (4 * rows - 1))) for v in part]
        heights.append((min(here), max(here)))
        low, high = heights[-1]
        if len(heights) > 1:
            low, high = min(low, heights[-2][1]), max(high, heights[-2][0])
        drawn = np.flatnonzero(dots[:, x])
        assert drawn.tolist() == list(range(low, high + 1))
