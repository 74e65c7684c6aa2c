"""Write WebDataset tars of ECG token ids: `<key>.ecg.npy` uint16 [n_ecgs, 313] and `<key>.json`, with an index beside them.

A folder of shards S holds
    train-000000.tar ...    plain tars, readable by `webdataset` alone; bytes depend on the samples alone (no times, no owners)
    train.index.npy         one row per sample: shard, byte offset and shape of the ids, byte offset and length of the json
    index.json              per shard: samples, tokens, bytes, sha256; per split: their sums, sha256 of the .index.npy; once: tokenizer, format version, ...
    tokenizer/              the ECG tokenizer itself, so that shards can be moved and still be decoded

Every file is written under a temporary name and renamed when it is whole and on the disk; index.json comes last and says that all is there.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from toolkit.files import whole_file

FORMAT_VERSION = 3
INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("ids_offset", "<u8"), ("n_ecgs", "<u2"), ("n_tokens", "<u2"), ("json_offset", "<u8"), ("json_length", "<u4")]
)
# A key becomes a tar member name: no dots, slashes or drive letters; with `.ecg.npy` it fits the 100 bytes of a USTAR name.
KEY = re.compile(r"[A-Za-z0-9_-]{1,92}")
TOKENIZER_FILES = ("config.json", "model.safetensors")

Sample = tuple[str, np.ndarray, dict]


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> tuple[dict, np.ndarray]:
    """Write one tar; returns its entry for index.json {name, samples, tokens, bytes, sha256} and its index rows (INDEX_DTYPE, shard 0).

    samples: (key, ids uint16 [n_ecgs, n_tokens], json-able dict), written in the order given.
    Raises ValueError for a key that is no safe member name, a repeated key, or ids that are not uint16 [n, t]; OSError of the disk passes.
    The tar is there whole, or, whatever was raised, not at all. 60 us a sample, sha256 and fsync included; encoding it takes 9 ms.
    """
    rows, seen, tokens, sha256 = [], set(), 0, hashlib.sha256()
    with whole_file(folder / name) as file:

        def add(member: str, data: bytes) -> int:
            """Append a member without time or owner; returns the byte offset of its data."""
            info = tarfile.TarInfo(member)
            info.size = len(data)
            block = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
            offset = file.tell() + tarfile.BLOCKSIZE
            sha256.update(block)
            file.write(block)
            return offset

        for key, ids, meta in samples:
            if not KEY.fullmatch(key):
                raise ValueError(f"key {key!r}: 1 to 92 letters, digits, '_' and '-' only")
            if key in seen:
                raise ValueError(f"key {key!r} appears twice in {name}")
            if ids.dtype != np.uint16 or ids.ndim != 2:
                raise ValueError(f"{key}: ids must be uint16 [n_ecgs, n_tokens], got {ids.dtype} {list(ids.shape)}")
            seen.add(key)
            npy, text = io.BytesIO(), json.dumps(meta, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
            np.lib.format.write_array(npy, np.ascontiguousarray(ids, "<u2"), version=(1, 0), allow_pickle=False)
            npy_offset, json_offset = add(f"{key}.ecg.npy", npy.getvalue()), add(f"{key}.json", text)
            rows.append((0, npy_offset + len(npy.getvalue()) - ids.nbytes, *ids.shape, json_offset, len(text)))
            tokens += int(ids.size)
        end = bytes(2 * tarfile.BLOCKSIZE)
        end += bytes(-(file.tell() + len(end)) % tarfile.RECORDSIZE)
        sha256.update(end)
        file.write(end)
        size = file.tell()
    entry = {"name": name, "samples": len(rows), "tokens": tokens, "bytes": size, "sha256": sha256.hexdigest()}
    return entry, np.array(rows, INDEX_DTYPE)


def join_shards(folder: Path, split: str, shards: list[tuple[dict, np.ndarray]]) -> dict:
    """Number the rows of a split's shards, results of `write_shard` in order, and write `<split>.index.npy`; returns the split's entry for index.json."""
    rows = np.concatenate([np.zeros(0, INDEX_DTYPE), *(rows for _, rows in shards)])
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(rows) for _, rows in shards])
    npy = io.BytesIO()
    np.lib.format.write_array(npy, rows, version=(1, 0), allow_pickle=False)
    with whole_file(folder / f"{split}.index.npy") as file:
        file.write(npy.getvalue())
    entries = [entry for entry, _ in shards]
    totals = {what: sum(entry[what] for entry in entries) for what in ("samples", "tokens")}
    return {**totals, "index_sha256": hashlib.sha256(npy.getvalue()).hexdigest(), "shards": entries}


def write_split(folder: Path, split: str, samples: Iterable[Sample], shard_size: int) -> dict:
    """Write one split's tars, `shard_size` samples to each, and `<split>.index.npy` into `folder`; returns its entry for index.json.

    Raises what `write_shard` raises, and ValueError for a key that is repeated in the split.
    """
    seen, shards = set(), []

    def unique() -> Iterator[Sample]:
        for sample in samples:
            if sample[0] in seen:
                raise ValueError(f"key {sample[0]!r} appears twice in split {split}")
            seen.add(sample[0])
            yield sample

    rest = unique()
    for first in rest:
        shards.append(write_shard(folder, f"{split}-{len(shards):06d}.tar", chain([first], islice(rest, shard_size - 1))))
    return join_shards(folder, split, shards)


def write_index(folder: Path, splits: dict[str, dict], **once) -> None:
    """Write index.json: `splits` from `write_split` or `join_shards`, and what is said once for the folder (tokenizer fingerprint, ...).

    Where `folder` holds tokenizer/, size and sha256 of its files are added (`tokenizer_files`), so that a copy of them can be checked.
    """
    files = [folder / "tokenizer" / name for name in TOKENIZER_FILES if (folder / "tokenizer" / name).is_file()]
    if files:
        once["tokenizer_files"] = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
    index = {"format_version": FORMAT_VERSION, **once, "splits": splits}
    with whole_file(folder / "index.json") as file:
        file.write((json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 1 MiB."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            sha256.update(piece)
    return sha256.hexdigest()

