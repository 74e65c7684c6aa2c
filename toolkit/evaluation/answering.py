"""Answer every task of a split on all ranks: each exactly once, written down batch by batch, so that a killed run goes on where it was.

Batches are those of the whole split, whatever the number of ranks: rank r of w takes the batches r, r + w, ... of what is left. So the same answers come
from any number of ranks, also when a run is continued on another one; to the last digit with as many threads a rank (OMP_NUM_THREADS). After each round, a
batch a rank, rank 0 appends the rows of all ranks to predictions.jsonl and brings them to the disk: a kill costs at most the batch that each rank is at.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from tqdm import tqdm

from toolkit.errors import UserError
from toolkit.evaluation.metrics import check_question_type
from toolkit.files import write_text
from toolkit.lm.backbone import STAMP
from toolkit.shards.reader import Shards
from toolkit.training.distributed import Ranks

MADE, PREDICTIONS, METRICS = "evaluation.json", "predictions.jsonl", "metrics.json"
SAY = 30  # seconds between two lines of progress where there is no terminal for a bar
REPORT_LENGTH = 1000  # characters that the words asking for a report count as in the order of batches: its answer is the longest


class Asked(NamedTuple):
    """What is to be known of a sample before it is answered."""

    n_ecgs: int
    patients: tuple[str, ...]  # of each ECG
    tasks: int
    longest: int  # characters of a question
    templates: frozenset[int]


def survey(shards: Shards) -> list[Asked]:
    """Of every sample of task shards, in their order. Raises UserError naming --shards for a question type that could not be judged after all."""
    found = []
    for i in range(len(shards)):
        meta = shards.meta(i)
        for task in meta["tasks"]:
            if task["task"] == "ecgqa":
                check_question_type(task["question_type"], f"--shards: question {task['id']!r}")
        longest = max(len(task["question"]) if task["task"] == "ecgqa" else REPORT_LENGTH for task in meta["tasks"])
        templates = frozenset(task["template_id"] for task in meta["tasks"] if task["task"] == "ecgqa")
        found.append(Asked(int(shards.rows[i]["n_ecgs"]), tuple(meta["patients"]), len(meta["tasks"]), longest, templates))
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
    total, said = sum(one.tasks for one in asked), time.time()
    if rows:
        print(f"{len(rows):,} of {total:,} answers are there already", flush=True)
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
                if bar.disable and time.time() - said > SAY:
                    said = time.time()
                    print(f"{len(rows):,} of {total:,} answers", flush=True)
    rows.sort(key=lambda row: row["sample"])  # stable: the tasks of a sample stay in their order
    return rows


def check_same(folder: Path, made: dict) -> None:
    """Raises UserError if the folder holds, or began, another evaluation, naming what is different."""
    if (folder / STAMP).exists() or (folder / "log.jsonl").exists():
        raise UserError(f"--output_dir {folder} holds a training run or a model; name a new folder")
    path, answered = folder / MADE, (folder / PREDICTIONS).exists() or (folder / METRICS).exists()
    if not answered:
        return
    if not path.is_file():
        raise UserError(f"--output_dir {folder} holds an evaluation of an older version; name a new folder")
    try:
        before = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"--output_dir {folder}: {path.name} is damaged; name a new folder") from None
    differ = [f"{name} {before.get(name)!r}, not {made.get(name)!r}" for name in made | before if before.get(name) != made.get(name)]
    if differ:
        raise UserError(f"--output_dir {folder} holds the evaluation with {'; '.join(differ)}; name a new folder")


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
