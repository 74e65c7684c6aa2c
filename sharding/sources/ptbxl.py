"""PTB-XL, https://physionet.org/content/ptb-xl/1.0.3/: `ptbxl_database.csv`, WFDB records of 500 Hz (records500), 100 Hz (records100)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from sharding.manifest import pseudonym
from toolkit.errors import UserError

TABLE = "ptbxl_database.csv"
REQUIRED = ["ecg_id", "patient_id", "age", "sex", "scp_codes", "strat_fold", "filename_lr", "filename_hr"]
FOLDS = {**dict.fromkeys(range(1, 9), "train"), 9: "valid", 10: "test"}  # the authors' split: 9 and 10 are validated by cardiologists
NOT_REPORT = [
    r"\bEdit:.*",  # a validator's codes after the report ("Edit: NORM 80, IRBBB 50"): the labels themselves, never to be learnt as text
    r"(\b\d\.\d\d\s+)?unbest\S+ bericht\.?",  # "4.46   unbestätigter bericht": device software version, "unconfirmed report"
    r"(\b\d\.\d\d\s+)?unconfirmed report\.?",  # the same, translated
    r"trace only requested\.?",
]


def tables(root: Path) -> list[Path]:
    """[the path of ptbxl_database.csv] in `root`, or in its only subfolder that has one (where the zip unpacks to)."""
    found = [root / TABLE] if (root / TABLE).is_file() else sorted(root.glob(f"*/{TABLE}"))
    if len(found) != 1:
        problem = f"has {len(found)} subfolders with a {TABLE}" if found else f"has no {TABLE}"
        raise UserError(f"--root {root} {problem}: name the folder of the PTB-XL download that has it")
    return found


def rows(root: Path) -> Iterator[dict]:
    """One dict an ECG: key, source, record_id, patient, split, path, report, labels, age, sex (see sharding/manifest.py).

    - `labels` are all codes of `scp_codes`. Likelihood 0 is kept: PTB-XL gives it where none was stated, always for rhythm codes.
    - `report` is `report_en` where the table has one for the ECG, else `report` (about 70 % German), without the non-reports above.
    - `age` is nan above 89: the table says 300 there.
    - Records are those of records500 or, where that folder is absent, of records100.
    """
    [table] = tables(root)
    try:
        frame = pd.read_csv(table, dtype={"report": str, "report_en": str, "scp_codes": str})
    except (ValueError, OSError) as error:  # ValueError: pandas' ParserError, UnicodeDecodeError
        raise UserError(f"{table} is not readable ({' '.join(str(error).split())}): download it again") from error
    lacking = [column for column in REQUIRED if column not in frame]
    if lacking:
        raise UserError(f"{table} has no column {', '.join(lacking)}: download it again")

    here = [column for column, name in (("filename_hr", "records500"), ("filename_lr", "records100")) if (table.parent / name).is_dir()]
    if not here:
        raise UserError(f"--root {root} has {TABLE} but neither records500 nor records100: download one of them into {table.parent}")

    reports = frame.get("report", pd.Series("", frame.index)).fillna("")
    if "report_en" in frame:
        reports = frame["report_en"].fillna("").where(lambda text: text.str.strip() != "", reports)
    column, folder = here[0], table.parent.resolve()
    for row, report in zip(frame.to_dict("records"), reports, strict=True):
        try:
            record, patient, split = int(row["ecg_id"]), int(row["patient_id"]), FOLDS[int(row["strat_fold"])]
            labels = list(ast.literal_eval(row["scp_codes"]))
            path, age = str(folder / row[column]), float(row["age"])
        except (ValueError, TypeError, KeyError, SyntaxError) as error:
            columns = f"ecg_id, patient_id, age, strat_fold, scp_codes or {column}"
            raise UserError(f"{table}: ecg_id {row['ecg_id']}: {columns} is wrong ({error!r}): download it again") from error
        yield {
            "key": f"ptbxl_{record:05d}",
            "source": "ptbxl",
            "record_id": str(record),
            "patient": pseudonym("ptbxl", patient),
            "split": split,
            "path": path,
            "report": clean_report(report),
            "labels": labels,
            "age": float("nan") if age > 89 else age,
            "sex": {0: "male", 1: "female"}.get(row["sex"], ""),
        }


def clean_report(text: str) -> str:
    """`text` without the parts that are no report, white space collapsed; '' if nothing is left."""
    for pattern in NOT_REPORT:
        text = re.sub(pattern, " ", text, flags=re.IGNORECASE | re.DOTALL)
    return " ".join(text.split())
