"""The manifest: a folder with one row an ECG, written by sharding/prepare.py and read by everything after it.

    manifest.parquet   the ECGs that passed the quality check, columns as SCHEMA
    quarantine.jsonl   one line a record that did not: key, path, reason, message
    prepare.json       arguments, hashes of the source's tables, counts, seconds, format_version

`patient` is a pseudonym, not anonymisation: patient numbers are few, so whoever holds the dataset can hash them all and look it up. It is
there so that splits can be checked by patient without carrying hospital numbers along. `report` is the dataset's own text.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from toolkit.errors import UserError
from toolkit.files import new_folder

FORMAT_VERSION = 1
MANIFEST, QUARANTINE, PREPARE = FILES = ("manifest.parquet", "quarantine.jsonl", "prepare.json")
SPLITS = ("train", "valid", "test")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique; [A-Za-z0-9_-] only: a file name, and a WebDataset key, which ends at the first dot
        ("source", pa.string()),  # the dataset's name in sharding/sources
        ("record_id", pa.string()),  # the dataset's own record number: ECG-QA's ecg_id
        ("patient", pa.string()),  # pseudonym(source, patient number)
        ("split", pa.string()),  # train, valid or test
        ("path", pa.string()),  # absolute, without extension: what read_record takes
        ("report", pa.string()),  # '' if there is none
        ("labels", pa.list_(pa.string())),
        ("qc", pa.list_(pa.string())),  # flags of toolkit/ecg/quality.py
        ("age", pa.float64()),  # years, nan if unknown
        ("sex", pa.string()),  # male, female or ''
    ]
)


def pseudonym(source: str, patient_id: object) -> str:
    """16 hex digits for a patient of a source: the same in every run, so that manifests can be joined."""
    return hashlib.blake2s(f"heartspeed:{source}:{patient_id}".encode(), digest_size=8).hexdigest()


def read_manifest(folder: str | Path) -> pd.DataFrame:
    """The manifest's rows, columns as SCHEMA, `labels` and `qc` as lists. Raises `UserError` naming --manifest."""
    folder = Path(folder)
    mend = "make it with `python -m sharding.prepare`"
    absent = [name for name in (MANIFEST, PREPARE) if not (folder / name).is_file()]
    if absent:
        raise UserError(f"--manifest {folder} has no {' and no '.join(absent)}: {mend}")
    version = _read_summary(folder).get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"--manifest {folder} has format version {version}, this program reads {FORMAT_VERSION}: {mend} --overwrite")
    try:
        table = pq.ParquetFile(folder / MANIFEST).read()  # not read_table: it takes a parent named a=b for a column
        if not table.schema.equals(SCHEMA):
            raise pa.ArrowException(f"columns {', '.join(table.schema.names)}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--manifest {folder}: {MANIFEST} is damaged ({str(error).splitlines()[0]}): {mend} --overwrite") from error
    frame = table.to_pandas()
    for column in ("labels", "qc"):
        frame[column] = table[column].to_pylist()  # pandas alone would give numpy arrays
    return frame


def summarise(rows: list[dict], quarantine: list[dict]) -> dict:
    """The counts of prepare.json."""
    splits = {}
    for split in SPLITS:
        patients = [row["patient"] for row in rows if row["split"] == split]
        splits[split] = {"ecgs": len(patients), "patients": len(set(patients))}
    return {
        "records": len(rows) + len(quarantine),
        "kept": len(rows),
        "quarantined": dict(sorted(Counter(line["reason"] for line in quarantine).items())),
        "flags": dict(sorted(Counter(flag for row in rows for flag in row["qc"]).items())),
        "splits": splits,
        "reports": sum(row["report"] != "" for row in rows),
        "labels": dict(Counter(label for row in rows for label in row["labels"]).most_common(20)),
    }


def fingerprint(path: Path) -> dict:
    """Name, size and sha256 of a source's table, for `arguments`."""
    data = path.read_bytes()
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def summary_table(summary: dict) -> str:
    """The counts as lines for people."""
    lines = [f"  {split:<18}{count['ecgs']:>8} ECGs {count['patients']:>8} patients" for split, count in summary["splits"].items()]
    for title in ("quarantined", "flags"):
        lines += [f"  {name:<18}{count:>8} ECGs, {title.rstrip('s')}" for name, count in summary[title].items()]
    return "\n".join(lines)


def existing(out: Path, arguments: dict, overwrite: bool) -> dict | None:
    """The summary in `out` if it is complete, made with the same `arguments` and not to be made again; None if `out` can be written.

    Raises `UserError` naming --out where it cannot: checked before the records are read, an hour for MIMIC-IV-ECG.
    """
    if out.exists():
        if not out.is_dir():
            raise UserError(f"--out {out} is a file: name a new folder")
        names = {path.name for path in out.iterdir()}
        if names - set(FILES):
            raise UserError(f"--out {out} holds {sorted(names - set(FILES))[0]}, which is no part of a manifest: name a new folder")
        summary = _read_summary(out) if set(FILES) <= names else {}
        if not overwrite and summary.get("format_version") == FORMAT_VERSION and summary.get("arguments") == arguments:
            return summary
        if names and not overwrite:
            raise UserError(f"--out {out} was made with other arguments or another table: name a new folder or add --overwrite")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: {parent} is no folder you may write to")
    return None


def write_manifest(out: Path, rows: list[dict], quarantine: list[dict], summary: dict) -> None:
    """The three files as folder `out`, whole or not at all, in place of what `out` was."""
    with new_folder(out) as folder:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / MANIFEST)
        (folder / QUARANTINE).write_text("".join(json.dumps(line) + "\n" for line in quarantine))
        (folder / PREPARE).write_text(json.dumps({**summary, "format_version": FORMAT_VERSION}, indent=2) + "\n")


def _read_summary(folder: Path) -> dict:
    try:
        summary = json.loads((folder / PREPARE).read_text())
    except ValueError:
        return {}
    return summary if isinstance(summary, dict) else {}
