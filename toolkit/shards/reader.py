"""Random access to a folder of shards: memory-mapped tars, read by offset.

    shards = Shards.open("runs/demo/shards", "train")             # or a URL: see remote.py
    ids, meta = shards.ids(17), shards.meta(17)                   # uint16 [n_ecgs, 313], dict
"""

import bisect
import hashlib
import json
import mmap
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import numpy as np

from toolkit.errors import UserError
from toolkit.shards.remote import CACHE, CACHE_GB, Mirror, is_url
from toolkit.shards.writer import FORMAT_VERSION, INDEX_DTYPE, TOKENIZER_FILES, sha256_of

SHARD_NAME = re.compile(r"[a-z]+-\d{6}\.tar")
MAKERS = {"tokens": "sharding.shard", "tasks": "sharding.shard_tasks"}
OPEN_MAPS = 256  # 196 tars of 4096 hold 800,000 samples; a process may have 1,024 open files
TOKENS = np.dtype("<u2")


def how_to_mend(kind: str, name: str) -> str:
    """How a user gets a damaged file of a folder of shards back."""
    if kind == "tasks":
        return "copy it again, or delete the folder and run the same `python -m sharding.shard_tasks` commands again"
    what = "it" if name.endswith(".tar") else "index.json"  # without which `shard` writes all but the tars again
    return f"copy it again, or delete {what} and run the same `python -m sharding.shard` command again"


def read_index(folder: str | Path, flag: str = "--shards", mend: str = "make shards with `python -m sharding.shard` first") -> dict:
    """index.json of a local folder of shards. Raises UserError naming `flag` and the mend."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise UserError(f"{flag}: {folder} has no index.json; {mend}")
    return _parse_index(path.read_bytes(), str(path), flag)


def _parse_index(text: bytes, where: str, flag: str) -> dict:
    """Names are checked, because they become paths: an index must not make us open files elsewhere."""
    try:
        index = json.loads(text)
        version = index["format_version"]
        if version == FORMAT_VERSION:
            splits = index["splits"]
            shards = [shard for entry in splits.values() for shard in entry["shards"]]
            names = [shard["name"] for shard in shards]
            good = (
                index["kind"] in MAKERS
                and isinstance(index.get("codes", 0), int)
                and all(isinstance(entry["samples"], int) and isinstance(entry["index_sha256"], str) for entry in splits.values())
                and all(isinstance(shard[what], int) for shard in shards for what in ("samples", "tokens", "bytes"))
                and all(isinstance(shard["sha256"], str) for shard in shards)
                and all(map(re.compile("[a-z]+").fullmatch, splits))
                and all(map(SHARD_NAME.fullmatch, names))
                and len(set(names)) == len(names)
                and set(index.get("tokenizer_files", {})) <= set(TOKENIZER_FILES)
            )
            if not good:
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{flag}: {where} is damaged; copy it again or make the shards again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{flag}: {where} has format version {version}, this code reads {FORMAT_VERSION}; make the shards again")
    return index


class Shards:
    """One split of a shard folder. `len()`, `ids(i)`, `meta(i)`, `key(i)`. Tars are mapped when they are first read."""

    def __init__(self, folder: Path, split: str, index: dict, rows: np.ndarray, mirror: Mirror | None):
        self.folder, self.split, self.index, self.rows = folder, split, index, rows
        self._mirror = mirror
        self._map, self._checked = lru_cache(OPEN_MAPS)(self._open_map), set()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        split: str,
        flag: str = "--shards",
        kind: str | None = None,
        skip: Collection[str] = (),
        cache: str | Path = CACHE,
        cache_gb: float = CACHE_GB,
    ) -> "Shards":
        """Raises UserError if the folder, the split or one of its shards is missing or has another size, or not of the `kind` (tokens, tasks).

        skip: names of shards to leave out: their samples do not exist for the reader, the others keep their order.
        cache, cache_gb: where the files of a URL are kept, and how many GB of tars; a tar is downloaded when its first sample is read.
        """
        mirror, folder, index = locate(folder, flag, cache, cache_gb)
        where = mirror.url if mirror else folder
        if kind not in (None, index["kind"]):
            raise UserError(f"{flag}: {where} holds {index['kind']}, not {kind}; name the output of `python -m {MAKERS[kind]}`")
        if split not in index["splits"] or not index["splits"][split]["samples"]:
            raise UserError(f"{flag}: {where} has no samples in split {split!r}; it has {_sizes(index)}: make it from more records")
        entry = index["splits"][split]
        rows = _read_rows(folder, split, entry, mirror, flag)
        if mirror:
            for name, file in index.get("tokenizer_files", {}).items():
                mirror.fetch(f"tokenizer/{name}", file["bytes"], file["sha256"])
        for shard in entry["shards"]:
            if not mirror and shard["name"] not in skip:
                _check_size(folder / shard["name"], shard["bytes"], index["kind"], flag)
        if skip:
            rows = rows[~np.isin(rows["shard"], [i for i, shard in enumerate(entry["shards"]) if shard["name"] in skip])]
        if not len(rows):
            raise UserError(f"{flag}: {where} has no samples in split {split!r} beside those of the shards left out")
        return cls(folder, split, index, rows, mirror)

    @property
    def digest(self) -> str:
        """16 hex digits over index.json, which holds the sha256 of every shard; where the manifest lay does not count."""
        said = {name: value for name, value in self.index.items() if name != "manifest"}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, i: int) -> np.ndarray:
        """uint16 [n_ecgs, n_tokens], a view of the memory map. Raises UserError when its tar is first read and is not what index.json says."""
        shard, offset, n_ecgs, n_tokens, _, _ = self.rows.item(i)
        return np.ndarray((n_ecgs, n_tokens), TOKENS, self._map(shard), offset)

    def meta(self, i: int) -> dict:
        """The sample's json member. Raises as `ids`."""
        shard, _, _, _, offset, length = self.rows.item(i)
        return json.loads(self._map(shard)[offset : offset + length].decode())

    def key(self, i: int) -> str:
        """The sample's key, as its json's tar member is named."""
        shard, _, _, _, offset, _ = self.rows.item(i)
        return self._map(shard)[offset - 512 : offset - 412].split(b"\0", 1)[0].decode("ascii", "replace").removesuffix(".json")

    def find(self, key: str) -> int | None:
        """The place of a key, None if it is not in the split. Token shards are in order of key: 20 names decide among 800,000. Others are scanned."""
        i = bisect.bisect_left(range(len(self)), key, key=self.key)
        if i < len(self) and self.key(i) == key:
            return i
        return next((i for i in range(len(self)) if self.key(i) == key), None)

    def shard_of(self, i: int) -> dict:
        """The entry of index.json of the shard that holds sample i."""
        return self.index["splits"][self.split]["shards"][self.rows["shard"][i]]

    def _open_map(self, shard: int) -> mmap.mmap:
        entry = self.index["splits"][self.split]["shards"][shard]
        path = self.folder / entry["name"]
        for _ in range(3):
            if self._mirror:
                if not path.is_file():
                    self._map.cache_clear()  # the maps of tars that make room for this one would keep their disk space
                self._mirror.fetch(entry["name"], entry["bytes"], entry["sha256"])
            if shard not in self._checked:  # once a process: 7 ms for 11 MB, and no flipped bit is ever trained on
                wrong = fault(path, entry)
                if wrong and self._mirror:  # the copy went bad after it was checked
                    path.unlink(missing_ok=True)
                    continue
                if wrong:
                    raise UserError(f"--shards: {path} {wrong}; {how_to_mend(self.index['kind'], entry['name'])}")
                self._checked.add(shard)
            try:
                with open(path, "rb") as f:
                    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError:  # another process made room between the two lines
                pass
        raise UserError(f"--shards: {path} vanishes as soon as it is there; " + ("raise --shard_cache_gb" if self._mirror else "copy it again"))


