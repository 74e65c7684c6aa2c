"""PTB-XL 1.0.1-1.0.3, https://physionet.org/content/ptb-xl/1.0.3/: `ptbxl_database.csv` and the WFDB records of records500 (500 Hz) or records100."""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from sharding.manifest import pseudonym
from sharding.sources._tables import find_table
from toolkit.errors import UserError

TABLE = "ptbxl_database.csv"
OWN_SPLIT = "strat_fold"
REQUIRED = ["ecg_id", "patient_id", "age", "sex", "scp_codes", "strat_fold", "filename_lr", "filename_hr"]
FOLDS = {**dict.fromkeys(range(1, 9), "train"), 9: "valid", 10: "test"}  # the authors' split: 9 and 10 are validated by cardiologists
RECORDS = {500: ("filename_hr", "records500"), 100: ("filename_lr", "records100")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sampling_rate", type=int, choices=RECORDS, help="PTB-XL: records of 500 or 100 Hz (default: 500 where records500 is there, else 100)"
    )


def rows(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    """One dict an ECG: see sharding/sources/__init__.py.

    - `labels` are all codes of `scp_codes`. Likelihood 0 is kept: PTB-XL gives it where none was stated, always for rhythm codes.
    - `report` is `report_en` where the table has one for the ECG, else `report` (about 70 % German).
    - `age` is nan above 89: the table says 300 there.
    - `site` is the number of the table's column of that name, "0" to "51"; '' where it is empty, or the table is without it.
    """
    table = find_table(root, TABLE, "PTB-XL")
    try:
        frame = pd.read_csv(table, dtype={"report": str, "report_en": str, "scp_codes": str})
    except (ValueError, OSError) as error:  # ValueError: pandas' ParserError, UnicodeDecodeError
        raise UserError(f"{table} is not readable ({' '.join(str(error).split())}): download it again") from error
    lacking = [column for column in REQUIRED if column not in frame]
    if lacking:
        raise UserError(f"{table} has no column {', '.join(lacking)}: download it again")

    here = [rate for rate, (_, name) in RECORDS.items() if (table.parent / name).is_dir()]
    if not here:
        raise UserError(f"--root {root} has {TABLE} but neither records500 nor records100: download one of them into {table.parent}")
    rate = args.sampling_rate or here[0]
    if rate not in here:
        raise UserError(f"--sampling_rate {rate}: {table.parent} has no {RECORDS[rate][1]}: download it, or leave the argument out")

    reports = frame.get("report", pd.Series("", frame.index)).fillna("")
    if "report_en" in frame:
        reports = frame["report_en"].fillna("").where(lambda text: text.str.strip() != "", reports)
    column, folder = RECORDS[rate][0], table.parent.resolve()
    for row, report in zip(frame.to_dict("records"), reports, strict=True):
        try:
            record, patient, split = int(row["ecg_id"]), int(row["patient_id"]), FOLDS[int(row["strat_fold"])]
            labels = list(ast.literal_eval(row["scp_codes"]))
            path, age = str(folder / row[column]), float(row["age"])
            site = "" if pd.isna(row.get("site")) else str(int(row["site"]))  # pandas reads whole numbers with gaps as floats
        except (ValueError, TypeError, KeyError, SyntaxError) as error:
            columns = f"ecg_id, patient_id, age, site, strat_fold, scp_codes or {column}"
            raise UserError(f"{table}: ecg_id {row['ecg_id']}: {columns} is wrong ({error!r}): download it again") from error
        yield {
            "key": f"ptbxl_{record:05d}",
            "source": "ptbxl",
            "record_id": str(record),
            "patient": pseudonym("ptbxl", patient),
            "split": split,
            "path": path,
            "array": "",
            "report": report,
            "labels": labels,
            "age": float("nan") if age > 89 else age,
            "sex": {0: "male", 1: "female"}.get(row["sex"], ""),
            "site": site,
        }
