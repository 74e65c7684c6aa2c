"""Random access to a folder of shards: memory-mapped tars, read by offset.

    shards = Shards.open("runs/demo/shards", "train")
    ids, meta = shards.ids(17), shards.meta(17)      # uint16 [n_ecgs, 313], dict
"""

import json
import mmap
from pathlib import Path

import numpy as np

from toolkit.errors import UserError
from toolkit.files import digest
from toolkit.shards.writer import FORMAT_VERSION, INDEX_DTYPE


def read_index(folder: str | Path, flag: str = "--shards", mend: str = "make shards with `python -m sharding.shard` first") -> dict:
    """index.json of a folder of shards. Raises UserError naming `flag` and the mend."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise UserError(f"{flag}: {folder} has no index.json; {mend}")
    try:
        index = json.loads(path.read_text())
        version = index["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{flag}: {path} is damaged; make the shards again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{flag}: {path} has format version {version}, this code reads {FORMAT_VERSION}; make the shards again")
    return index


class Shards:
    """One split of a shard folder. `len()`, `ids(i)`, `meta(i)`. The index is memory-mapped; opening makes one pass over it."""

    def __init__(self, folder: Path, split: str, index: dict, rows: np.ndarray, maps: list[mmap.mmap]):
        self.folder, self.split, self.index, self.rows, self._maps = folder, split, index, rows, maps

    @classmethod
    def open(cls, folder: str | Path, split: str, flag: str = "--shards", kind: str | None = None) -> "Shards":
        """Raises UserError if the folder, the split or one of its shards is missing or cut short, or not of the `kind` (tokens, tasks)."""
        folder, index = Path(folder), read_index(folder, flag)
        if kind not in (None, index["kind"]):
            maker = {"tokens": "sharding.shard", "tasks": "sharding.shard_tasks"}[kind]
            raise UserError(f"{flag}: {folder} holds {index['kind']}, not {kind}; name the output of `python -m {maker}`")
        if split not in index["splits"] or not index["splits"][split]["samples"]:
            raise UserError(f"{flag}: {folder} has no samples in split {split!r}; it has {_sizes(index)}")
        try:
            rows = np.load(folder / f"{split}.index.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{flag}: {folder}/{split}.index.npy does not load ({error}); make the shards again") from None
        if rows.dtype != INDEX_DTYPE or len(rows) != index["splits"][split]["samples"]:
            raise UserError(f"{flag}: {folder}/{split}.index.npy does not belong to index.json; make the shards again")
        ends = np.zeros(len(index["splits"][split]["shards"]), np.int64)
        np.maximum.at(ends, rows["shard"], (rows["json_offset"] + rows["json_length"]).astype(np.int64))
        maps = []
        for shard, end in zip(index["splits"][split]["shards"], ends):
            path = folder / shard["name"]
            if not path.is_file() or path.stat().st_size < end:
                raise UserError(f"{flag}: {path} is missing or cut short; copy it again or make the shards again")
            with open(path, "rb") as f:
                maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        return cls(folder, split, index, rows, maps)

    @property
    def digest(self) -> str:
        """16 hex digits over index.json, which holds the sha256 of every shard."""
        return digest(self.folder / "index.json")

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, i: int) -> np.ndarray:
        """uint16 [n_ecgs, n_tokens], a view of the memory map."""
        row = self.rows[i]
        n, t = int(row["n_ecgs"]), int(row["n_tokens"])
        return np.frombuffer(self._maps[row["shard"]], "<u2", n * t, int(row["ids_offset"])).reshape(n, t)

    def meta(self, i: int) -> dict:
        """The sample's json member."""
        row = self.rows[i]
        start = int(row["json_offset"])
        return json.loads(self._maps[row["shard"]][start : start + int(row["json_length"])])


def _sizes(index: dict) -> str:
    return ", ".join(f"{name} ({entry['samples']})" for name, entry in index["splits"].items()) or "no splits at all"