def fault(path: Path, entry: dict) -> str:
    """What is wrong with a file whose `bytes` and `sha256` are known, '' if nothing."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size:,} bytes, not {entry['bytes']:,}"
        return "" if sha256_of(path) == entry["sha256"] else "has another sha256 than index.json says"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def locate(folder: str | Path, flag: str, cache: str | Path = CACHE, cache_gb: float = CACHE_GB) -> tuple[Mirror | None, Path, dict]:
    """(mirror of a URL or None, local folder, index) of a shard folder."""
    if not is_url(folder):
        return None, Path(folder), read_index(folder, flag)
    mirror = Mirror.open(folder, cache, cache_gb, flag)
    return mirror, mirror.folder, _parse_index((mirror.folder / "index.json").read_bytes(), f"{mirror.url}/index.json", flag)


def _read_rows(folder: Path, split: str, entry: dict, mirror: Mirror | None, flag: str) -> np.ndarray:
    """The memory-mapped rows of a split: 22 MB for 800,000 samples, 16 ms to check their sha256, after which every offset can be trusted."""
    path = folder / f"{split}.index.npy"
    try:
        if mirror:
            mirror.fetch(path.name, None, entry["index_sha256"], recheck=True)
        elif sha256_of(path) != entry["index_sha256"]:
            raise ValueError("another sha256 than index.json says")
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != INDEX_DTYPE or len(rows) != entry["samples"]:
            raise ValueError("it does not belong to index.json")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{flag}: {path} does not load ({error}); copy it again or make the shards again") from None
    return rows.view(np.ndarray)


def _check_size(path: Path, size: int, kind: str, flag: str) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        fault = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
        raise UserError(f"{flag}: {path} {fault}; {how_to_mend(kind, path.name)}")


def _sizes(index: dict) -> str:
    return ", ".join(f"{name} ({entry['samples']})" for name, entry in index["splits"].items()) or "no splits at all"
