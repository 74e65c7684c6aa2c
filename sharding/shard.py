"""Encode every ECG of a manifest into token shards.

    python -m sharding.shard --manifest runs/demo/manifest --tokenizer runs/demo/tokenizer --out runs/demo/shards
    srun -n 8 python -m sharding.shard --manifest M --tokenizer T --out S      # eight machines share the work; the same bytes

A shard is a stretch of a split's ECGs in order of key and belongs to one rank. Killed and started again, by the same command or on other
machines, it goes on with the first shard that is not complete. On a CPU the workers read and encode; with a GPU they read and this process encodes.
"""

import argparse
import contextlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sharding import engine
from sharding.manifest import SPLITS, read_manifest, read_summary
from toolkit.ecg.gains import gains, rounded
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import whole_file
from toolkit.memory import keep_freed_memory
from toolkit.shards.reader import read_index
from toolkit.shards.writer import FORMAT_VERSION, INDEX_DTYPE, TOKENIZER_FILES, join_shards, write_index, write_shard
from toolkit.tokenizer.tokenizer import ECGTokenizer

CHUNK = 64  # ECGs that a worker takes at a time: 15 MB of samples, half a second of encoding on a core, one batch on a GPU
META = ("source", "record_id", "patient", "split", "report", "labels", "qc", "age", "sex", "site")
FILES = ("*.tar", "*.index.npy", "index.json", "quarantine.jsonl", "tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder written by launchers/train_tokenizer.py")
    parser.add_argument("--shard_size", type=int, default=4096, help="ECGs in a tar (default: %(default)s, about 11 MB)")
    parser.add_argument(
        "--on_bad_record",
        choices=["error", "skip"],
        default="error",
        help="an ECG that passed `prepare` and cannot be read now: stop, or leave it out and list it in quarantine.jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="where to encode: auto (a GPU if there is one), cpu or cuda; that the ids are the same was not seen, so it is part of the configuration",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sharding.shard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", required=True, type=Path, help="folder written by `python -m sharding.prepare`")
    parser.add_argument("--out", required=True, type=Path, help="folder for the shards; index.json appears in it when all are complete")
    add_arguments(parser)
    engine.add_arguments(parser)
    args = parser.parse_args(argv)
    engine.check_arguments(args)
    shard(args)


def shard(args: argparse.Namespace) -> bool:
    """Make the shards; returns whether all are complete, which they are not while other ranks still work."""
    tokenizer, device = load(args)
    manifest, qc = read_manifest(args.manifest), read_summary(args.manifest)["arguments"]["qc"]
    once = {
        "kind": "tokens",
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint(),
        "tokens_per_ecg": tokenizer.tokens_per_ecg,
        "codes": tokenizer.config.codes,
        "levels": tokenizer.config.levels,
        "manifest_digest": read_summary(args.manifest)["digest"],
        "shard_size": args.shard_size,
        "device": device,
    }
    with engine.claim(args.out, once, FILES, args) as folder:
        return make(args, folder, plan(manifest, args.shard_size), qc, tokenizer, {**once, "manifest": os.path.relpath(args.manifest, args.out)}, device)


def load(args: argparse.Namespace) -> tuple[ECGTokenizer, str]:
    """The tokenizer on its device, and the device. Raises `UserError` for what is wrong with the arguments."""
    if args.shard_size < 1:
        raise UserError("--shard_size: must be at least 1")
    if args.device not in ("auto", "cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {args.device}: auto, cpu or cuda, and for cuda torch must see a GPU")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    return ECGTokenizer.from_pretrained(args.tokenizer).to(device), device


