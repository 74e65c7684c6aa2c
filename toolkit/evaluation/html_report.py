"""The evaluation as one HTML file that needs nothing else: tables, cases, and ECGs drawn by a script inside; it fetches nothing.

`write_report("report.html", metrics, rows, ecgs, info)`. The page is report.html.j2, report.css, report_ecg.js and report.js; here the numbers are made
readable and the data small: 2,510 cases with six controls take 0.46 MB, an ECG with its reconstruction 36 kB in mV (mean of 85) and 59 kB z-scored.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from toolkit.evaluation.metrics import is_correct
from toolkit.evaluation.predictions import MODEL
from toolkit.evaluation.table import OVER
from toolkit.evaluation.text import rouge
from toolkit.files import write_text

OPEN_LEVELS = ("question_type", "attribute_type")  # groups that are not folded
LEVELS = {
    "question_type": "by question type",
    "attribute_type": "by attribute type",
    "multi_answer": "of questions with several answers",
    "site": "by site",
    "template": "by template",
    "finding": "by finding",
}
FEWER_IS_BETTER = ("invalid",)
FILTERS = {  # as report.js names them
    "type": "Question type", "attribute": "Attribute", "label": "Diagnosis", "result": "Right or wrong", "site": "Site", "ecg": "ECG",
}  # fmt: skip
PATHS = ("model", "shards")  # of what was run; where a person's files lie is nobody's business
MISSING = "–"  # a score that is not defined

STEP = 0.005  # 5 uV: a fifth of a pixel at the page's usual size
TEXTED = ("question_type", "attribute_type", "question", "reference", "prediction", "site")
FIELDS = ("id", "task", *TEXTED, "template_id", "loglik", "sample", "correct", "score", "labels", "controls")


def write_report(path: str | os.PathLike, metrics: dict, rows: Sequence[dict], ecgs: dict[int, list[dict]], info: dict) -> None:
    """Write the self-contained report.

    metrics: as `toolkit.evaluation.table.table` gives it. rows: the prediction rows to list, all that were judged or some. ecgs: sample -> its ECGs, as
    `toolkit.evaluation.cards.ecgs` gives them, of the cases that shall have one. info: what was run, shown as a table in the given order; a list is joined
    by commas, and of the paths of model and shards the last part is shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # always: a model may well generate "<script>"
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    controls = [name for name in metrics["columns"] if name != MODEL]
    over = next((name for name in (*OVER, *controls) if name in controls), None)
    script = '"use strict";\n{\n' + _part("report_ecg.js") + _part("report.js") + "}\n"
    page = environment.get_template("report.html.j2").render(
        style=Markup(_part("report.css")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        info={name: _text(_ends(value) if name in PATHS else value) for name, value in info.items()},
        notes=metrics["notes"],
        columns=["Model", *controls],
        over=over,
        lead=_lead(metrics["table"], over),
        sections=_sections(metrics["table"], controls, over),
        conventions=metrics["conventions"],
        filters=FILTERS,
        cases=_json(packed_cases(rows, ecgs)),
        ecgs={f"ecg-{sample}-{number}": _json(packed_ecg(ecg)) for sample, several in ecgs.items() for number, ecg in enumerate(several)},
    )
    write_text(Path(path), page)


def _sections(lines: Sequence[dict], controls: list[str], over: str | None) -> list[dict]:
    """The tables of each section: all rows and means of groups first, then a table for every score that is given group by group."""
    tables: dict[str, dict[tuple[str, str], dict]] = {}
    for line in lines:
        section, level, score = line["section"], line["level"], line["score"].partition(":")[0]
        whole = level in ("all", "macro")
        if whole:
            key, title, head, label = ("all", ""), section, "Score", line["label"]
        else:
            # lines of single findings name the finding in their label too
            name = score.replace("_", " ").capitalize() if level == "finding" else line["label"]
            kind = LEVELS.get(level, f"by {level.replace('_', ' ')}")
            key, title, head, label = (level, score), f"{name}, {kind}", kind.removeprefix("by ").capitalize(), str(line["of"])
        group = tables.setdefault(section, {})
        folded = not whole and (level not in OPEN_LEVELS or any(known == level and other != score for known, other in group))
        table = group.setdefault(key, {"title": title, "head": head, "folded": folded, "rows": []})
        table["rows"].append({**_row(line, controls, over), "label": label, "total": whole and line["score"] == "exact_match" and level == "all"})
    fewer = {line["section"] for line in lines if line["score"] in FEWER_IS_BETTER}
    return [{"title": section, "tables": list(group.values()), "invalid": section in fewer} for section, group in tables.items()]


def _row(line: dict, controls: list[str], over: str | None) -> dict:
    """A line as text: scores in percent, differences in points, and the two lengths of the bar in percent of its width."""
    values, cells = line["values"], []
    for name in controls:
        found = line["differences"].get(name)
        worse = found is not None and round(100 * found["difference"], 1) * (-1 if line["score"] in FEWER_IS_BETTER else 1) < 0
        difference, interval = (None, None) if found is None else (_points(found["difference"]), _between(found["low"], found["high"], _points))
        cells.append({"value": _percent(values.get(name)), "difference": difference, "interval": interval, "worse": worse})
    model, mark = values[MODEL], None if over is None else values.get(over)
    return {
        "n": f"{line['n']:,}",
        "patients": None if line["patients"] is None else f"{line['patients']:,} patients",
        "model": _percent(model),
        "interval": _between(*(line["interval"] or (None, None)), _percent),
        "controls": cells,
        "bar": None if model is None else f"{100 * model:.2f}%",
        "mark": None if mark is None else f"{100 * mark:.2f}%",
        "over": _percent(mark),
    }


def _lead(lines: Sequence[dict], over: str | None) -> dict | None:
    """The sentence that the page opens with: exact match of all questions, else ROUGE-L of all reports."""
    for score, what, unit in (("exact_match", "exact match", "questions"), ("rouge_l", "ROUGE-L", "reports")):
        line = next((line for line in lines if (line["score"], line["level"]) == (score, "all")), None)
        if line is not None and line["values"][MODEL] is not None:
            row = _row(line, [over] if over else [], over)
            beside = {"name": over, **row["controls"][0]} if over and row["controls"][0]["difference"] else None
            return {"what": what, "unit": unit, "n": row["n"], "model": row["model"], "interval": row["interval"], "over": beside}
    return None


def packed_cases(rows: Sequence[dict], ecgs: dict[int, list[dict]]) -> dict:
    """The cases as report.js reads them: a list a row, in which a text is its place among all texts, because most occur many times. Questions are right or
    wrong, reports have ROUGE-L."""
    places: dict[str, int] = {}

    def place(text: str | None) -> int | None:
        return None if text is None else places.setdefault(text, len(places))

    packed = []
    for i, row in enumerate(rows):
        question = row["task"] == "ecgqa"
        case = {"id": str(row.get("id", i)), **{name: row.get(name) for name in ("task", "template_id", "sample")}}
        case |= {"correct": is_correct(row) if question else None, "score": None if question else round(rouge(row["reference"], row["prediction"])[2], 3)}
        case |= {name: place(row.get(name) or None) for name in TEXTED} | {name: place(row[name]) for name in ("reference", "prediction")}
        case["loglik"] = None if row.get("loglik") is None else round(float(row["loglik"]), 3)
        case["labels"] = [place(label) for label in row.get("labels") or []]
        case["controls"] = [[place(name), place(text)] for name, text in (row.get("controls") or {}).items()]
        packed.append([case[field] for field in FIELDS])
    return {"fields": FIELDS, "texted": TEXTED, "texts": list(places), "rows": packed, "ecgs": {sample: len(several) for sample, several in ecgs.items()}}


def packed_ecg(ecg: dict) -> dict:
    """An ECG as report_ecg.js reads it: its arrays as int16 in steps of 5 uV (or 0.005 SD), differences of neighbours in zigzag, all low bytes of an array
    before all high ones, deflated, base64. Recording and reconstruction, 10 s at 250 Hz: 36 kB in mV, 59 kB z-scored; plain int16 in base64 would be 160.
    """
    arrays = {name: np.asarray(ecg[name]) for name in ("signal", "reconstruction") if ecg[name] is not None}
    planes = bytearray()
    for array in arrays.values():
        steps = np.clip(np.round(array / STEP), -(2**15), 2**15 - 1).astype(np.int16)
        change = np.diff(steps, axis=1, prepend=np.int16(0))  # wraps, and so does its sum
        zigzag = ((change << 1) ^ (change >> 15)).view(np.uint16)
        planes += (zigzag & 255).astype(np.uint8).tobytes() + (zigzag >> 8).astype(np.uint8).tobytes()
    return {
        **{name: ecg[name] for name in ("title", "note", "fs", "unit", "levels")},
        "samples": next(iter(arrays.values())).shape[1],
        "arrays": list(arrays),
        "step": STEP,
        "tokens": np.asarray(ecg["tokens"]).tolist(),
        "data": base64.b64encode(zlib.compress(bytes(planes), 9)).decode("ascii"),
    }


def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _json(value) -> Markup:
    """JSON that may stand in a <script>: nothing in it can end the element."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _between(low: float | None, high: float | None, written) -> str | None:
    return None if low is None or high is None else f"{written(low)} to {written(high)}"


def _points(difference: float) -> str:
    # + 0.0 turns the -0.0 of a rounded tiny loss into 0.0, which reads "+0.0".
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "−")


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f}"


def _ends(paths: str | Sequence[str]) -> str | list[str]:
    return Path(paths).name or paths if isinstance(paths, str) else [_ends(path) for path in paths]


def _text(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if value is None or value == "":
        return MISSING
    # Only counts get separators; a float (a learning rate, say) is printed as it was given.
    return f"{value:,}" if type(value) is int else str(value)
