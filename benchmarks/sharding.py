"""What sharding costs, each figure beside its baseline in the same run; medians of several rounds, one thread a process, files in the page cache.

    python benchmarks/sharding.py                         # all, about six minutes on two cores
    python benchmarks/sharding.py reading path            # parts of it
    python benchmarks/sharding.py --json sharding.json

Baselines: `wfdb.rdsamp` for reading; for the whole path a re-implementation of the published loop (rdsamp, z-score, encoder called lead by lead in
batches of 10, as the release does at every training step), and with our encoder in its place; for loading, `webdataset` on the same tars.
Records: the real ones of --data, and what its expand.py makes of them (WFDB format 16, as PTB-XL and MIMIC-IV-ECG are downloaded).
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
import wfdb

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder has a sharding.py too

from sharding.shard import read_and_encode, start_encoder
from toolkit.ecg.leads import LEADS
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import read_record
from toolkit.shards.order import sample_at
from toolkit.shards.reader import Shards
from toolkit.shards.writer import INDEX_DTYPE, join_shards, write_index, write_shard, write_split
from toolkit.tokenizer import heartllm
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

ROUNDS = 5
ARCHIVE = 800_000  # ECGs of MIMIC-IV-ECG


def seconds(*calls: Callable, rounds: int = ROUNDS) -> list[float]:
    """The median time of each call over rounds that take turns, after one round to warm up."""
    times = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, mine in zip(calls, times):
            started = time.perf_counter()
            call()
            mine.append(time.perf_counter() - started)
    return [median(mine[1:]) for mine in times]


def reading(data: Path, work: Path) -> list[dict]:
    """Per form of record: `read_record` against `wfdb.rdsamp`, bit-equal samples."""
    slow, other, parted = work / "100hz", work / "212", work / "segments"
    for folder in (slow, other, parted):
        folder.mkdir()
    expanded = names(work / "ptbxl_mv", 40)
    for i, name in enumerate(expanded):
        record = wfdb.rdrecord(name)
        common = {"units": record.units, "sig_name": record.sig_name}
        wfdb.wrsamp(f"{i}", fs=100, p_signal=record.p_signal[::5], fmt=["16"] * 12, adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(slow), **common)
        wfdb.wrsamp(
            f"{i}", fs=500, p_signal=record.p_signal.clip(-10, 10), fmt=["212"] * 12, adc_gain=[200.0] * 12, baseline=[0] * 12, write_dir=str(other), **common
        )
        for half in (0, 1):
            signal, gain = record.p_signal[2500 * half : 2500 * (half + 1)], [1000.0] * 12
            wfdb.wrsamp(f"{i}_{half}", fs=500, p_signal=signal, fmt=["16"] * 12, adc_gain=gain, baseline=[0] * 12, write_dir=str(parted), **common)
        (parted / f"m{i}.hea").write_text(f"m{i}/2 12 500 5000\n{i}_0 2500\n{i}_1 2500\n")
    forms = {
        "format 16, 500 Hz": expanded,
        "format 16, z-scored": names(work / "ptbxl", 40),
        "16+24 (.mat, CinC)": names(data / "cinc2021/georgia", 40),
        "516 (FLAC)": names(data / "ptbxl_mv", 40),
        "format 212": names(other, 40),
        "format 16, 100 Hz to 500 Hz": names(slow, 40),
        "two segments (left to wfdb)": [str(parted / f"m{i}") for i in range(len(expanded))],
    }
    results, spawn = [], multiprocessing.get_context("spawn")
    # A process each: what wfdb frees goes back to the system, and page faults would slow whoever allocates next.
    with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:
        for form, paths in forms.items():
            equal = None if "to 500" in form else all(np.array_equal(read_record(p), canonical(*wfdb.rdsamp(p)), equal_nan=True) for p in paths)
            times = [
                [1e3 * pool.submit(time_reader, reader, paths).result() / len(paths) for pool, reader in ((ours, read_record), (theirs, wfdb.rdsamp))]
                for _ in range(ROUNDS + 1)
            ]
            mine, other = (median(column) for column in zip(*times[1:]))
            results.append({"what": f"read {form}", "ours_ms": mine, "baseline": "wfdb.rdsamp", "baseline_ms": other, "equal": equal})
    return results


def time_reader(reader: Callable, paths: list[str]) -> float:
    started = time.perf_counter()
    for path in paths:
        reader(path)
    return time.perf_counter() - started


def names(folder: Path, count: int) -> list[str]:
    headers = sorted(folder.rglob("*.hea"))
    return [str(header.with_suffix("")) for header in headers[:: max(1, len(headers) // count)][:count]]


def canonical(signal: np.ndarray, fields: dict) -> np.ndarray:
    """rdsamp's result in the form of `read_record`, for records of 500 Hz."""
    where = {name.upper(): i for i, name in enumerate(fields["sig_name"])}
    ecg = np.zeros((12, 5000), np.float32)
    signal = signal[:5000, [where[lead.upper()] for lead in LEADS]].T
    ecg[:, : signal.shape[1]] = signal
    return ecg


def published_loop(paths: list[str], encoder: Callable) -> np.ndarray:
    """Ids of the records as the release computes them: wfdb.rdsamp, z-score per lead in float64, encoder, batches of 10."""
    ids = []
    for start in range(0, len(paths), 10):
        signals = [wfdb.rdsamp(path)[0] for path in paths[start : start + 10]]
        scaled = [(signal - signal.mean(0)) / signal.std(0) for signal in signals]
        batch = torch.tensor(np.stack(scaled), dtype=torch.float32).permute(0, 2, 1)
        digits = torch.round(torch.sigmoid(encoder(batch)) * 5).long()
        ids.append((digits * 6 ** torch.arange(4)).sum(-1).numpy().astype(np.uint16))
    return np.concatenate(ids)


def our_path(records: list[tuple], out: Path) -> np.ndarray:
    """Ids of the records, written to a shard, as a worker of `sharding.shard` computes them."""
    ids = np.concatenate([read_and_encode(records[i : i + 60])[0] for i in range(0, len(records), 60)])
    write_shard(out, "path-000000.tar", ((record[0], row[None], {}) for record, row in zip(records, ids)))
    return ids


@torch.no_grad()
def measured(what: str, folder: Path, paths: list[str]) -> tuple[float, np.ndarray | None]:
    """Seconds and ids of one way through the records, in the process that calls it."""
    torch.set_num_threads(1)
    if what not in ("loop", "release"):  # those run as their users start them
        start_encoder(str(folder))
    tokenizer, released = ECGTokenizer.from_pretrained(folder), heartllm.Encoder(len(LEADS), 4).eval()  # random weights: for its cost
    records = [(f"k{i:04d}", name, 0.0, "", "drop") for i, name in enumerate(paths)]
    ecgs = np.stack([read_checked(name)[0] for name in paths]) if what == "encoder" else None
    ways = {
        "ours": lambda: our_path(records, folder.parent),
        "loop": lambda: published_loop(paths, tokenizer.encoder),
        "release": lambda: published_loop(paths[:40], released.as_released),
        "encoder": lambda: tokenizer.encode(ecgs),
        "read": lambda: [read_checked(name) for name in paths] and None,
    }
    ways[what]()
    started = time.perf_counter()
    ids = ways[what]()
    return time.perf_counter() - started, ids


def path(data: Path, work: Path) -> list[dict]:
    """Read, check, normalise, encode, write: per core, against the published loop and against the encoder alone. A process each."""
    folder, paths, times, ids = make_tokenizer(work), names(work / "ptbxl", 120), {}, {}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(3):
        for what in ("ours", "loop", "release", "encoder", "read"):
            with ProcessPoolExecutor(1, spawn) as pool:
                took, ids[what] = pool.submit(measured, what, folder, paths).result()
            times.setdefault(what, []).append(took)
    rate = {what: (40 if what == "release" else len(paths)) / median(took) for what, took in times.items()}
    differ = f"{(ids['ours'] != ids['loop']).sum()} of {ids['ours'].size}"
    mine = {"what": "whole path, ECG/s on a core", "ours_per_s": rate["ours"]}
    return [
        {**mine, "baseline": "published loop, our encoder", "baseline_per_s": rate["loop"], "ids_that_differ": differ},
        {**mine, "baseline": "published loop, arch heartllm lead by lead", "baseline_per_s": rate["release"]},
        {**mine, "baseline": "our encoder alone, arrays in memory", "baseline_per_s": rate["encoder"]},
        {"what": "read + quality, ECG/s on a core", "ours_per_s": rate["read"], "baseline": "our encoder alone", "baseline_per_s": rate["encoder"]},
    ]


def make_tokenizer(work: Path) -> Path:
    folder = work / "tokenizer"
    if not folder.exists():
        torch.manual_seed(0)
        ECGTokenizer(TokenizerConfig()).save_pretrained(folder)
    return folder


def loading(data: Path, work: Path) -> list[dict]:
    """Random-order samples of local shards against `webdataset` reading the same tars from end to end."""
    import webdataset

    n, rng, folder = 8192, np.random.default_rng(0), work / "loading"
    folder.mkdir()
    meta = {
        "source": "ptbxl",
        "record_id": "17",
        "patient": "0" * 16,
        "split": "train",
        "report": "sinus rhythm. normal ecg. " * 3,
        "labels": ["NORM", "SR"],
        "qc": [],
    }
    split = write_split(folder, "train", ((f"k{i:06d}", rng.integers(0, 1296, (1, 313)).astype(np.uint16), meta) for i in range(n)), 4096)
    write_index(folder, {"train": split}, kind="tokens", codes=1296)
    shards, order, urls = Shards.open(folder, "train"), rng.permutation(n).tolist(), sorted(map(str, folder.glob("*.tar")))

    def wds(*only: str) -> int:
        return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False, select_files=lambda name: name.endswith(only)).decode())

    calls = (
        lambda: sum(1 for i in order if shards.ids(i) is not None),
        lambda: wds(".npy"),
        lambda: sum(1 for i in order if shards.ids(i) is not None and shards.meta(i)),
        lambda: wds(".npy", ".json"),
    )
    ids, wds_ids, both, wds_both = (1e6 * s / n for s in seconds(*calls))
    return [
        {"what": "load ids, random order", "ours_us": ids, "baseline": "webdataset, in order", "baseline_us": wds_ids},
        {"what": "load ids and json, random order", "ours_us": both, "baseline": "webdataset, in order", "baseline_us": wds_both},
    ]


