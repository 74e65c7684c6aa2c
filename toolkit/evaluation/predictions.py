"""A file of predictions, ours or another system's: one row a task, checked before anything is counted."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolkit.errors import UserError
from toolkit.tasks.answers import ANSWER_SEPARATOR, join_answers

TASKS = ("ecgqa", "report")
UNKNOWN = "unknown"  # the type of a question that names none
MODEL = "model"  # the column of the predictions in a table, so no control's
REFERENCES = ("reference", "answer", "gt")  # what the column is called; the first that there is
TEXTS = ("id", "task", "question_type", "attribute_type", "question", "source", "site")  # a whole number will do: sites and ids often are
PARTS = ANSWER_SEPARATOR.strip()
UNIT_NOTES = {  # what `units` found -> what to say beside an interval
    "patients": (),
    "ECGs": ("Not every row names its patient: intervals are over ECGs, and too narrow if patients have several.",),
    "rows": ("Not every row names its patient or ECG: intervals are over rows, and too narrow if patients have several.",),
}


def read_predictions(path: str | Path, flag: str = "--predictions") -> list[dict]:
    """The rows of a file: JSON lines, or one JSON list of objects.

    A row needs `prediction` (null is an empty one, which counts as wrong and is never dropped) and `reference` or, as the HeartLLM release calls it, `answer`
    or `gt`: text, or a list of answers, which are joined by "; "; a list of predictions is kept as `predicted` too. Optional: id, task, question_type,
    template_id, attribute_type, question, controls, loglik, sample, ecg_id, patient, source, site, labels; null is as good as absent, and 1.0 as 1. Filled in:
    task ("ecgqa" of a row with a template_id, or a question_type other than "report"; else "report"), question_type ("report", or "unknown"), id (the number
    of the row).

    Raises UserError naming flag, file, row and column: columns that are missing or of the wrong type, an unknown task, an id twice, an empty file.
    """
    path = Path(path)
    rows = [_row(row, f"{flag}: {path}, {place}") for place, row in _objects(path, flag)]
    if not rows:
        raise UserError(f"{flag}: {path} holds no prediction")
    seen = set()
    for number, row in enumerate(rows, 1):
        row.setdefault("id", str(number))
        if row["id"] in seen:
            raise UserError(f"{flag}: {path}: two rows have the id {row['id']!r}; every task has one prediction")
        seen.add(row["id"])
    return rows


def units(rows: Sequence[dict]) -> tuple[np.ndarray, str]:
    """What an interval is over: int64 [rows], and "patients" or, where not every row names one, "ECGs" (ecg_id or sample), or "rows", each its own.

    Of a question about two ECGs the first counts. A patient's and an ECG's number is its source's: two data sets may both have a number 17.
    """
    for column, kind in (("patient", "patients"), ("ecg_id", "ECGs"), ("sample", "ECGs")):
        if rows and all(row.get(column) not in (None, []) for row in rows):
            names = [_plain(row[column][0] if isinstance(row[column], list) else row[column]) for row in rows]
            keys = [("" if column == "sample" else row.get("source", ""), len(name), name) for name, row in zip(names, rows)]
            places = {key: i for i, key in enumerate(sorted(set(keys)))}  # whatever the order of the rows; by length, so that 9 is before 10
            return np.array([places[key] for key in keys]), kind
    return np.arange(len(rows)), "rows"


def _objects(path: Path, flag: str) -> list[tuple[str, object]]:
    """("line 3", what it holds) of every line that is not blank; of a list ("row 3", its element)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{flag}: {path} cannot be read: {reason}") from error
    if text.lstrip().startswith("["):
        try:
            return [(f"row {i}", row) for i, row in enumerate(_parsed(text), 1)]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag}: {path} begins as a JSON list but is none: {error}") from error
    objects = []
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028 as it is
        if line.strip():
            try:
                objects.append((f"line {i}", _parsed(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{flag}: {path}, line {i} is not JSON ({error}); a file of predictions has an object a line, or is a JSON list") from error
    return objects


def _parsed(text: str) -> object:
    found = json.loads(text)
    if "\\ud" in text or "\\uD" in text:  # half a character, as of an answer that was cut in one, becomes U+FFFD: no file could be written of it
        found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return found


def _row(given: object, where: str) -> dict:
    """The checked row; `where` begins a message."""
    if not isinstance(given, dict):
        raise UserError(f'{where}: an object is needed, such as {{"prediction": "yes", "reference": "yes"}}; got {type(given).__name__}')
    reference = next((column for column in REFERENCES if column in given), REFERENCES[0])
    for column in ("prediction", reference):
        if column not in given:
            raise UserError(f"{where}: the column {column!r} is missing; it has {', '.join(map(repr, given)) or 'none'}")
    row = {name: value for name, value in given.items() if value is not None and not (isinstance(value, float) and math.isnan(value))}
    row.pop("predicted", None)  # ours to fill
    row |= _prediction(row.get("prediction", ""), where)
    row["reference"] = _reference(row.get(reference), where, reference)
    for column in TEXTS:
        if column in row:
            row[column] = _text(_plain(row[column]) if _whole(row[column]) else row[column], where, column)
    for column in ("template_id", "sample"):
        if column in row:
            if not _whole(row[column]):
                raise UserError(f"{where}: {column} is a whole number; got {row[column]!r}")
            row[column] = int(row[column])
    if not isinstance(row.get("controls", {}), dict):
        raise UserError(f"{where}: controls is an object, name -> answer; got {row['controls']!r}")
    if MODEL in row.get("controls", {}):
        raise UserError(f"{where}: a control may not be called {MODEL!r}, as the column of the predictions is; give it another name")
    if "controls" in row:
        row["controls"] = {name: _text("" if answer is None else answer, where, f"controls[{name!r}]") for name, answer in row["controls"].items()}
    for column in ("patient", "ecg_id"):
        given = row.get(column, "")
        if not all(isinstance(one, str) or _whole(one) for one in (given if column == "ecg_id" and isinstance(given, list) else [given])):
            raise UserError(f"{where}: {column} is a number or text; got {given!r}")
    asked = "template_id" in row or row.get("question_type", "report") != "report"
    row.setdefault("task", "ecgqa" if asked else "report")
    if row["task"] not in TASKS:
        raise UserError(f"{where}: the task {row['task']!r} is neither 'ecgqa' nor 'report'")
    row.setdefault("question_type", UNKNOWN if row["task"] == "ecgqa" else "report")
    return row


def _prediction(prediction: object, where: str) -> dict:
    """The text, and `predicted`, the answers of a list as they were given."""
    if not (isinstance(prediction, list) and all(isinstance(answer, str) for answer in prediction)):
        return {"prediction": _text(prediction, where, "prediction")}
    # an answer stays one: what a model wrote with a ";" in it is no reference, which may not have any
    return {"prediction": ANSWER_SEPARATOR.join(answer.replace(PARTS, ",") for answer in prediction), "predicted": prediction}


def _reference(reference: object, where: str, column: str) -> str:
    if isinstance(reference, list) and all(isinstance(answer, str) for answer in reference):
        if parted := next((answer for answer in reference if PARTS in answer), None):
            raise UserError(f"{where}: {column} holds the answer {parted!r}, but {PARTS!r} is what parts answers; write it with ','")
        reference = join_answers(reference)
    if not isinstance(reference, str):
        raise UserError(f"{where}: {column} is text, or a list of answers; got {reference!r}")
    if not reference.replace(PARTS, "").strip():
        raise UserError(f"{where}: {column} is empty, so nothing can be right; leave the row out, or say 'none'")
    return reference


def _text(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {column} is text; got {value!r}")
    return value


def _plain(value: object) -> str:
    """A number or name as text: 8.0 and 8 are one."""
    return str(int(value)) if _whole(value) else str(value)


def _whole(value: object) -> bool:
    """Whether it is a whole number; 8.0 is one, as pandas writes it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
