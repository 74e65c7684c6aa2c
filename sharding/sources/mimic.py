"""MIMIC-IV-ECG 1.0, https://physionet.org/content/mimic-iv-ecg/1.0/: `record_list.csv`, `machine_measurements.csv` and the WFDB records below files/.

Age and sex are no part of it: --mimic-iv names a download of MIMIC-IV (https://physionet.org/content/mimiciv/), whose hosp/patients.csv.gz has them.
There are no labels and no split. Reports are joined on study_id, patients on subject_id, never by the order of rows.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from sharding.manifest import pseudonym
from sharding.sources._tables import find_table, read_rows
from toolkit.errors import UserError
from toolkit.tasks.heartllm import join_statements

TABLE, MEASUREMENTS, PATIENTS = "record_list.csv", "machine_measurements.csv", "patients.csv"
OWN_SPLIT = None
NAN = float("nan")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mimic-iv", "--mimic_iv", type=Path, help="MIMIC-IV-ECG: folder of MIMIC-IV, for age and sex (its hosp/patients.csv.gz)")


def rows(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    """One dict an ECG: see sharding/sources/__init__.py.

    - `record_id` is the study_id, which ECG-QA calls ecg_id.
    - `report`: the statements report_0 .. report_17 in order, each with one full stop; '' where machine_measurements.csv has no row for the study.
    - `age` is that in the year of the ECG; nan above 89, where MIMIC-IV gives no age, and without --mimic-iv.

    800,000 rows take 14 s of one core.
    """
    table = find_table(root, TABLE, "MIMIC-IV-ECG")
    folder = str(table.parent.resolve())
    if not (table.parent / MEASUREMENTS).is_file():
        raise UserError(f"--root {table.parent} has no {MEASUREMENTS}, which holds the reports: download it into that folder")
    reports = read_reports(table.parent / MEASUREMENTS)
    patients = read_patients(args.mimic_iv) if args.mimic_iv else {}
    studies = set()
    for subject, study, time, path in read_rows(table, {"subject_id": "int64", "study_id": "int64", "ecg_time": str, "path": str}):
        if study in studies:
            raise UserError(f"{table} has two rows for study_id {study}: remove the duplicates")
        studies.add(study)
        if not path or not time[:4].isdecimal():
            raise UserError(f"{table}: study_id {study}: path or ecg_time is wrong: download it again")
        sex, born = patients.get(subject, ("", NAN))
        age = int(time[:4]) - born
        yield {
            "key": f"mimic_{study}",
            "source": "mimic",
            "record_id": str(study),
            "patient": pseudonym("mimic", subject),
            "split": "",
            "path": f"{folder}/{path}",
            "array": "",
            "report": reports.get(study, ""),
            "labels": [],
            "age": float(age) if 0 <= age <= 89 else NAN,
            "sex": sex,
            "site": "",
        }


def read_reports(table: Path) -> dict[int, str]:
    """study_id -> report of machine_measurements.csv. Raises `UserError` naming a study that has two rows."""
    reports = {}
    for study, *statements in read_rows(table, {"study_id": "int64", **{f"report_{i}": str for i in range(18)}}):
        if study in reports:
            raise UserError(f"{table} has two rows for study_id {study}: remove the duplicates")
        reports[study] = join_statements(statements)
    return reports


def read_patients(folder: Path) -> dict[int, tuple[str, float]]:
    """subject_id -> (sex, year of birth on the patient's shifted time scale; nan for those over 89, all of whom MIMIC-IV calls 91)."""
    places = [folder / part / (PATIENTS + end) for part in ("hosp", ".") for end in (".gz", "")]
    table = next((place for place in places if place.is_file()), None)
    if not table:
        raise UserError(f"--mimic-iv {folder} has no hosp/{PATIENTS}.gz: name the folder of a MIMIC-IV download")
    columns = {"subject_id": "int64", "gender": str, "anchor_age": "int64", "anchor_year": "int64"}
    sexes = {"M": "male", "F": "female"}
    return {subject: (sexes.get(sex, ""), year - age if age <= 89 else NAN) for subject, sex, age, year in read_rows(table, columns)}
