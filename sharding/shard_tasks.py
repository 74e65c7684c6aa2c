"""Join questions and reports to token shards: one sample an ECG (or pair of ECGs) with all its tasks in the json member.

python -m sharding.shard_tasks ecgqa --qa runs/demo/data/ecgqa --shards runs/demo/shards --out runs/demo/tasks
python -m sharding.shard_tasks reports --shards runs/demo/shards --out runs/demo/tasks      # adds to the same folder

A task belongs to the split of its ECG in the token shards, whatever folder it was read from: one patient-level split over all tasks.
"""

import argparse
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import new_folder
from toolkit.shards.reader import Shards, read_index
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.ecgqa import read_ecgqa

ONCE = ("tokenizer", "tokens_per_ecg", "codes", "levels", "dims", "manifest", "shard_size")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("ecgqa", "reports"), help="ecgqa: questions of --qa; reports: the manifest's report column")
    parser.add_argument("--qa", type=Path, help="folder with ECG-QA 1.0.2 json files, for example ecgqa/ptbxl/template")
    parser.add_argument("--shards", required=True, type=Path, help="token shards written by `python -m sharding.shard`")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for the task shards; tasks of the other kind that it holds are kept"
    )
    args = parser.parse_args(argv)
    if (args.kind == "ecgqa") != (args.qa is not None):
        raise UserError("--qa: goes with `ecgqa`, and only with it")
    index = read_index(args.shards)
    if args.out.resolve() == args.shards.resolve():
        raise UserError("--out: must be another folder than --shards")

    ecgs = {}  # record id -> (split, place in it)
    shards = {split: Shards.open(args.shards, split, kind="tokens") for split, entry in index["splits"].items() if entry["samples"]}
    metas = {
        split: [reader.meta(i) for i in tqdm(range(len(reader)), desc=f"read {split}", unit="ECG")] for split, reader in shards.items()
    }
    for split, rows in metas.items():
        ecgs.update({meta["record_id"]: (split, i) for i, meta in enumerate(rows)})

    counts = Counter()
    if args.kind == "ecgqa":
        tasks = read_ecgqa(args.qa)
    else:
        tasks = [
            {
                "id": f"report-{meta['record_id']}",
                "task": "report",
                "question_type": "report",
                "report": meta["report"],
                "ecg_ids": (meta["record_id"],),
            }
            for rows in metas.values()
            for meta in rows
            if meta["report"]
        ]
    joined = defaultdict(list)  # (split, ecg ids) -> tasks
    for task in tasks:
        splits = {ecgs[e][0] if e in ecgs else None for e in task["ecg_ids"]}
        if None in splits:
            counts["ECG not in the shards"] += 1
        elif len(splits) > 1:
            counts["its two ECGs are in different splits"] += 1
        elif task["task"] == "ecgqa" and not task["answer"]:
            counts["no answer"] += 1
        else:
            joined[splits.pop(), task["ecg_ids"]].append(task)
            counts["joined"] += 1
    if not counts["joined"]:
        raise UserError(
            f"--{'qa' if args.kind == 'ecgqa' else 'shards'}: none of {len(tasks)} {args.kind} tasks has its ECG in {args.shards} ({dict(counts)})"
        )
    if args.out.exists():
        _keep_other_tasks(args.out, index, {"ecgqa": "ecgqa", "reports": "report"}[args.kind], joined)

    with new_folder(args.out) as folder:
        splits = {}
        for split in index["splits"]:
            groups = sorted((ids, sorted(ts, key=lambda t: (t["task"], t["id"]))) for (s, ids), ts in joined.items() if s == split)
            splits[split] = write_split(
                folder, split, (_sample(shards[split], metas[split], ecgs, *g) for g in groups), index["shard_size"]
            )
            splits[split]["tasks"] = dict(sorted(Counter(t["question_type"] for _, ts in groups for t in ts).items()))
        shutil.copytree(args.shards / "tokenizer", folder / "tokenizer")
        write_index(folder, splits, kind="tasks", **{name: index[name] for name in ONCE})
    for reason, count in counts.most_common():
        print(f"{count:>9,} {args.kind} tasks: {reason}")
    for split, entry in splits.items():
        print(f"{split}: {entry['samples']:,} samples, {sum(entry['tasks'].values()):,} tasks {entry['tasks']}")


def _sample(reader: Shards, metas: list[dict], ecgs: dict, ecg_ids: tuple[str, ...], tasks: list[dict]) -> tuple[str, np.ndarray, dict]:
    """One sample: the ids of its ECGs [n_ecgs, 313], and a json with what training and judging need (no report of the token shards)."""
    places = [ecgs[e][1] for e in ecg_ids]
    first = metas[places[0]]
    meta = {
        "source": first["source"],
        "split": first["split"],
        "record_ids": list(ecg_ids),
        "patients": [metas[p]["patient"] for p in places],
        "tasks": [{k: v for k, v in task.items() if k != "ecg_ids"} for task in tasks],
    }
    return "_".join([first["source"], *ecg_ids]), np.concatenate([reader.ids(p) for p in places]), meta


def _keep_other_tasks(out: Path, index: dict, kind: str, joined: dict) -> None:
    """Add to `joined` the tasks of the other kinds that `out` holds."""
    made = read_index(out, "--out")
    if made["kind"] != "tasks" or made["tokenizer"] != index["tokenizer"]:
        raise UserError(
            f"--out: {out} was made from other shards (tokenizer {made['tokenizer']}, not {index['tokenizer']}); name a new folder"
        )
    for split, entry in made["splits"].items():
        reader = Shards.open(out, split, "--out") if entry["samples"] else []
        for i in range(len(reader)):
            meta = reader.meta(i)
            kept = [{**task, "ecg_ids": tuple(meta["record_ids"])} for task in meta["tasks"] if task["task"] != kind]
            if kept:
                joined[split, tuple(meta["record_ids"])] += kept


if __name__ == "__main__":
    exit_2_on_user_error(main)()
