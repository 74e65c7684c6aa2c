"""HeartLLM's own release: the ECGs that its JSON files (--json) name, read from the PTB-XL or MIMIC-IV-ECG download in --root.

https://github.com/yangjinning/HeartLLM, dataset/. Patient, age, sex, labels and path come from the dataset's own tables, as the sources ptbxl and
mimic give them, and so do source and key: manifests of both agree. The split is that of the file's name, the report that of the row ('' for
questions). `background`, which has patient numbers and dates, is not read.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from sharding.manifest import SPLITS
from sharding.sources import mimic, ptbxl
from toolkit.errors import UserError
from toolkit.tasks.heartllm import heartllm_rows

OWN_SPLIT = "file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, nargs="+", required=True, metavar="FILE", help="HeartLLM: files of its dataset/ folder, all of one dataset")
    ptbxl.add_arguments(parser)
    mimic.add_arguments(parser)


def rows(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    """One dict an ECG that a file names, in the order of the dataset's table: see sharding/sources/__init__.py.

    An ECG that files of two splits name has split "train and valid", which --split file refuses and the other choices replace. ECGs that
    the download does not have are left out and counted; `UserError` if it has none.
    """
    splits, reports = {}, {}
    for file in args.json:
        split = file_split(file)
        for _, record, row in heartllm_rows(file):
            splits.setdefault(record, set()).add(split)
            if row.get("report"):
                reports.setdefault(record, row["report"])
    found = 0
    for row in dataset(root).rows(root, args):
        if names := splits.get(row["record_id"]):
            found += 1
            yield {**row, "split": " and ".join(name for name in SPLITS if name in names), "report": reports.get(row["record_id"], "")}
    if not found:
        raise UserError(f"--json: none of {len(splits)} ECGs is in --root {root}: are the files those of another dataset?")
    yield from ({"left_out": "that --json names and --root does not have"} for _ in range(len(splits) - found))


def dataset(root: Path):
    """The source whose table is in `root` or one level below."""
    for source in (ptbxl, mimic):
        if any(root.glob(source.TABLE)) or any(root.glob(f"*/{source.TABLE}")):
            return source
    raise UserError(f"--root {root} has neither {ptbxl.TABLE} nor {mimic.TABLE}: name the folder of the PTB-XL or MIMIC-IV-ECG download")


def file_split(file: Path) -> str:
    """template_train_background.json -> "train". Raises `UserError` naming the file."""
    found = [split for split in SPLITS if split in re.split(r"[^a-z]+", file.stem.lower())]
    if len(found) != 1:
        raise UserError(f"--json {file}: its name must hold one of train, valid and test: the split of its ECGs")
    return found[0]
