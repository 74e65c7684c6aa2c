"""The evaluation as one HTML file that needs nothing else: no script, no network, images inside.

`write_report("report.html", metrics, samples, info)`. The page is `report.html.j2`; here the numbers are made readable.
"""

import base64
import os
from pathlib import Path

import jinja2

from toolkit.evaluation.metrics import EXACT_MATCH_CONVENTION, OVER_BLIND_CONVENTION, REPORT_CONVENTION
from toolkit.files import write_text

REPORT_SCORES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
}

MISSING = "–"  # a score of a kind the split does not hold


def write_report(path: str | os.PathLike, metrics: dict, samples: list[dict], info: dict) -> None:
    """Write the self-contained report.

    metrics: `{"exact_match": {"overall", <question type>}, "counts": {<question type>: n}, "report": {"bleu_1", ...,
        "rouge_l", "n"}, "blind": {"exact_match": {...}, "report": {...}}}`, fractions in 0..1 or None; with "over_blind", that of
        `metrics.over_blind`, differences of exact match get their intervals.
    samples: `{"key", "title", "png": bytes, "questions": [{"question_type", "question", "reference", "prediction",
        "blind", "correct": bool}], "report": {"reference", "prediction"} | None}`, one card each.
    info: what was run, shown as a table in the given order; a list is joined by commas.
    """
    blind = metrics["blind"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # always: a model may well generate "<script>"
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        info={name: _text(value) for name, value in info.items()},
        questions=_question_rows(metrics["exact_match"], blind["exact_match"], metrics["counts"], metrics.get("over_blind", {})),
        reports=_report_rows(metrics["report"], blind["report"]),
        report_count=f"{metrics['report']['n']:,}",
        exact_match_convention=EXACT_MATCH_CONVENTION,
        over_blind_convention=OVER_BLIND_CONVENTION,
        report_convention=REPORT_CONVENTION,
        cards=[_card(sample) for sample in samples],
    )
    write_text(Path(path), page)


def _question_rows(model: dict, blind: dict, counts: dict, over_blind: dict) -> list[dict]:
    rows = []
    for kind, n in {"overall": sum(counts.values()), **counts}.items():
        over = over_blind.get(kind, {"low": None})
        interval = None if over["low"] is None else f"{_points(over['low'])} to {_points(over['high'])}"
        label = "All questions" if kind == "overall" else kind
        rows.append({**_score_row(label, model[kind], blind.get(kind), n=n), "interval": interval})
    return rows


def _report_rows(model: dict, blind: dict) -> list[dict]:
    return [_score_row(label, model[name], blind[name], n=model["n"]) for name, label in REPORT_SCORES.items()]


def _score_row(label: str, model: float | None, blind: float | None, n: int) -> dict:
    """One table row: numbers as text in percent, and the two lengths of the bar in percent of its width."""
    difference = None if model is None or blind is None else model - blind
    return {
        "label": label,
        "n": f"{n:,}",
        "model": _percent(model),
        "blind": _percent(blind),
        "difference": MISSING if difference is None else _points(difference),
        "worse": difference is not None and round(100 * difference, 1) < 0,
        "bar": None if model is None else f"{100 * model:.2f}%",
        "mark": None if blind is None else f"{100 * blind:.2f}%",
    }


def _card(sample: dict) -> dict:
    return {
        "title": sample["title"],
        "key": sample["key"],
        "image": base64.b64encode(sample["png"]).decode("ascii"),
        "questions": sample["questions"],
        "right": sum(bool(question["correct"]) for question in sample["questions"]),
        "report": sample["report"],
    }


def _points(difference: float) -> str:
    # + 0.0 turns the -0.0 of a rounded tiny loss into 0.0, which reads "+0.0".
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "−")


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f}"


def _text(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if value is None or value == "":
        return MISSING
    # Only counts get separators; a float (a learning rate, say) is printed as it was given.
    return f"{value:,}" if type(value) is int else str(value)
