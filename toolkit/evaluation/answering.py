"""Answer every task of a split on all ranks: each exactly once, written down batch by batch, so that a killed run goes on where it was.

Batches are those of the whole split, whatever the number of ranks: rank r of w takes the batches r, r + w, ... of what is left. So the same answers, to the
last digit, come from any number of ranks, also when a run is continued on another one. After each round rank 0 appends the rows of all ranks to
predictions.jsonl and brings them to the disk.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from tqdm import tqdm

from toolkit.files import write_text
from toolkit.shards.reader import Shards
from toolkit.training.distributed import Ranks

PREDICTIONS = "predictions.jsonl"
REPORT_LENGTH = 1000  # characters that the words asking for a report count as in the order of batches: its answer is the longest


class Asked(NamedTuple):
    """What is to be known of a sample before it is answered."""

    n_ecgs: int
    patient: str  # of two ECGs the first one's
    tasks: int
    longest: int  # characters of a question


def survey(shards: Shards) -> list[Asked]:
    """Of every sample of task shards, in their order."""
    found = []
    for i in range(len(shards)):
        meta = shards.meta(i)
        longest = max(len(task["question"]) if task["task"] == "ecgqa" else REPORT_LENGTH for task in meta["tasks"])
        found.append(Asked(int(shards.rows[i]["n_ecgs"]), meta["patients"][0], len(meta["tasks"]), longest))
    return found


def plan(asked: list[Asked], size: int) -> list[list[int]]:
    """Places of the samples of each batch: those of a batch have as many ECGs and about as long prompts, so that little is padded. The longest come first:
    what does not fit in memory is known at once, and the last batches, in which ranks wait for each other, are short.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(asked)), key=lambda i: (-asked[i].n_ecgs, -asked[i].longest, -asked[i].tasks, i)):
        if batches and len(batches[-1]) < size and asked[batches[-1][0]].n_ecgs == asked[i].n_ecgs:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def answer_all(folder: Path, asked: list[Asked], size: int, answer: Callable[[Sequence[int]], list[dict]], ranks: Ranks) -> list[dict]:
    """All rows of predictions.jsonl in the order of samples, on rank 0; [] elsewhere. Collective.

    answer: the rows of a batch of at most `size` samples, each with the `sample` it is of. A batch of which predictions.jsonl holds all rows is not answered
    again; those of one that was cut off are.
    """
    path, batches = folder / PREDICTIONS, plan(asked, size)
    rows = _whole_batches(path, batches, asked) if ranks.main else []
    done = [{row["sample"] for row in rows}]
    dist.broadcast_object_list(done, 0)
    left = [batch for batch in batches if batch[0] not in done[0]]
    total = sum(one.tasks for one in asked)
    with tqdm(total=total, initial=len(rows), desc="evaluate", unit="answer", disable=None if ranks.main else True) as bar:
        for start in range(0, len(left), ranks.world):
            mine = left[start : start + ranks.world][ranks.rank : ranks.rank + 1]
            found = [row for batch in mine for row in answer(batch)]
            parts = [None] * ranks.world if ranks.main else None
            dist.gather_object(found, parts)
            if ranks.main:
                new = [row for part in parts for row in part]
                _append(path, new)
                rows += new
                bar.update(len(new))
    rows.sort(key=lambda row: row["sample"])  # stable: the tasks of a sample stay in their order
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Put a whole file in the place of what was appended, in the order of the rows."""
    write_text(path, "".join(map(_line, rows)))


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(_line, rows)))
        file.flush()
        os.fsync(file.fileno())


def _whole_batches(path: Path, batches: list[list[int]], asked: list[Asked]) -> list[dict]:
    """The rows of the batches that an earlier run brought to their end, in the order of its file; the file then holds these alone."""
    if not path.is_file():
        return []
    found = defaultdict(list)
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            found[row["sample"]].append(row)
        except (ValueError, KeyError, TypeError):  # what a kill, or a full disk, left of it
            continue
    whole = [batch for batch in batches if all(len(found[i]) == asked[i].tasks for i in batch)]
    rows = [row for batch in whole for i in batch for row in found[i]]
    write_rows(path, rows)
    return rows
