"""Is a shard what index.json says of it? From its size and sha256 alone, or read member by member with `tarfile`."""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np

from toolkit.ecg.leads import LEADS
from toolkit.errors import UserError
from toolkit.shards.reader import fault, locate
from toolkit.shards.remote import CACHE, CACHE_GB
from toolkit.shards.writer import INDEX_DTYPE, KEY, sha256_of


def find_bad(
    folder: str | Path, split: str, part: int, parts: int, flag: str = "--shards", cache: str | Path = CACHE, cache_gb: float = CACHE_GB
) -> list[str]:
    """Names of the split's shards that are missing or differ from index.json in size or sha256, among every `parts`-th from `part` on.

    A URL's shards are downloaded for this; bad ones are those that cannot be had right. Raises UserError if the index cannot be read.
    """
    mirror, folder, index = locate(folder, flag, cache, cache_gb)
    bad = []
    for entry in index["splits"].get(split, {"shards": []})["shards"][part::parts]:
        if mirror:
            try:
                mirror.fetch(entry["name"], entry["bytes"], entry["sha256"], recheck=True)
            except UserError as error:
                if "--shard_cache" in str(error):  # a full disk of this machine is no fault of the shard
                    raise
                bad.append(entry["name"])
        elif fault(folder / entry["name"], entry):
            bad.append(entry["name"])
    return bad


def check_shard(folder: Path, split: str, index: dict, number: int) -> tuple[list[str], list[str]]:
    """(what is wrong with shard `number` of the split, its keys), the tar read by `tarfile` and held against the split's index rows."""
    entry = index["splits"][split]["shards"][number]
    path, faults, rows, keys, tokens = folder / entry["name"], [], [], [], 0
    faults += [text] if (text := fault(path, entry)) else []
    if text == "is missing":
        return faults, keys
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            for ids_member, json_member in zip(members[::2], members[1::2]):
                key = ids_member.name.removesuffix(".ecg.npy")
                if (ids_member.name, json_member.name) != (f"{key}.ecg.npy", f"{key}.json") or not KEY.fullmatch(key):
                    raise ValueError(f"members {ids_member.name!r} and {json_member.name!r} are no sample")
                if not (ids_member.isreg() and json_member.isreg()):
                    raise ValueError(f"{key} is no plain file")
                npy = tar.extractfile(ids_member).read()
                ids = np.load(io.BytesIO(npy), allow_pickle=False)
                meta = json.loads(tar.extractfile(json_member).read())
                faults += [f"{key}: {what}" for what in _sample_faults(ids, meta, split, index)]
                rows.append((number, ids_member.offset_data + len(npy) - ids.nbytes, *ids.shape, json_member.offset_data, json_member.size))
                keys.append(key)
                tokens += ids.size
            if len(members) % 2:
                raise ValueError(f"{members[-1].name!r} has no partner")
    # wide: damage can be anywhere, and numpy, json and tarfile each have their own errors for it
    except Exception as error:
        return [*faults, f"does not read ({type(error).__name__}: {error})"], keys
    if (len(rows), tokens) != (entry["samples"], entry["tokens"]):
        faults.append(f"has {len(rows):,} samples and {tokens:,} tokens, not {entry['samples']:,} and {entry['tokens']:,}")
    try:
        indexed = np.load(folder / f"{split}.index.npy", mmap_mode="r", allow_pickle=False)
        # rows stand in order of shard; searching the whole column for one shard would read it 200 times over
        start = sum(shard["samples"] for shard in index["splits"][split]["shards"][:number])
        if not np.array_equal(indexed[start : start + entry["samples"]], np.array(rows, INDEX_DTYPE)):
            faults.append(f"differs from its rows in {split}.index.npy")
    except (OSError, ValueError):
        pass  # said once for the split, by `check_split`
    return faults, keys


def _sample_faults(ids: np.ndarray, meta: dict, split: str, index: dict) -> list[str]:
    if ids.dtype != np.uint16 or ids.ndim != 2 or not ids.size:
        return [f"ids are {ids.dtype} {list(ids.shape)}, not uint16 [n_ecgs, n_tokens]"]
    faults = []
    if ids.shape[1] != index.get("tokens_per_ecg", ids.shape[1]):
        faults.append(f"{ids.shape[1]} tokens an ECG, not {index['tokens_per_ecg']}")
    if ids.max() >= index.get("codes", 1 << 16):
        faults.append(f"token id {ids.max()} is not below {index['codes']}")
    if meta.get("split", split) != split:
        faults.append(f"its json says split {meta['split']!r}")
    if index["kind"] == "tasks" and len(meta["record_ids"]) != len(ids):
        faults.append(f"{len(ids)} ECGs, {len(meta['record_ids'])} record_ids")
    gains = meta.get("gains", [])
    if len(gains) != len(ids) or not all(len(ecg) == len(LEADS) and all(0 < gain < math.inf for gain in ecg) for ecg in gains):
        faults.append(f"its gains are not {len(ids)} times {len(LEADS)} amplitudes in mV")
    return faults


def check_split(folder: Path, split: str, index: dict) -> list[str]:
    """What is wrong with `<split>.index.npy` and the split's totals in index.json."""
    entry, path, faults = index["splits"][split], folder / f"{split}.index.npy", []
    for what in ("samples", "tokens"):
        total = sum(shard[what] for shard in entry["shards"])
        if total != entry[what]:
            faults.append(f"index.json counts {entry[what]:,} {what} in {split}, its shards {total:,}")
    try:
        if sha256_of(path) != entry["index_sha256"]:
            faults.append(f"{path.name} has another sha256 than index.json says")
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != INDEX_DTYPE or len(rows) != entry["samples"]:
            faults.append(f"{path.name} has {len(rows):,} rows of {len(rows.dtype)} columns, not {entry['samples']:,} of {len(INDEX_DTYPE)}")
    except (OSError, ValueError) as error:
        faults.append(f"{path.name} does not load ({error})")
    return faults