def opening(data: Path, work: Path) -> list[dict]:
    """Opening 800,000 samples and seeking to a position deep in the third epoch; tars are sparse files of the real size."""
    folder, size, rng = work / "opening", 4096, np.random.default_rng(0)
    folder.mkdir()
    shards = []
    for k, start in enumerate(range(0, ARCHIVE, size)):
        n = min(size, ARCHIVE - start)
        rows = np.zeros(n, INDEX_DTYPE)
        rows["ids_offset"], rows["n_ecgs"], rows["n_tokens"] = np.arange(n) * 2560 + 640, 1, 313
        name, length = f"train-{k:06d}.tar", n * 2560 + 10240
        with open(folder / name, "wb") as tar:
            tar.truncate(length)
        entry = {"name": name, "samples": n, "tokens": n * 313, "bytes": length, "sha256": hashlib.sha256(bytes(length)).hexdigest()}
        shards.append((entry, rows))
    write_index(folder, {"train": join_shards(folder, "train", shards)}, kind="tokens", codes=1296)
    positions = rng.integers(2 * ARCHIVE, 3 * ARCHIVE, ROUNDS).tolist()

    def begin() -> None:
        reader, (_, i) = Shards.open(folder, "train"), sample_at(int(rng.integers(1 << 30)), ARCHIVE, positions[0])
        reader.ids(i)

    [took] = seconds(begin)
    return [{"what": "open 800,000 samples, seek, first sample", "ours_s": took, "baseline": "the limit", "baseline_s": 1.0}]


def scaling(data: Path, work: Path) -> list[dict]:
    """`sharding.shard` as a user runs it with 1 and 2 workers; the time of a run with one ECG is taken off as the start."""
    tokenizer, many = make_tokenizer(work), len(list((work / "ptbxl").rglob("*.hea")))
    for n in (1, many):
        prepare = [sys.executable, "-m", "sharding.prepare", "ptbxl", "--root", work / "ptbxl", "--out", work / f"manifest-{n}", "--limit", n]
        subprocess.run(list(map(str, prepare)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def once(n: int, workers: int) -> None:
        words = ["--manifest", work / f"manifest-{n}", "--tokenizer", tokenizer, "--workers", workers, "--shard_size", 256]
        with tempfile.TemporaryDirectory(dir=work) as out:
            command = [sys.executable, "-m", "sharding.shard", *words, "--out", f"{out}/{workers}"]
            subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    calls = [lambda n=n, w=w: once(n, w) for w in (1, 2) for n in (1, many)]
    took = seconds(*calls, rounds=3)
    one, two = (many - 1) / (took[1] - took[0]), (many - 1) / (took[3] - took[2])
    cost = " ".join(f"{ARCHIVE / rate / 3600:.2f} h with {workers} workers;" for workers, rate in ((1, one), (2, two)))
    return [{"what": f"sharding.shard, 2 workers, ECG/s ({many} ECGs)", "ours_per_s": two, "baseline": "1 worker", "baseline_per_s": one,
             "for_800000_ECGs": cost.rstrip(";")}]  # fmt: skip


PARTS = {part.__name__: part for part in (reading, path, loading, opening, scaling)}


def line(result: dict) -> str:
    unit = next(key.removeprefix("ours_") for key in result if key.startswith("ours_"))
    ours, baseline = result[f"ours_{unit}"], result[f"baseline_{unit}"]
    ratio = ours / baseline if unit == "per_s" else baseline / ours
    more = "".join(f"; {k.replace('_', ' ')}: {v}" for k, v in result.items() if k in ("equal", "ids_that_differ", "for_800000_ECGs") and v is not None)
    return f"{result['what']:<44}{ours:>10.3f} {unit:<6}{baseline:>10.3f}  {ratio:>7.2f}x  of {result['baseline']}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"what to measure, of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("ECG_DATA", ROOT.parent / "shared/data")), help="real records and expand.py (default: %(default)s)"
    )
    parser.add_argument("--records", type=int, default=1600, help="records of ptbxl to expand (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    if not (args.data / "expand.py").is_file():
        parser.error(f"--data {args.data}: no expand.py there; set ECG_DATA")
    torch.set_num_threads(1)
    cpu = next((text.split(":")[1].strip() for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")), platform.machine())
    print(
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, wfdb {wfdb.__version__}; load {os.getloadavg()[0]:.1f} at the start",
        flush=True,
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, args.data / "expand.py", work, str(args.records)], check=True)
        for part in args.parts or PARTS:
            for result in PARTS[part](args.data, work):
                results.append(result)
                print(line(result), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
