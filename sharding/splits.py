"""Which split a patient's ECGs belong to. No patient is ever in two, whatever the choice, and the order of the rows never matters."""

import hashlib
from collections import defaultdict
from pathlib import Path

from sharding.manifest import SPLITS
from toolkit.errors import UserError
from toolkit.tasks.ecgqa import json_files, json_rows, question_task

STRICTEST = ("test", "valid", "train")  # a patient of two official splits belongs to the first of these
MEND = "add --split hash, which splits by patient"


def assign(rows: list[dict], how: str, own: str | None, *, ecgqa: Path | None = None, salt: str = "heartspeed") -> dict:
    """Set `split` of every row, in place; returns {"how": ...} and counts for prepare.json.

    how:
    - the dataset's own split (`own`: "strat_fold", "column", "file"): each row's `split` as it is.
    - "hash": 7:1:2 by a hash of `salt` and the patient's pseudonym, so that data added later move nobody.
    - "ecgqa": ECG-QA's official split, in folder `ecgqa` (ecgqa/ptbxl, ecgqa/mimic-iv-ecg, or a template/ or paraphrased/ of theirs). All
      ECGs of a patient follow the one that is in it; test goes before valid before train. Patients without one are hashed.

    Raises `UserError` where a row has no split, a patient would be in two, or the folder holds no official split of these ECGs.
    """
    counts = {"how": how}
    if how == "hash":
        place = {patient: hashed(patient, salt) for patient in {row["patient"] for row in rows}}
        counts["salt"] = salt
    elif how == "ecgqa":
        if ecgqa is None:
            raise UserError("--split ecgqa: also name the folder of ECG-QA: --ecgqa ecgqa/ptbxl")
        place, found = by_ecgqa(rows, official(ecgqa), ecgqa, salt)
        counts |= {"salt": salt, **found}
    elif how == own and own is not None:
        place = None
    else:
        has = f"this dataset's own split is {own}" if own else "this dataset publishes no split of its own"
        raise UserError(f"--split {how}: {has}: {MEND}")
    if place is not None:
        for row in rows:
            row["split"] = place[row["patient"]]
    _check(rows, how)
    return counts


def hashed(patient: str, salt: str) -> str:
    """train, valid or test with odds 7:1:2."""
    share = int.from_bytes(hashlib.blake2b(f"{salt}:{patient}".encode(), digest_size=8).digest(), "big") / 2**64
    return "train" if share < 0.7 else "valid" if share < 0.8 else "test"


def by_ecgqa(rows: list[dict], ids: dict[str, set[str]], folder: Path, salt: str) -> tuple[dict[str, str], dict]:
    """(patient -> split, counts): the official splits of a patient's ECGs, the strictest of them, or the hash."""
    splits = defaultdict(set)
    ecgs = dict.fromkeys(SPLITS, 0)
    for row in rows:
        known = splits[row["patient"]]
        for split in SPLITS:
            if row["record_id"] in ids[split]:
                known.add(split)
                ecgs[split] += 1
    if not any(ecgs.values()):
        raise UserError(f"--ecgqa {folder}: none of its {sum(map(len, ids.values()))} ECGs is in this dataset: name the folder of ECG-QA for this dataset")
    place = {p: next((split for split in STRICTEST if split in known), None) or hashed(p, salt) for p, known in splits.items()}
    patients = {
        "official": sum(bool(known) for known in splits.values()),
        "hashed": sum(not known for known in splits.values()),
        "of two official splits": sum(len(known) > 1 for known in splits.values()),
    }
    return place, {"official_ecgs": ecgs, "patients": patients}


def official(folder: Path) -> dict[str, set[str]]:
    """split -> record ids of ECG-QA: of `<split>_ecgs.tsv` (index, id) in `folder` or the one above it, else of the rows below <split>/.

    Raises `UserError` naming --ecgqa and the split that is not there.
    """
    ids = {}
    for split in SPLITS:
        table = next((place / f"{split}_ecgs.tsv" for place in (folder, folder.resolve().parent) if (place / f"{split}_ecgs.tsv").is_file()), None)
        if table:
            cells = [line.split() for line in table.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            if any(len(line) != 2 for line in cells):
                raise UserError(f"--ecgqa: {table} is no table of index and ECG id: download it again")
            ids[split] = {record for _, record in cells}
        else:
            files = [file for file in json_files(folder) if split in file.relative_to(folder).with_suffix("").parts]
            rows = ((f"--ecgqa: {file}: row {i}", row) for file in files for i, row in enumerate(json_rows(file)))
            ids[split] = {record for where, row in rows for record in question_task(row, "", where)["ecg_ids"]}
        if not ids[split]:
            raise UserError(f"--ecgqa {folder} has no {split}_ecgs.tsv and no rows below {split}/: name a folder such as ecgqa/ptbxl")
    return ids


def _check(rows: list[dict], how: str) -> None:
    without = sorted((row["key"], row["split"]) for row in rows if row["split"] not in SPLITS)
    if without:
        key, split = without[0]
        first = f"{key} has split {split!r}" if split else f"{key} has none"
        raise UserError(f"--split {how}: {len(without)} of {len(rows)} ECGs are in no split (the first: {first}): give each one, or {MEND}")
    splits = defaultdict(set)
    for row in rows:
        splits[row["patient"]].add(row["split"])
    if torn := sorted(patient for patient, found in splits.items() if len(found) > 1):
        raise UserError(f"--split {how}: {len(torn)} patients have ECGs in two splits (pseudonyms {', '.join(torn[:3])}): {MEND}")
