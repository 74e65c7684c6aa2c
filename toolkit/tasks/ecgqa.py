"""Rows of ECG-QA 1.0.2: JSON lists below any folder, official (template, paraphrased) or one's own in the same format."""

import json
from pathlib import Path

from toolkit.errors import UserError

FIELDS = ("template_id", "question_type", "attribute_type", "question", "answer", "ecg_id")


def read_ecgqa(root: str | Path) -> list[dict]:
    """Every row below `root`, in order of file and place, as tasks: id, task, question_type, attribute_type, template_id, question,
    answer (list of str), attribute (list of str or None), ecg_ids (tuple of str).

    The split of a file's folder is ignored: a task belongs to the split of its ECG. Raises UserError naming --qa.
    """
    root = Path(root)
    files = sorted(root.rglob("*.json"))
    if not files:
        raise UserError(f"--qa: no .json files below {root}; name the folder of ECG-QA that holds train/, valid/ and test/")
    wordings = {"template", "paraphrased"} & {part for file in files for part in file.relative_to(root).parts}
    if len(wordings) > 1:
        raise UserError(f"--qa: {root} holds template/ and paraphrased/, the same questions in two wordings; name one of them")
    tasks, seen = [], set()
    for file in files:
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
            part = "-".join(file.relative_to(root).parts[:-1]) or "qa"
            for row in rows:
                absent = [name for name in FIELDS if name not in row]
                if absent:
                    raise UserError(f"--qa: {file}: a row has no {absent[0]!r}; is this an ECG-QA 1.0.2 file?")
                if not isinstance(row["answer"], list) or not isinstance(row["ecg_id"], list):
                    raise UserError(f"--qa: {file}: answer and ecg_id must be lists; is this an ECG-QA 1.0.2 file?")
                task = {
                    "id": f"{part}-{row.get('sample_id', len(tasks))}",
                    "task": "ecgqa",
                    **{name: row[name] for name in ("question_type", "attribute_type", "template_id", "question")},
                    "answer": sorted(map(str, row["answer"])),
                    "attribute": row.get("attribute"),
                    "ecg_ids": tuple(str(e) for e in row["ecg_id"]),
                }
                if task["id"] in seen:
                    raise UserError(f"--qa: {file}: {task['id']} appears twice; is a file there under two names?")
                seen.add(task["id"])
                tasks.append(task)
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--qa: {file} is no list of ECG-QA rows ({error})") from None
    return tasks
