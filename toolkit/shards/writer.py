"""Write WebDataset tars of ECG token ids: `<key>.ecg.npy` uint16 [n_ecgs, 313] and `<key>.json`, with an index beside them.

A folder of shards S holds
    train-000000.tar ...    plain tars, readable by `webdataset` alone; bytes depend on the samples alone (no times, no owners)
    train.index.npy         one row per sample: shard, byte offset and length of the ids, byte offset and length of the json
    index.json              per split and shard: samples, tokens, sha256; once: tokenizer fingerprint, format version, ...
    tokenizer/              the ECG tokenizer itself, so that shards can be moved and still be decoded

The folder is written under a temporary name and renamed when complete: a shard folder that exists is whole.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("ids_offset", "<u8"), ("n_ecgs", "<u2"), ("n_tokens", "<u2"), ("json_offset", "<u8"), ("json_length", "<u4")]
)
KEY = re.compile(r"[A-Za-z0-9_-]+")  # a key becomes a tar member name: no dots, slashes or drive letters


def write_split(folder: Path, split: str, samples: Iterable[tuple[str, np.ndarray, dict]], shard_size: int) -> dict:
    """Write one split's tars and `<split>.index.npy` into `folder`; returns its entry for index.json.

    samples: (key, ids uint16 [n_ecgs, n_tokens], json-able dict), written in the order given, `shard_size` to a tar.
    Raises ValueError for a key that is no safe member name, a repeated key, or ids that are not uint16 [n, t].
    """
    shards, rows, seen, tar = [], [], set(), None
    for key, ids, meta in samples:
        if not KEY.fullmatch(key):
            raise ValueError(f"key {key!r}: letters, digits, '_' and '-' only")
        if key in seen:
            raise ValueError(f"key {key!r} appears twice in split {split}")
        if ids.dtype != np.uint16 or ids.ndim != 2:
            raise ValueError(f"{key}: ids must be uint16 [n_ecgs, n_tokens], got {ids.dtype} {list(ids.shape)}")
        seen.add(key)
        if tar is None or shards[-1]["samples"] == shard_size:
            if tar is not None:
                tar.close()
            shards.append({"name": f"{split}-{len(shards):06d}.tar", "samples": 0, "tokens": 0})
            tar = tarfile.open(folder / shards[-1]["name"], "w", format=tarfile.USTAR_FORMAT)
        npy, text = io.BytesIO(), json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
        np.lib.format.write_array(npy, np.ascontiguousarray(ids), version=(1, 0), allow_pickle=False)
        npy_offset, json_offset = _add(tar, f"{key}.ecg.npy", npy.getvalue()), _add(tar, f"{key}.json", text)
        rows.append((len(shards) - 1, npy_offset + len(npy.getvalue()) - ids.nbytes, *ids.shape, json_offset, len(text)))
        shards[-1]["samples"] += 1
        shards[-1]["tokens"] += int(ids.size)
    if tar is not None:
        tar.close()
    np.save(folder / f"{split}.index.npy", np.array(rows, INDEX_DTYPE), allow_pickle=False)
    for shard in shards:
        with open(folder / shard["name"], "rb") as f:
            shard["sha256"] = hashlib.sha256(f.read()).hexdigest()  # a shard is some ten MB
    return {"samples": len(rows), "tokens": sum(s["tokens"] for s in shards), "shards": shards}


def write_index(folder: Path, splits: dict[str, dict], **once) -> None:
    """Write index.json: `splits` from `write_split`, and what is said once for the folder (tokenizer fingerprint, ...)."""
    index = {"format_version": FORMAT_VERSION, **once, "splits": splits}
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without time or owner; returns the byte offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset
