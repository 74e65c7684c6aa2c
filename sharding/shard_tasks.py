"""Join questions and reports to token shards: one sample an ECG (or pair of ECGs) with all its tasks in the json member.

python -m sharding.shard_tasks ecgqa --qa runs/demo/data/ecgqa --shards runs/demo/shards --out runs/demo/tasks
python -m sharding.shard_tasks reports --shards runs/demo/shards --out runs/demo/tasks      # adds to the same folder
python -m sharding.shard_tasks heartllm --qa rows.json more.json --shards S --out I         # rows of the authors' own release

A task belongs to the split of its ECG in the token shards, whatever folder it was read from: one patient-level split over all tasks.
Made again, the tasks of the kind that is named are replaced and the others kept; the same inputs give the same bytes.
A task that cannot be joined is counted and listed in left_out.jsonl of the output folder, with the reason and the ECGs it would need.
"""

import argparse
import json
import os
import shutil
from collections import Counter
from pathlib import Path

from sharding.reports import clean
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import new_folder, write_text
from toolkit.shards.reader import Shards, how_to_mend, read_index
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.ecgqa import read_ecgqa
from toolkit.tasks.heartllm import read_heartllm
from toolkit.tasks.join import ECGs, join, keep_other_tasks, left_out, report_tasks, samples

ONCE = ("tokenizer", "tokens_per_ecg", "codes", "levels", "shard_size")
LEFT_OUT = "left_out.jsonl"
SHOWN = 3  # ids of it that are printed
KINDS = ("ecgqa", "reports", "heartllm")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m sharding.shard_tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="ecgqa, heartllm: tasks of --qa; reports: the manifest's report column")
    parser.add_argument("--qa", type=Path, nargs="+", help="ecgqa: a folder of ECG-QA 1.0.2 json files, such as ecgqa/ptbxl/template; heartllm: json files")
    parser.add_argument("--shards", required=True, type=Path, help="token shards written by `python -m sharding.shard`")
    parser.add_argument("--out", required=True, type=Path, help="folder for the task shards; tasks of the other kind that it holds are kept")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.kind == "reports" and args.qa:
        raise UserError("--qa: reports come from the shards' manifest; leave it out, or say `ecgqa` or `heartllm`")
    if args.kind != "reports" and not args.qa:
        raise UserError(f"--qa: `{args.kind}` needs it: {'a folder of ECG-QA 1.0.2 json files' if args.kind == 'ecgqa' else 'json files'}")
    if args.kind == "ecgqa" and len(args.qa) > 1:
        raise UserError("--qa: one folder, please; every json file below it is read")
    index = read_index(args.shards)
    if args.out.resolve() == args.shards.resolve():
        raise UserError("--out: must be another folder than --shards")

    ecgs = ECGs({split: Shards.open(args.shards, split, kind="tokens") for split, entry in index["splits"].items() if entry["samples"]})
    tasks = {"ecgqa": lambda: read_ecgqa(*args.qa), "heartllm": lambda: read_heartllm(args.qa), "reports": lambda: report_tasks(ecgs)}[args.kind]()
    for task in tasks if args.kind == "heartllm" else ():  # the manifest's reports were cleaned, by its options
        if task["task"] == "report":
            task["report"] = clean(task["report"])
    if not tasks:
        raise UserError(f"--{'qa' if args.qa else 'shards'}: no {args.kind} there")
    joined, counts = join(tasks, ecgs)
    if not counts["joined"]:
        raise UserError(f"--{'qa' if args.qa else 'shards'}: none of {len(tasks)} {args.kind} tasks has its ECG in {args.shards} ({dict(counts)})")
    made_from, lines = ecgs.digest, left_out(tasks, ecgs)
    if args.out.exists() and any(args.out.iterdir()):
        made = read_index(args.out, "--out", "name a new folder")
        if made["kind"] != "tasks" or made["made_from"] != made_from:
            raise UserError(f"--out: {args.out} was not made from these --shards, so its tasks may belong to other ECGs or splits; name a new folder")
        replaced = {task["task"] for task in tasks}
        keep_other_tasks({s: Shards.open(args.out, s, "--out") for s, entry in made["splits"].items() if entry["samples"]}, replaced, joined)
        lines += [line for line in read_left_out(args.out) if line["task"] not in replaced]

    with new_folder(args.out) as folder:
        splits = {}
        for split in index["splits"]:
            kinds = Counter(task["question_type"] for (s, _), ts in joined.items() if s == split for task in ts)
            entry = write_split(folder, split, samples(split, joined, ecgs), index["shard_size"])
            splits[split] = {**entry, "tasks": dict(sorted(kinds.items()))}
        lines.sort(key=lambda line: (line["task"], line["id"]))  # whichever kind was joined first
        write_text(folder / LEFT_OUT, "".join(json.dumps(line) + "\n" for line in lines))
        shutil.copytree(args.shards / "tokenizer", folder / "tokenizer")
        manifest = os.path.relpath(args.shards / index["manifest"], args.out)
        write_index(folder, splits, kind="tasks", made_from=made_from, manifest=manifest, **{name: index[name] for name in ONCE})
    for what, count in counts.most_common():
        print(f"{count:>9,} {args.kind} tasks: {what}")
    if lines:
        first = ", ".join(line["id"] for line in lines[:SHOWN])
        print(f"{args.out / LEFT_OUT} lists the {len(lines):,} tasks left out, of all kinds; the first: {first}")
    for split, entry in splits.items():
        print(f"{split}: {entry['samples']:,} samples, {sum(entry['tasks'].values()):,} tasks {entry['tasks']}")


def read_left_out(out: Path) -> list[dict]:
    """The lines of left_out.jsonl; none where it is not there, as in folders made before there was one. Raises UserError if it is damaged."""
    try:
        lines = [json.loads(text) for text in (out / LEFT_OUT).read_text(encoding="utf-8").splitlines()]
        if not all({"task", "id"} <= line.keys() for line in lines):
            raise ValueError
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError):
        raise UserError(f"--out: {out / LEFT_OUT} is damaged; {how_to_mend('tasks', LEFT_OUT)}") from None
    return lines


if __name__ == "__main__":
    exit_2_on_user_error(main)()
