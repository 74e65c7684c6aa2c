"""Join tasks to the ECGs of token shards: a task belongs to the split of its ECG, whatever folder it was read from."""

from collections import Counter, defaultdict

import numpy as np

from toolkit.shards.reader import Shards

Joined = dict[tuple[str, tuple[str, ...]], list[dict]]  # (split, ECG ids) -> tasks


class ECGs:
    """The ECGs of token shards by record id: `place[record id] = (split, index)`, `metas[split][index]`."""

    def __init__(self, shards: dict[str, Shards]):
        self.shards = shards
        self.metas = {split: [reader.meta(i) for i in range(len(reader))] for split, reader in shards.items()}
        self.place = {meta["record_id"]: (split, i) for split, metas in self.metas.items() for i, meta in enumerate(metas)}


def report_tasks(ecgs: ECGs) -> list[dict]:
    """One task for each ECG that has a report."""
    metas = (meta for split in ecgs.metas.values() for meta in split if meta["report"])
    kind = {"task": "report", "question_type": "report"}
    return [{"id": f"report-{m['record_id']}", **kind, "report": m["report"], "ecg_ids": (m["record_id"],)} for m in metas]


def join(tasks: list[dict], ecgs: ECGs) -> tuple[Joined, Counter]:
    """Tasks by split and ECGs, and how many were joined or left out and why. No task is dropped without being counted."""
    joined, counts = defaultdict(list), Counter()
    for task in tasks:
        splits = {ecgs.place[e][0] if e in ecgs.place else None for e in task["ecg_ids"]}
        if None in splits or not splits:
            counts["left out, ECG not in the shards"] += 1
        elif len(splits) > 1:
            counts["left out, its two ECGs are in different splits"] += 1
        elif task["task"] == "ecgqa" and not task["answer"]:
            counts["left out, no answer"] += 1
        else:
            joined[splits.pop(), task["ecg_ids"]].append(task)
            counts["joined"] += 1
    return joined, counts


def keep_other_tasks(made: dict[str, Shards], kind: str, joined: Joined) -> None:
    """Add to `joined` the tasks of other kinds than `kind` that task shards made from the same token shards hold."""
    for split, reader in made.items():
        for i in range(len(reader)):
            meta = reader.meta(i)
            kept = [{**task, "ecg_ids": tuple(meta["record_ids"])} for task in meta["tasks"] if task["task"] != kind]
            if kept:
                joined[split, tuple(meta["record_ids"])] += kept


def samples(split: str, joined: Joined, ecgs: ECGs):
    """(key, ids uint16 [n_ecgs, 313], json) of each ECG or pair of ECGs in the split, in order of their ids; tasks in order of kind and id."""
    for ecg_ids, tasks in sorted(((ids, ts) for (s, ids), ts in joined.items() if s == split), key=lambda group: group[0]):
        places = [ecgs.place[e][1] for e in ecg_ids]
        first = ecgs.metas[split][places[0]]
        meta = {
            "source": first["source"],
            "split": split,
            "record_ids": list(ecg_ids),
            "patients": [ecgs.metas[split][p]["patient"] for p in places],
            "tasks": [{k: v for k, v in task.items() if k != "ecg_ids"} for task in sorted(tasks, key=lambda t: (t["task"], t["id"]))],
        }
        yield "_".join([first["source"], *ecg_ids]), np.concatenate([ecgs.shards[split].ids(p) for p in places]), meta
