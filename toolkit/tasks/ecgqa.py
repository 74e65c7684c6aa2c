"""Rows of ECG-QA 1.0.2: JSON lists below any folder, official (template, paraphrased) or one's own in the same format."""

import json
from pathlib import Path

from toolkit.errors import UserError, first_line

FIELDS = ("template_id", "question_type", "attribute_type", "question", "answer", "ecg_id")


def read_ecgqa(root: str | Path) -> list[dict]:
    """Every row below `root`, in order of file and place, as tasks: id, task, question_type, attribute_type, template_id, question,
    answer (list of str), attribute (list of str or None), ecg_ids (tuple of str).

    The split of a file's folder is ignored: a task belongs to the split of its ECG. Other files than .json are too, and .json files that
    hold an object. Raises UserError naming --qa, or the file and the row, counted from 0.
    """
    root = Path(root)
    files = json_files(root)
    if not files:
        raise UserError(f"--qa: no .json files below {root}; name the folder of ECG-QA that holds train/, valid/ and test/")
    wordings = {"template", "paraphrased"} & {part for file in files for part in file.relative_to(root).parts}
    if len(wordings) > 1:
        raise UserError(f"--qa: {root} holds template/ and paraphrased/, the same questions in two wordings; name one of them")
    tasks, seen = [], set()
    for file in files:
        part = "-".join(file.relative_to(root).parts[:-1]) or "qa"
        for i, row in enumerate(json_rows(file)):
            task = question_task(row, f"{part}-{row.get('sample_id', len(tasks))}", f"--qa: {file}: row {i}")
            if task["id"] in seen:
                raise UserError(f"--qa: {file}: row {i}: {task['id']} appears twice; is a file there under two names?")
            seen.add(task["id"])
            tasks.append(task)
    if not tasks:
        raise UserError(f"--qa: no list of ECG-QA rows in the .json files below {root}; name the folder of ECG-QA that holds train/, valid/ and test/")
    return tasks


def json_files(root: Path) -> list[Path]:
    """Every .json below `root`, sorted; not those that begin with a dot, which a Mac leaves beside each file of a zip."""
    return sorted(file for file in root.rglob("*.json") if not file.name.startswith("."))


def json_rows(file: Path) -> list[dict]:
    """The rows of a JSON file; none if it holds an object. Raises UserError naming --qa and the file."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise UserError(f"--qa: {file} is no list of ECG-QA rows ({first_line(error)}): download it again") from None
    if isinstance(rows, dict):
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--qa: {file} is no list of ECG-QA rows: it must be a JSON list of objects")
    return rows


def question_task(row: dict, id: str, where: str) -> dict:
    """The task of an ECG-QA row. Raises UserError that begins with `where`."""
    absent = [name for name in FIELDS if name not in row]
    if absent:
        raise UserError(f"{where} has no {absent[0]!r}; is this an ECG-QA 1.0.2 file?")
    if not isinstance(row["answer"], list) or not isinstance(row["ecg_id"], list):
        raise UserError(f"{where}: answer and ecg_id must be lists; is this an ECG-QA 1.0.2 file?")
    if not row["ecg_id"] or not all(isinstance(e, int | str) for e in row["ecg_id"]) or not isinstance(row["question"], str):
        raise UserError(f"{where}: question must be text and ecg_id a list of one or two record ids; is this an ECG-QA 1.0.2 file?")
    return {
        "id": id,
        "task": "ecgqa",
        **{name: row[name] for name in ("question_type", "attribute_type", "template_id", "question")},
        "answer": sorted(answer for answer in map(str, row["answer"]) if answer.strip()),
        "attribute": row.get("attribute"),
        "ecg_ids": tuple(map(str, row["ecg_id"])),
    }