def make(args: argparse.Namespace, folder: Path, shards: dict[str, pd.DataFrame], qc: str, tokenizer: ECGTokenizer, once: dict, device: str) -> bool:
    mine = engine.share(list(shards), args.rank, args.world_size)
    todo = [name for name in mine if not is_complete(args.out, name)]
    if not todo and all(is_complete(args.out, name) for name in shards):
        with contextlib.suppress(UserError):  # missing or damaged: written again below
            print(f"{args.out} is complete already: {read_index(args.out, '--out')['encoded']} ECGs")
            return True
    if todo:
        (args.out / "index.json").unlink(missing_ok=True)  # shards are to be made again

    started, seconds, made = time.perf_counter(), Counter(), 0
    work = chunks((shards[name] for name in todo), qc)
    if device == "cpu":
        results = engine.ordered_map(read_and_encode, work, args.workers, start_encoder, (str(args.tokenizer),))
    else:
        results = encoded_here(engine.ordered_map(read, work, args.workers), tokenizer)
    with engine.progress(sum(len(shards[n]) for n in mine), sum(len(shards[n]) for n in mine if n not in todo), "encode") as bar:
        for name in todo:
            quarantine = []
            engine.sweep(args.out, name)
            engine.sweep(folder, name)
            entry, rows = engine.guarded(
                args.out, write_shard, args.out, name, samples(shards[name].to_dict("records"), results, quarantine, seconds, bar, args)
            )
            engine.guarded(args.out, complete, folder, entry, rows, quarantine)
            made += entry["samples"]
    missing = [name for name in shards if not is_complete(args.out, name)]
    report(made, len(todo), seconds, time.perf_counter() - started, args, device)
    if missing:
        print(f"{args.out}: rank {args.rank} is done; {len(missing)} of {len(shards)} shards are still with other ranks (of {args.world_size})")
        return False
    print(summary_table(engine.guarded(args.out, merge, args.out, folder, list(shards), args.tokenizer, once)))
    return True


def plan(manifest: pd.DataFrame, shard_size: int) -> dict[str, pd.DataFrame]:
    """Name of each shard -> its ECGs: stretches of a split in order of key, so that they do not depend on workers or ranks."""
    shards = {}
    for split in SPLITS:
        rows = manifest[manifest["split"] == split].sort_values("key")
        shards |= {f"{split}-{i // shard_size:06d}.tar": rows.iloc[i : i + shard_size] for i in range(0, len(rows), shard_size)}
    return shards


def chunks(shards: Iterable[pd.DataFrame], qc: str) -> Iterator[list[tuple]]:
    """What workers take: (key, path, start, array, qc) of CHUNK ECGs, never of two shards."""
    for rows in shards:
        records = [(*record, qc) for record in rows[["key", "path", "start", "array"]].itertuples(index=False, name=None)]
        yield from (records[i : i + CHUNK] for i in range(0, len(records), CHUNK))


