"""Live tokens: the time from the last sample of a token to its id, and the memory of a day's stream; one thread, random weights (seed 0).

    OMP_NUM_THREADS=1 python benchmarks/streaming.py              # latency and 24 h of signal, about six minutes
    python benchmarks/streaming.py --hours 1 --json streaming.json

Baseline: what one would do without `StreamingTokenizer`, `ECGTokenizer.encode` of the last 10 s at every token. It gives other ids: its first samples have
no past. Signal: a minute of the synthetic heart, repeated. Latency is measured over rounds that take turns: p50 and p99 are medians of the rounds', the
longest is of all. Weights decide no time, but for the tokens that lie so close to the boundary of two digits that float64 decides; these have a row.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder has a sharding.py too

from toolkit.ecg.heart import draw, simulate
from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE
from toolkit.tokenizer import tokenizer as tokenizer_module
from toolkit.tokenizer.live import chunks, played
from toolkit.tokenizer.normalise import LEFT, STRIDE
from toolkit.tokenizer.streaming import StreamingTokenizer
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

ROUNDS = 5
CHUNK = 10  # samples, 20 ms
LIMIT = 50  # ms, p99


def make_tokenizer() -> ECGTokenizer:
    torch.manual_seed(0)
    tokenizer = ECGTokenizer(TokenizerConfig(causal=True)).eval()
    for block in tokenizer.encoder.blocks:  # which begin as the identity: equality with `encode` would be easy
        torch.nn.init.normal_(block.down.weight, std=0.1)
    return tokenizer


def signal(seconds: int) -> np.ndarray:
    """float32 [12, 500 * seconds] mV of the synthetic heart, one heart each 10 s."""
    rng = np.random.default_rng(0)
    return np.concatenate([simulate(draw(rng), rng) for _ in range(-(-seconds // 10))], 1)[:, : SAMPLING_RATE * seconds]


def pushes(tokenizer: ECGTokenizer, ecg: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, ms of the push each came from, ms from its last sample to that push) of a stream in pushes of so many samples, at the speed of the machine."""
    stream, ids, took, waited = StreamingTokenizer(tokenizer), [], [], []
    for end in range(samples, ecg.shape[1] + 1, samples):
        started = time.perf_counter()
        new = stream.push(ecg[:, end - samples : end])
        took += [1e3 * (time.perf_counter() - started)] * len(new)
        for i in new.tolist():
            ids.append(i)
            waited.append((end - (STRIDE * len(ids) - LEFT)) * 1e3 / SAMPLING_RATE)
    return np.array(ids), np.array(took), np.array(waited)


def without_streaming(tokenizer: ECGTokenizer, ecg: np.ndarray) -> np.ndarray:
    """ms of `encode` of the last 10 s at each token of the signal after them."""
    took = []
    for end in range(SAMPLES + STRIDE, ecg.shape[1] + 1, STRIDE):
        last = ecg[:, end - SAMPLES : end]
        started = time.perf_counter()
        tokenizer.encode(last)
        took.append(1e3 * (time.perf_counter() - started))
    return np.array(took)


def in_float64(tokenizer: ECGTokenizer, ecg: np.ndarray) -> np.ndarray:
    """ms of pushes as if every token lay at a boundary."""
    tie, tokenizer_module.TIE = tokenizer_module.TIE, 1.0
    try:
        return pushes(tokenizer, ecg, 1)[1]
    finally:
        tokenizer_module.TIE = tie


