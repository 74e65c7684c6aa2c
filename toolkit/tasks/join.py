"""Join tasks to the ECGs of token shards: a task belongs to the split of its ECG, whatever folder it was read from."""

import hashlib
import json
from collections import Counter, defaultdict

import numpy as np

from toolkit.shards.reader import Shards
from toolkit.shards.writer import KEY

OLDEST = 90.0  # years
Joined = dict[tuple[str, tuple[str, ...]], list[dict]]  # (split, ECG ids) -> tasks


class ECGs:
    """The ECGs of token shards by record id: `place[record id] = (split, index)`; of a record's windows the first."""

    def __init__(self, shards: dict[str, Shards]):
        self.shards, self.place = shards, {}
        self.digest = next(iter(shards.values())).digest  # of the whole folder
        for split, reader in shards.items():
            for i in range(len(reader)):
                self.place.setdefault(reader.meta(i)["record_id"], (split, i))

    def meta(self, record: str) -> dict:
        split, i = self.place[record]
        return self.shards[split].meta(i)


def report_tasks(ecgs: ECGs) -> list[dict]:
    """One task for each ECG that has a report."""
    reports = ((record, ecgs.meta(record)["report"]) for record in ecgs.place)
    kind = {"task": "report", "question_type": "report"}
    return [{"id": f"report-{record}", **kind, "report": report, "ecg_ids": (record,)} for record, report in reports if report]


def join(tasks: list[dict], ecgs: ECGs) -> tuple[Joined, Counter]:
    """Tasks by split and ECGs, and how many were joined or left out and why. No task is dropped without being counted; `left_out` lists them."""
    joined, counts = defaultdict(list), Counter()
    for task in tasks:
        reason = why_left_out(task, ecgs)
        if reason:
            counts[f"left out, {reason}"] += 1
        else:
            joined[ecgs.place[task["ecg_ids"][0]][0], task["ecg_ids"]].append(task)
            counts["joined"] += 1
    return joined, counts


def why_left_out(task: dict, ecgs: ECGs) -> str | None:
    """The reason why a task cannot be in the shards, None if it can."""
    splits = {ecgs.place[e][0] if e in ecgs.place else None for e in task["ecg_ids"]}
    if None in splits or not splits:
        return "ECG not in the shards"
    if len(splits) > 1:
        return "its two ECGs are in different splits"
    if task["task"] == "ecgqa" and not task["answer"]:
        return "no answer"
    if task["task"] == "report" and not task["report"]:
        return "no report"
    return None


def left_out(tasks: list[dict], ecgs: ECGs) -> list[dict]:
    """A line for each task that `join` leaves out: id, task, question_type, missing (its record ids that the shards do not have), reason."""
    lines = []
    for task in tasks:
        if reason := why_left_out(task, ecgs):
            missing = [record for record in task["ecg_ids"] if record not in ecgs.place]
            lines.append({"id": task["id"], "task": task["task"], "question_type": task["question_type"], "missing": missing, "reason": reason})
    return lines


def keep_other_tasks(made: dict[str, Shards], kinds: set[str], joined: Joined) -> None:
    """Add to `joined` the tasks of other kinds than `kinds` that task shards made from the same token shards hold."""
    for split, reader in made.items():
        for i in range(len(reader)):
            meta = reader.meta(i)
            kept = [{**task, "ecg_ids": tuple(meta["record_ids"])} for task in meta["tasks"] if task["task"] not in kinds]
            if kept:
                joined[split, tuple(meta["record_ids"])] += kept


def told_age(age: float | None) -> float | None:
    """Years, 90 for 90 and more, as PTB-XL (300) and MIMIC-IV (91) write one number for all over 89: a true one points at few people; None if unknown."""
    return None if age is None else min(age, OLDEST)


def samples(split: str, joined: Joined, ecgs: ECGs):
    """(key, ids uint16 [n_ecgs, 313], json) of each ECG or pair of ECGs in the split, in order of their ids; tasks in order of kind and id."""
    for ecg_ids, tasks in sorted(((ids, ts) for (s, ids), ts in joined.items() if s == split), key=lambda group: group[0]):
        places = [ecgs.place[e][1] for e in ecg_ids]
        metas = [ecgs.meta(e) for e in ecg_ids]
        source = metas[0]["source"]
        meta = {
            "source": source,
            "split": split,
            "record_ids": list(ecg_ids),
            "patients": [meta["patient"] for meta in metas],
            "gains": [meta["gains"][0] for meta in metas],
            "ages": [told_age(meta.get("age")) for meta in metas],
            "sexes": [meta.get("sex", "") for meta in metas],
            "sites": [meta.get("site", "") for meta in metas],  # token shards of before have none
            "labels": [meta.get("labels", []) for meta in metas],
            "tasks": [{k: v for k, v in task.items() if k != "ecg_ids"} for task in sorted(tasks, key=lambda t: (t["task"], t["id"]))],
        }
        key = "_".join([source, *ecg_ids]) if len(ecg_ids) > 1 else ecgs.shards[split].key(places[0])
        if len(ecg_ids) > 1 and ("_" in "".join(ecg_ids) or not KEY.fullmatch(key)):  # a_b and c would be called like a and b_c
            key = f"{source}_{hashlib.blake2s(json.dumps(ecg_ids).encode(), digest_size=8).hexdigest()}"
        yield key, np.concatenate([ecgs.shards[split].ids(p) for p in places]), meta
