"""PhysioNet/CinC Challenge 2020 and 2021, https://physionet.org/content/challenge-2021/1.0.3/: every WFDB record (.hea + .mat) below --root.

Labels are the SNOMED CT codes of the header's Dx line, as text. There are no reports and no split. No patient numbers are published, so each
record counts as a patient of its own; the parts st_petersburg_incart and ptb do hold several records of a patient, which may then fall
into different splits. The part ptb-xl (HR00001 ...) is PTB-XL again, without its patient numbers: a leak between it and the source ptbxl
could not be seen, so it is left out unless --with_ptbxl is given. `site` is the database, which the record's name tells, whatever its folder.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from sharding.manifest import pseudonym
from toolkit.errors import UserError

OWN_SPLIT = None
COMMENT = re.compile(r"^#\s*(Age|Sex|Dx)\s*:(.*)$", re.MULTILINE)  # 2020 writes "#Age: 74", 2021 "# Age: 74"
SEX = {"m": "male", "male": "male", "f": "female", "female": "female"}
PTBXL = re.compile(r"HR\d{5}")
DATABASES = {  # names of records -> the database's, as the folders of 2021 are called
    r"A\d{4}": "cpsc_2018",
    r"Q\d{4}": "cpsc_2018_extra",
    r"I\d{4}": "st_petersburg_incart",
    r"S\d{4}": "ptb",
    r"HR\d{5}": "ptb-xl",
    r"E\d{5}": "georgia",
    r"JS\d{5}": "chapman_shaoxing",  # up to LAST_CHAPMAN, the others are ningbo's
}
LAST_CHAPMAN = "JS10646"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--with_ptbxl", action="store_true", help="CinC: also the records HR00001 ..., which are PTB-XL's: not beside the source ptbxl")


def rows(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    """One dict an ECG, in order of their paths: see sharding/sources/__init__.py. 88,000 headers take 4 s. `age` is nan unless 0 to 120."""
    headers = sorted(root.resolve().rglob("*.hea"))
    if not headers:
        raise UserError(f"--root {root} has no .hea file below it: name the folder of the Challenge's training data")
    kept = headers if args.with_ptbxl else [path for path in headers if not PTBXL.fullmatch(path.stem)]
    if not kept:
        raise UserError(f"--root {root} holds PTB-XL alone: use the source ptbxl, which knows its patients, or add --with_ptbxl")
    seen = {}
    for path in kept:
        name = path.stem
        if name in seen:
            raise UserError(f"--root {root}: {seen[name].parent} and {path.parent} both have a record {name}: remove one of them")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"{path}: a record's name may have letters, digits, _ and - only: rename it, or use the source csv")
        seen[name] = path
        said = {field: text.strip() for field, text in COMMENT.findall(path.read_text(encoding="utf-8", errors="replace"))}
        yield {
            "key": f"cinc_{name}",
            "source": "cinc",
            "record_id": name,
            "patient": pseudonym("cinc", name),
            "split": "",
            "path": str(path.with_suffix("")),
            "array": "",
            "report": "",
            "labels": [code.strip() for code in said.get("Dx", "").split(",") if code.strip().isdecimal()],
            "age": parse_age(said.get("Age", "")),
            "sex": SEX.get(said.get("Sex", "").lower(), ""),
            "site": database(name),
        }
    yield from ({"left_out": "of PTB-XL (HR...): use the source ptbxl, or --with_ptbxl"} for _ in range(len(headers) - len(kept)))


def database(record: str) -> str:
    """The database of the Challenge that a record is of, '' for a name that is none of its."""
    found = next((name for pattern, name in DATABASES.items() if re.fullmatch(pattern, record)), "")
    return "ningbo" if found == "chapman_shaoxing" and record > LAST_CHAPMAN else found


def parse_age(text: str) -> float:
    """Years, nan where the text is no age: NaN, Unknown, PTB-XL's 300 for over 89."""
    try:
        age = float(text)
    except ValueError:
        return float("nan")
    return age if 0 <= age <= 120 else float("nan")