def latency() -> list[dict]:
    tokenizer, minute = make_tokenizer(), signal(60)
    ids = pushes(tokenizer, minute[:, :SAMPLES], CHUNK)[0]  # warms up, too
    rounds = []
    for _ in tqdm(range(ROUNDS), desc="latency", dynamic_ncols=True, disable=None):
        single, chunked = pushes(tokenizer, minute[:, : 36 * SAMPLING_RATE], 1), pushes(tokenizer, minute[:, : 36 * SAMPLING_RATE], CHUNK)
        slow, exact = without_streaming(tokenizer, minute[:, : SAMPLES + 100 * STRIDE]), in_float64(tokenizer, minute[:, : 100 * STRIDE])
        rounds.append((slow, single[1], chunked[1], chunked[1] + chunked[2], exact))
    stretches = played(StreamingTokenizer(tokenizer), chunks([minute], CHUNK), 1.0, np.zeros(len(LEADS), int))
    live = [np.concatenate([latencies for _, _, latencies in stretches])]
    names = (
        "encode of the last 10 s (baseline)",
        "one sample a push",
        "20 ms a push, the push alone",
        "20 ms a push, from the last sample",
        "a token that float64 decides",
    )
    rows = [row(name, list(times)) for name, times in zip(names, zip(*rounds))] + [row("live, 60 s in real time, 20 ms a push", live)]
    for result in rows[:3] + [rows[4]]:  # the wait for the rest of a chunk is none of the tokenizer's
        result["times_as_fast"] = rows[0]["p50_ms"] / result["p50_ms"]
    rows[2]["ids_equal_to_encode"] = f"{(ids == tokenizer.encode(minute[:, :SAMPLES])).sum()} of {len(ids)}"
    return rows


def row(what: str, rounds: list[np.ndarray]) -> dict:
    p50, p99 = (median(float(np.percentile(times, q)) for times in rounds) for q in (50, 99))
    return {"what": what, "tokens": sum(map(len, rounds)), "p50_ms": p50, "p99_ms": p99, "longest_ms": max(float(times.max()) for times in rounds)}


def day(hours: float) -> list[dict]:
    """Memory of the process after a minute, an hour and all of a stream that comes a second at a time."""
    stream, minute, tokens, rows = StreamingTokenizer(make_tokenizer()), signal(60), 0, []
    marks, started, page = sorted({60, 3600, round(3600 * hours)}), time.perf_counter(), resource.getpagesize()
    for second in tqdm(range(1, round(3600 * hours) + 1), desc="signal", unit="s", dynamic_ncols=True, disable=None):
        at = (second - 1) % 60 * SAMPLING_RATE
        tokens += len(stream.push(minute[:, at : at + SAMPLING_RATE]))
        if second in marks:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20
            state = stream.waiting.nbytes + stream.sums.untyped_storage().nbytes() + stream.history.untyped_storage().nbytes()
            speed = second / (time.perf_counter() - started)
            rows.append({"signal_s": second, "tokens": tokens, "process_MiB": resident, "state_bytes": state, "times_real_time": speed})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24, help="length of the long stream (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    if not 1 / 60 <= args.hours <= 24 * 365:
        parser.error(f"--hours {args.hours:g}: must be from 1/60, one minute, to a year")
    torch.set_num_threads(1)
    cpu = next((text.split(":")[1].strip() for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")), platform.machine())
    print(f"{cpu}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}; load {os.getloadavg()[0]:.1f} at the start", flush=True)
    latencies = latency()
    print(f"{'from the last sample of a token to its id':<42}{'tokens':>8}{'p50 ms':>9}{'p99 ms':>9}{'longest':>9}{'times as fast':>15}")
    for r in latencies:
        ratio = f"{r['times_as_fast']:>15.1f}" if "times_as_fast" in r else ""
        print(f"{r['what']:<42}{r['tokens']:>8,}{r['p50_ms']:>9.2f}{r['p99_ms']:>9.2f}{r['longest_ms']:>9.2f}{ratio}")
    print(f"p99 below {LIMIT} ms: {'yes' if latencies[-1]['p99_ms'] < LIMIT else 'NO'} (live); ids equal to encode: {latencies[2]['ids_equal_to_encode']}\n")
    hours = day(args.hours)
    print(f"{'signal':>10}{'tokens':>12}{'process MiB':>13}{'state bytes':>13}{'times real time':>17}")
    for r in hours:
        print(f"{r['signal_s'] / 60:>6,.0f} min{r['tokens']:>12,}{r['process_MiB']:>13.1f}{r['state_bytes']:>13,}{r['times_real_time']:>17.0f}")
    if args.json:
        args.json.write_text(json.dumps({"latency": latencies, "hours": hours}, indent=1) + "\n")


if __name__ == "__main__":
    main()
