"""Own data: WFDB records, .npy and .mat arrays, listed in a csv file (--table; by default the only .csv in --root).

Columns, by name, in any order; others are ignored. UTF-8, separated by commas, semicolons or tabs.

    path           required: relative to --root or absolute; WFDB with or without extension, .npy, .mat
    patient        required: any text that is the same for all ECGs of a patient and of nobody else in the table
    id             of the ECG: unique, the name under which questions refer to it
    split          train, valid or test (--split column)
    report, age (years), sex (male or female; m or f)
    labels         separated by ; or |
    site           where it was recorded: the hospital, the device, a number of either
    sampling_rate, unit, leads   of a .npy or .mat array, which cannot say it itself (leads separated by spaces, commas, ; or |)

Neither patient nor path goes into shards. A site does. An id does, so it should be no hospital number; one of other characters than letters, digits, _
and - is not used, for it might be a name: such a record is known by a hash of its path, as are those without an id.
"""

import argparse
import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sharding.manifest import SPLITS, pseudonym
from sharding.reports import clean
from toolkit.ecg.leads import LEADS
from toolkit.errors import UserError, first_line

OWN_SPLIT = "column"
SAFE = re.compile(r"[A-Za-z0-9_-]+")
SEX = {"male": "male", "m": "male", "female": "female", "f": "female", "": "", "unknown": ""}


def source_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]{1,20}", text) or text in ("ptbxl", "mimic", "cinc"):
        raise argparse.ArgumentTypeError("up to 20 lower case letters, digits, _ and -, and not the name of a public dataset")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "where the table does not say (default: %(default)s)"
    parser.add_argument("--table", type=Path, help="own data: the csv file (default: the only .csv in --root)")
    parser.add_argument(
        "--name", type=source_name, default="csv", help="own data: the source's name: patient 1 of one name is not patient 1 of another (default: %(default)s)"
    )
    parser.add_argument("--sampling_rate", type=float, default=500, help=f"own data: Hz of .npy and .mat arrays {default}")
    parser.add_argument("--unit", default="mV", help=f"own data: their unit {default}")
    parser.add_argument("--leads", default=" ".join(LEADS), help=f"own data: the order of their leads {default}")


def rows(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    """One dict an ECG: see sharding/sources/__init__.py. Raises `UserError` naming the table, the line and what is wrong there."""
    table = args.table or find_table(root)
    folder, ids, paths, found = root.resolve(), {}, {}, 0
    for line, cells in read_lines(table):
        found, where = found + 1, f"{table}: line {line}"
        path, given, patient, split = (cells.get(column, "") for column in ("path", "id", "patient", "split"))
        if not path or not patient:
            raise UserError(f"{where}: {'patient' if path else 'path'} is empty: every ECG needs one")
        if not Path(path).is_absolute() and ".." in Path(path).parts:
            raise UserError(f"{where}: its path leaves --root: write it as an absolute path")
        if split not in (*SPLITS, ""):
            raise UserError(f"{where}: split {split!r}: it must be train, valid or test")
        sex = SEX.get(cells.get("sex", "").lower())
        if sex is None:
            raise UserError(f"{where}: sex {cells['sex']!r}: it must be male, female or empty")
        age = number(cells.get("age", ""), float("nan"))
        if age is None or not (age != age or 0 <= age <= 120):
            raise UserError(f"{where}: age {cells['age']!r}: it must be years, 0 to 120, or empty")
        full, array = record(folder / path, cells, args, where)
        for value, seen, column in ((given, ids, "id"), (full, paths, "path")):
            if value and value in seen:
                raise UserError(f"{where}: its {column} stands in line {seen[value]} too: an ECG is one line")
            seen[value] = line
        name = given if SAFE.fullmatch(given) else hashlib.blake2s(os.path.normpath(path).encode(), digest_size=8).hexdigest()
        yield {
            "key": f"{args.name}_{name}",
            "source": args.name,
            "record_id": name,
            "patient": pseudonym(args.name, patient),
            "split": split,
            "path": full,
            "array": array,
            "report": cells.get("report", ""),
            "labels": [label for label in map(clean_label, re.split(r"[;|]", cells.get("labels", ""))) if label],
            "age": age,
            "sex": sex,
            "site": clean_label(cells.get("site", "")),
        }
    if not found:
        raise UserError(f"{table} has a header and no rows: add a row for each ECG")


def clean_label(text: str) -> str:
    """A code as it is (a SNOMED code is a long number), words without what identifies a patient."""
    return text.strip() if re.fullmatch(r"\s*[\w.+/-]{1,40}\s*", text) else clean(text)


def find_table(root: Path) -> Path:
    """The only .csv in `root`."""
    found = sorted(root.glob("*.csv"))
    if len(found) != 1:
        raise UserError(f"--root {root} has {len(found)} .csv files: name the table of the ECGs with --table")
    return found[0]


def read_lines(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the line, stripped cells by column) of every row that is not empty; a row in several lines has the number of its last."""
    mend = "name a csv with a header, among it path and patient"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
            columns = [column.strip().lower() for column in next(reader, [])]
            if lacking := [column for column in ("path", "patient") if column not in columns]:
                raise UserError(f"--table {table} has no column {' and no column '.join(lacking)}: {mend}")
            if twice := {column for column in columns if column and columns.count(column) > 1}:
                raise UserError(f"--table {table} has two columns named {min(twice)}: rename one of them")
            for cells in reader:
                if len(cells) not in (0, len(columns)):
                    raise UserError(f"{table}: line {reader.line_num} has {len(cells)} cells, the header has {len(columns)}: quote cells that hold a separator")
                if any(cells):
                    yield reader.line_num, dict(zip(columns, map(str.strip, cells)))
    except UnicodeDecodeError as error:
        raise UserError(f"--table {table} is not UTF-8: save it as UTF-8") from error
    except (csv.Error, OSError) as error:
        raise UserError(f"--table {table} is not readable ({first_line(error)}): {mend}") from error


def record(path: Path, cells: dict[str, str], args: argparse.Namespace, where: str) -> tuple[str, str]:
    """(path, array) of the manifest for a file of the table: WFDB without extension and '', or an array and what it cannot say itself."""
    if path.suffix not in (".npy", ".mat") or (path.suffix == ".mat" and path.with_suffix(".hea").is_file()):  # .hea + .mat: WFDB, as in CinC
        return str(path.with_suffix("")) if path.suffix in (".hea", ".dat", ".mat") else str(path), ""
    rate = number(cells.get("sampling_rate", ""), args.sampling_rate)
    if not rate or not 0 < rate < float("inf"):
        raise UserError(f"{where}: sampling_rate {cells.get('sampling_rate') or args.sampling_rate}: it must be a number of Hz above 0")
    leads = [lead for lead in re.split(r"[\s,;|]+", cells.get("leads") or args.leads) if lead]
    return str(path), json.dumps({"sampling_rate": int(rate) if rate == int(rate) else rate, "unit": cells.get("unit") or args.unit, "leads": leads})


def number(text: str, empty: float) -> float | None:
    """63, 63.5 or 63,5; `empty` for ''; None for what is no number."""
    try:
        return float(text.replace(",", ".")) if text else empty
    except ValueError:
        return None