def is_complete(out: Path, name: str) -> bool:
    """Whether a shard's completion file is there and its tar as long as that says."""
    try:
        entry = json.loads((out / engine.PARTS / f"{name}.json").read_text())["entry"]
        return not entry["samples"] or (out / name).stat().st_size == entry["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def start_encoder(tokenizer: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    global _tokenizer
    _tokenizer = ECGTokenizer.from_pretrained(tokenizer)


def read(records: list[tuple]) -> tuple[np.ndarray, list[list[float]], list[dict], dict]:
    """ECGs float32 [n, 12, 5000] of the records (key, path, start, array, qc) that can still be read and pass the quality check, their gains
    [n][12] mV, a line for each record that cannot, and the seconds it took."""
    started, bad = time.perf_counter(), []
    ecgs = list(readable(records, bad))
    scales = [rounded(gains(ecg)) for ecg in ecgs]
    return np.array(ecgs, np.float32).reshape(-1, 12, 5000), scales, bad, {"read": time.perf_counter() - started}


def read_and_encode(records: list[tuple]) -> tuple[np.ndarray, list[list[float]], list[dict], dict]:
    """As `read`, but tokens uint16 [n, 313]."""
    ecgs, scales, bad, seconds = read(records)
    started = time.perf_counter()
    return _tokenizer.encode(ecgs), scales, bad, {**seconds, "encode": time.perf_counter() - started}


def readable(records: list[tuple], bad: list[dict]) -> Iterator[np.ndarray]:
    for key, path, start, array, qc in records:
        try:
            yield read_checked(path, start, array, qc)[0]
        except RecordError as error:  # the file may have changed since `prepare`: one NaN must never reach the encoder
            bad.append({"key": key, "reason": error.reason, "message": error.message})
        except OSError as error:
            raise UserError(f"--manifest: {key} cannot be read ({error.strerror}): mend that and run the same command again, it goes on from here") from error


def encoded_here(results: Iterator, tokenizer: ECGTokenizer) -> Iterator:
    """Results of `read` encoded in this process; "wait" is the time it had nothing to encode."""
    while True:
        started = time.perf_counter()
        try:
            ecgs, scales, bad, seconds = next(results)
        except StopIteration:
            return
        arrived = time.perf_counter()
        ids = tokenizer.encode(ecgs)
        yield ids, scales, bad, {**seconds, "wait": arrived - started, "encode": time.perf_counter() - arrived}


def samples(rows: list[dict], results: Iterator, quarantine: list[dict], seconds: Counter, bar, args) -> Iterator[tuple[str, np.ndarray, dict]]:
    """(key, ids [1, 313], json) of each encoded ECG of one shard, in manifest order."""
    for i in range(0, len(rows), CHUNK):
        chunk, (ids, scales, bad, took) = rows[i : i + CHUNK], next(results)
        if bad and args.on_bad_record == "error":
            what = f"{bad[0]['key']} passed the check of `prepare` and does not now ({bad[0]['reason']}: {bad[0]['message']})"
            raise UserError(f"--manifest: {what}; put the file back and run the same command again, or add --on_bad_record skip")
        quarantine += bad
        seconds.update(took)
        unread = {line["key"] for line in bad}
        for row, tokens, scale in zip((row for row in chunk if row["key"] not in unread), ids, scales, strict=True):
            meta = {name: row[name] for name in META}
            yield row["key"], tokens[None], {**meta, "age": None if row["age"] != row["age"] else row["age"], "gains": [scale]}
        bar.update(len(chunk))


def complete(folder: Path, entry: dict, rows: np.ndarray, quarantine: list[dict]) -> None:
    """The files that say a shard is complete: its index rows, then its entry."""
    npy = io.BytesIO()
    np.save(npy, rows, allow_pickle=False)
    with whole_file(folder / f"{entry['name']}.npy") as file:
        file.write(npy.getvalue())
    engine.save(folder / f"{entry['name']}.json", json.dumps({"entry": entry, "quarantine": quarantine}), folder.parent)


def merge(out: Path, folder: Path, names: list[str], tokenizer: Path, once: dict) -> dict:
    """Write index.json and what goes with it, from the completion files of all shards; returns it."""
    said = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    splits, quarantine = {}, [line for part in said.values() for line in part["quarantine"]]
    for split in SPLITS:
        entries = [said[name]["entry"] for name in names if name.startswith(f"{split}-")]
        shards = [(entry, np.load(folder / f"{entry['name']}.npy", allow_pickle=False).astype(INDEX_DTYPE)) for entry in entries if entry["samples"]]
        splits[split] = join_shards(out, split, shards)
    encoded = sum(entry["samples"] for entry in splits.values())
    if not encoded:
        raise UserError(f"--manifest {once['manifest']}: no ECG could be read ({quarantine[0]['message'] if quarantine else 'it is empty'})")
    for name in names:
        if not said[name]["entry"]["samples"]:
            (out / name).unlink(missing_ok=True)  # `webdataset` does not take an empty tar
    engine.save(out / "quarantine.jsonl", "".join(json.dumps(line) + "\n" for line in quarantine), out)
    (out / "tokenizer").mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        with whole_file(out / "tokenizer" / name) as copy:
            copy.write((tokenizer / name).read_bytes())
    write_index(out, splits, **once, encoded=encoded, quarantined=len(quarantine))
    return read_index(out, "--out")


def report(made: int, shards: int, seconds: Counter, wall: float, args: argparse.Namespace, device: str) -> None:
    """What the work of this rank cost."""
    if not shards:
        return
    print(f"{made} ECGs in {shards} shards, {wall:.1f} s ({made / wall:.0f} ECG/s with {args.workers} workers; start included)")
    if made:
        per_ecg = {name: 1e3 * seconds[name] / made for name in ("read", "encode")}
        print(f"  reading and quality {per_ecg['read']:.2f} ms, encoding {per_ecg['encode']:.2f} ms an ECG and process on {device}")
    if device != "cpu":
        waits = seconds["wait"] > seconds["encode"]
        print(
            f"  the bottleneck is {'reading: more --workers help' if waits else 'encoding'} (waited {seconds['wait']:.1f} s, encoded {seconds['encode']:.1f} s)"
        )


def summary_table(index: dict) -> str:
    lines = [f"  {'split':<7}{'shards':>7}{'ECGs':>9}{'tokens':>13}{'MB':>9}"]
    for split, entry in index["splits"].items():
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        lines.append(f"  {split:<7}{len(entry['shards']):>7}{entry['samples']:>9,}{entry['tokens']:>13,}{size:>9.1f}")
    return "\n".join([*lines, f"  {index['quarantined']} quarantined, tokenizer {index['tokenizer']}"])


if __name__ == "__main__":
    exit_2_on_user_error(main)()
