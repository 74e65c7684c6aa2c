"""Encode every ECG of a manifest into token shards.

python -m sharding.shard --manifest runs/demo/manifest --tokenizer runs/demo/tokenizer --out runs/demo/shards
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sharding.manifest import MANIFEST, SPLITS, read_manifest
from toolkit.ecg.quality import check
from toolkit.ecg.records import RecordError, read_record
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import digest, new_folder
from toolkit.shards.reader import read_index
from toolkit.shards.writer import write_index, write_split
from toolkit.tokenizer.tokenizer import ECGTokenizer

CHUNK = 32  # ECGs that a worker reads and encodes at a time: 7.7 MB of samples
META = ("source", "record_id", "patient", "split", "report", "labels", "qc", "age", "sex")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sharding.shard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", required=True, type=Path, help="folder written by `python -m sharding.prepare`")
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder written by launchers/train_tokenizer.py")
    parser.add_argument("--out", required=True, type=Path, help="folder for the shards; it appears when complete")
    parser.add_argument("--shard_size", type=int, default=4096, help="ECGs in a tar (default: %(default)s, about 11 MB)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that were made from other inputs")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.shard_size < 1:
        raise UserError("--workers and --shard_size must be at least 1")
    manifest = read_manifest(args.manifest)
    tokenizer = ECGTokenizer.from_pretrained(args.tokenizer)
    once = {
        "kind": "tokens",
        "tokenizer": tokenizer.fingerprint(),
        "tokens_per_ecg": tokenizer.tokens_per_ecg,
        "codes": tokenizer.config.codes,
        "levels": tokenizer.config.levels,
        "dims": tokenizer.config.dims,
        "manifest": str(args.manifest.resolve()),
        "manifest_digest": digest(args.manifest / MANIFEST),
        "shard_size": args.shard_size,
    }
    if args.out.exists() and any(args.out.iterdir()):
        made = read_index(args.out, "--out", "so it is no folder of shards and will not be replaced: name a new folder")
        differs = [key for key, value in once.items() if made.get(key) != value]
        if made["kind"] != "tokens" or (differs and not args.overwrite):
            raise UserError(f"--out {args.out}: these shards were made with another {differs[0]}; add --overwrite or name a new folder")
        if not differs and not args.overwrite:
            print(f"{args.out} is complete already: {made['encoded']} ECGs")
            return

    started, quarantine, splits = time.time(), [], {}
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with new_folder(args.out) as folder, ProcessPoolExecutor(args.workers, spawn, _start, (str(args.tokenizer),)) as pool:
        bar = tqdm(total=len(manifest), unit="ECG", desc="encode", disable=None)
        for split in SPLITS:
            rows = manifest[manifest["split"] == split].sort_values("key").to_dict("records")
            chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
            results = pool.map(_encode, ([(r["key"], r["path"]) for r in chunk] for chunk in chunks))  # in order, whatever the workers
            splits[split] = write_split(folder, split, _samples(chunks, results, quarantine, bar), args.shard_size)
        bar.close()
        encoded = sum(entry["samples"] for entry in splits.values())
        if not encoded:
            raise UserError(
                f"--manifest {args.manifest}: no ECG could be read ({quarantine[0]['message'] if quarantine else 'it is empty'})"
            )
        (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quarantine))
        shutil.copytree(
            args.tokenizer, folder / "tokenizer", ignore=shutil.ignore_patterns("checkpoint-*", "tensorboard", "latest", "*.jsonl")
        )
        write_index(folder, splits, **once, encoded=encoded, quarantined=len(quarantine))
    seconds = time.time() - started
    print(f"{encoded} ECGs in {seconds:.1f} s ({encoded / seconds:.0f} ECG/s), {len(quarantine)} quarantined, shards in {args.out}")


def _start(tokenizer: str) -> None:
    import torch

    torch.set_num_threads(1)
    global _tokenizer
    _tokenizer = ECGTokenizer.from_pretrained(tokenizer)


def _encode(records: list[tuple[str, str]]) -> tuple[np.ndarray, list[dict]]:
    """Tokens uint16 [n, 313] of the records that can still be read and pass the quality check, and a line for each that cannot."""
    ecgs, bad = [], []
    for key, path in records:
        try:
            ecgs.append(check(read_record(path))[0])
        except RecordError as error:  # the file may have changed since `prepare`: one NaN must never reach the encoder
            bad.append({"key": key, "path": path, "reason": error.reason, "message": error.message})
    return (_tokenizer.encode(np.stack(ecgs)) if ecgs else np.zeros((0, _tokenizer.tokens_per_ecg), np.uint16)), bad


def _samples(chunks, results, quarantine: list[dict], bar: tqdm):
    """(key, ids [1, 313], json) of each encoded ECG, in manifest order."""
    for chunk, (ids, bad) in zip(chunks, results):
        quarantine.extend(bad)
        unread = {line["key"] for line in bad}
        kept = (row for row in chunk if row["key"] not in unread)
        for row, tokens in zip(kept, ids):
            meta = {name: row[name] for name in META}
            yield row["key"], tokens[None], {**meta, "age": None if row["age"] != row["age"] else row["age"]}
        bar.update(len(chunk))


if __name__ == "__main__":
    exit_2_on_user_error(main)()
