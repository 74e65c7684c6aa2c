"""The manifest: a folder with one row an ECG, written by sharding/prepare.py and read by everything after it.

    manifest.parquet   the ECGs that passed the quality check, columns as SCHEMA
    quarantine.jsonl   one line an ECG that did not: key, path, start, reason, message
    prepare.json       arguments, counts, seconds, format_version; written last
    parts/             completion files of sharding/engine.py

`patient` is a pseudonym, not anonymisation: patient numbers are few, so whoever holds the dataset can hash them all and look it up. It is
there so that splits can be checked by patient without carrying hospital numbers along. `path` is the dataset's own, and MIMIC-IV-ECG's
paths hold patient numbers: paths stay in this folder, shards get none.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from toolkit.errors import UserError
from toolkit.files import whole_file, write_text

FORMAT_VERSION = 3
MANIFEST, QUARANTINE, PREPARE = FILES = ("manifest.parquet", "quarantine.jsonl", "prepare.json")
SPLITS = ("train", "valid", "test")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique; [A-Za-z0-9_-] only: a file name, and a WebDataset key, which ends at the first dot
        ("source", pa.string()),  # the dataset's name in sharding/sources
        ("record_id", pa.string()),  # the dataset's own record number: ECG-QA's ecg_id
        ("patient", pa.string()),  # pseudonym(source, patient number)
        ("split", pa.string()),  # train, valid or test
        ("path", pa.string()),  # absolute, what read_record takes: WFDB without extension, arrays with .npy or .mat
        ("start", pa.float64()),  # seconds from the record's beginning
        ("array", pa.string()),  # '' for WFDB; for a bare array JSON of sampling_rate, unit, leads
        ("report", pa.string()),  # '' if there is none
        ("labels", pa.list_(pa.string())),
        ("qc", pa.list_(pa.string())),  # flags of toolkit/ecg/quality.py
        ("age", pa.float64()),  # years, nan if unknown
        ("sex", pa.string()),  # male, female or ''
        ("site", pa.string()),  # where it was recorded: a hospital or device number of PTB-XL, a database of CinC, the csv's own word; '' if unknown
    ]
)


def pseudonym(source: str, patient_id: object) -> str:
    """16 hex digits for a patient of a source: the same in every run, so that manifests can be joined."""
    return hashlib.blake2s(f"heartspeed:{source}:{patient_id}".encode(), digest_size=8).hexdigest()


def read_manifest(folder: str | Path) -> pd.DataFrame:
    """The manifest's rows, columns as SCHEMA, `labels` and `qc` as lists. Raises `UserError` naming --manifest.

    Format version 2 had no `site`: there all are unknown. A large archive takes hours to read, too much for a column that few things need.
    """
    folder = Path(folder)
    mend = "make it with `python -m sharding.prepare`"
    absent = [name for name in (MANIFEST, PREPARE) if not (folder / name).is_file()]
    if absent:
        raise UserError(f"--manifest {folder} has no {' and no '.join(absent)}: {mend}")
    version = read_summary(folder).get("format_version")
    if version not in (2, FORMAT_VERSION):
        raise UserError(f"--manifest {folder} has format version {version}, this program reads {FORMAT_VERSION}: {mend} --overwrite")
    try:
        table = pq.ParquetFile(folder / MANIFEST).read()  # not read_table: it takes a parent named a=b for a column
        if version == 2:
            table = table.append_column(SCHEMA.field("site"), pa.array([""] * len(table), pa.string()))
        if not table.schema.equals(SCHEMA):
            raise pa.ArrowException(f"columns {', '.join(table.schema.names)}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--manifest {folder}: {MANIFEST} is damaged ({str(error).splitlines()[0]}): {mend} --overwrite") from error
    frame = table.to_pandas()
    for column in ("labels", "qc"):
        frame[column] = table[column].to_pylist()  # pandas alone would give numpy arrays
    return frame


def read_summary(folder: Path) -> dict:
    """prepare.json, or {} where it is missing or damaged."""
    try:
        summary = json.loads((Path(folder) / PREPARE).read_text())
    except (ValueError, OSError):
        return {}
    return summary if isinstance(summary, dict) else {}


def write_manifest(out: Path, rows: list[dict], quarantine: list[dict], summary: dict) -> None:
    """The three files in folder `out`, each whole or not at all, prepare.json last.

    Its `digest` is over the rows but for `path`: what is made from the manifest can tell it by that, wherever the records are mounted.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps({name: value for name, value in row.items() if name != "path"}, sort_keys=True).encode())
    summary = {**summary, "digest": digest.hexdigest()[:16], "format_version": FORMAT_VERSION}
    with whole_file(out / MANIFEST) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    write_text(out / QUARANTINE, "".join(json.dumps(line) + "\n" for line in quarantine))
    write_text(out / PREPARE, json.dumps(summary, indent=2) + "\n")


def summarise(rows: list[dict], quarantine: list[dict]) -> dict:
    """The counts of prepare.json."""
    splits = {}
    for split in SPLITS:
        patients = [row["patient"] for row in rows if row["split"] == split]
        splits[split] = {"ecgs": len(patients), "patients": len(set(patients))}
    return {
        "ecgs": len(rows) + len(quarantine),
        "kept": len(rows),
        "quarantined": dict(sorted(Counter(line["reason"] for line in quarantine).items())),
        "flags": dict(sorted(Counter(flag for row in rows for flag in row["qc"]).items())),
        "splits": splits,
        "reports": sum(row["report"] != "" for row in rows),
        "labels": dict(Counter(label for row in rows for label in row["labels"]).most_common(20)),
    }


def summary_table(summary: dict) -> str:
    """The counts as lines for people."""
    lines = [f"  {split:<18}{count['ecgs']:>8} ECGs {count['patients']:>8} patients" for split, count in summary["splits"].items()]
    for title in ("quarantined", "flags"):
        lines += [f"  {name:<18}{count:>8} ECGs, {title.rstrip('s')}" for name, count in summary[title].items()]
    return "\n".join(lines)
