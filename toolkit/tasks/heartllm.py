"""The JSON rows of HeartLLM's own release (github.com/yangjinning/HeartLLM, dataset/): questions of ECG-QA and reports of PTB-XL and MIMIC-IV-ECG.

    dataset/ecgqa/*/template_{train,valid,test}_background.json   an ECG-QA row with `ecg_path` and `background`
    dataset/report/*/{train,valid,test}.json                      patient_id, ecg_id, `report`, `filepath`, `background`

The reports of MIMIC-IV-ECG are its statements glued together, "Sinus rhythm with PACs..Right bundle branch block.". `heartllm_rows` parts them,
so that they are the reports of the source mimic. `background` and `patient_id` hold patient numbers and dates: they are read by nothing here.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import UserError
from toolkit.tasks.ecgqa import json_rows, question_task

RECORD = re.compile(r"0*(\d+)(?:_[hl]r)?(?:\.(?:hea|dat))?$")  # the end of a path: 00004_hr of PTB-XL, 48198293 of MIMIC-IV-ECG
MIMIC = re.compile(r"(?:.*/)?p\d+/s\d+/\d+(?:\.(?:hea|dat))?")  # p1717/p17178532/s48124725/48124725
# Between two statements: two full stops or more, or one without white space behind it that stands neither in a number (1.5, .5) nor between
# chest leads (V1.V2) nor between single letters (e.g., A.V.). "V1.Sinus rhythm" is parted, and so is "rhythm.rSr'(V1)"; "V1.2:1 block" is not.
JOINT = re.compile(r"\.{2,}|\.(?=\S)(?!(?<=[\d\s]\.)\d)(?!(?<=V[1-6]\.)V[1-6]\b)(?!(?<=\b[A-Za-z]\.)[A-Za-z]\b)")


def read_heartllm(files: list[str | Path]) -> list[dict]:
    """Every row of `files` as tasks in the form of `read_ecgqa` (task "ecgqa") and of `report_tasks` (task "report"), in order of file and place.

    `ecg_ids` come from the row's path, so that they are the `record_id`s of the sources ptbxl and mimic. Reports are as in the file,
    those of MIMIC-IV-ECG parted: whoever writes them into shards cleans them first (sharding/reports.py). Raises UserError naming the file and the
    row, counted from 0.
    """
    tasks, seen = [], set()
    for file in map(Path, files):
        for where, record, row in heartllm_rows(file):
            if "question" in row:
                name = f"{file.parent.name}-{file.stem}-{row.get('sample_id', len(tasks))}"
                task = question_task({**row, "ecg_id": [record]}, name, where)
            else:
                kind = {"task": "report", "question_type": "report"}
                task = {"id": f"report-{record}", **kind, "report": row["report"], "ecg_ids": (record,)}
            if task["id"] in seen:
                raise UserError(f"{where}: {task['id']} appears twice; is a file named twice?")
            seen.add(task["id"])
            tasks.append(task)
    return tasks


def heartllm_rows(file: Path) -> Iterator[tuple[str, str, dict]]:
    """("file: row i" for messages, record id, row) of each row. Raises UserError where a row is neither question nor report of a record."""
    rows = json_rows(file)
    if not rows:
        raise UserError(f"{file} has no rows: name a .json of HeartLLM's dataset/ folder")
    for i, row in enumerate(rows):
        where = f"{file}: row {i}"
        if "question" not in row and not isinstance(row.get("report"), str):
            raise UserError(f"{where} has neither question nor report; is this a file of HeartLLM's dataset/ folder?")
        path = row.get("ecg_path", row.get("filepath"))
        match = RECORD.fullmatch(path.rsplit("/", 1)[-1]) if isinstance(path, str) else None
        if not match:
            raise UserError(f"{where}: ecg_path or filepath does not end in a record number; is this a file of HeartLLM's dataset/ folder?")
        if isinstance(row.get("report"), str) and MIMIC.fullmatch(path):
            row = {**row, "report": join_statements(JOINT.split(row["report"]))}
        yield where, match[1], row


def join_statements(statements: list[str]) -> str:
    """Statements of MIMIC-IV-ECG as sentences, each with one full stop: ["Sinus rhythm.", "", "Abnormal ECG"] -> "Sinus rhythm. Abnormal ECG."."""
    said = [statement.strip().rstrip(" .") for statement in statements]
    return " ".join(s if s[-1] in "!?:;," else s + "." for s in said if s)
