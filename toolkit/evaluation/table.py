"""All scores of prediction rows in one table: the model beside its controls, with intervals over patients, for all rows and group by group.

`table(rows)` gives what metrics.json holds, `text_table` the same for a terminal, `find` one line of it. Fractions in 0..1; None where undefined.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from toolkit.errors import UserError
from toolkit.evaluation import findings, metrics
from toolkit.evaluation.predictions import MODEL, UNIT_NOTES, UNKNOWN, units
from toolkit.evaluation.scores import Score
from toolkit.evaluation.statistics import interval, resampled_all
from toolkit.tasks.answers import split_answers

OVER = ("shuffled", "flat", "majority", "blind")  # the terminal shows the difference to the first of these that there is
QUESTIONS, REPORTS, FINDINGS = "ECG-QA", "Reports", "Clinical findings"
GROUPED = {  # section -> level -> the scores that are given group by group
    QUESTIONS: {
        "question_type": ("exact_match", "answer_f1", "invalid"),
        "attribute_type": ("exact_match",),
        "multi_answer": ("exact_match", "answer_f1"),
        "site": ("exact_match",),
        "template": ("exact_match",),
    },
    REPORTS: {"site": ("bleu_4_corpus", "rouge_l")},
    FINDINGS: {"site": ("f1",)},
}
MACRO = {"question_type": "types", "template": "templates"}  # levels over whose groups exact match is averaged
TITLES = {"question_type": "by question type", "attribute_type": "by attribute", "site": "by site", "finding": "by finding"}
SEVERAL = "2+ answers"
CONVENTIONS = {
    "interval": (
        "95 % percentile interval of bootstrap draws of patients, each with all rows; a question about ECGs of two patients is the first one's; the model "
        "stays as it is in all draws. None of fewer than two patients, and where more than 5 % of the draws leave the score undefined"
    ),
    "difference": "model minus control on the same rows, both in the same draws of patients; to the shuffled control it is what the model reads from the ECG",
    "controls": (
        "majority: most frequent answer of the training split for the template, or report; blind: for the template and the attributes asked for; shuffled: the "
        "model with the ECG of another patient; flat: with an ECG of zeros; noise: with noise at this signal-to-noise "
        "ratio added; what the model says to these is cut at twice its longest own answer of the batch"
    ),
    "macro": "mean over question types, or over templates, of the exact match of each; an interval's draws need a row of every one",
    "multi_answer": "questions whose reference has two or more answers",
}
WIDTH, NAME = 120, 33  # of a terminal, of the first column


def table(rows: Sequence[dict], classes: dict[int, list[str]] | None = None, columns: Sequence[str] | None = None, draws: int = 2000) -> dict:
    """{"columns", "table", "notes", "conventions"} of prediction rows with their `controls`.

    classes: template -> its answers; without them there is no share of invalid answers. columns: controls to show, in order; all that there are by default.
    A line of "table" is {"section", "score", "label", "level", "of", "n", "patients", "values", "interval", "differences"}. A control that some of its rows
    lack (not every ECG has another patient's to stand in) is of those that have it, as is its difference to the model; how many they are is then in "rows".
    Raises UserError for rows that cannot be scored.
    """
    patients, unit = units(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.get("controls", {}))) if columns is None else list(columns)
    said = {MODEL: [row["prediction"] for row in rows]} | {name: [row.get("controls", {}).get(name) for row in rows] for name in names}
    found = scored_lines(rows, said, classes)
    drawn = resampled_all([score for line in found for pair in line.pairs.values() for score in pair], patients, draws)
    lines = []
    for line in found:
        model = line.pairs[MODEL][0]
        low, high = map(number, interval(drawn[id(model)]))
        values = {name: number(pair[1].all()) for name, pair in line.pairs.items()}
        fewer = {name: len(score.rows) for name, (_, score) in line.pairs.items() if len(score.rows) < len(model.rows)}
        lines.append({
            **line.names, "n": len(model.rows), "patients": len(np.unique(patients[model.rows])) if unit == "patients" else None,
            "values": {name: values.get(name) for name in said},
            "interval": None if low is None or values[MODEL] is None else [low, high],
            "differences": {name: over for name, pair in line.pairs.items() if name != MODEL and (over := _difference(*pair, drawn))},
            **({"rows": fewer} if fewer else {}),
        })  # fmt: skip
    conventions = {**metrics.CONVENTIONS, "findings": findings.CONVENTION, **CONVENTIONS}
    return {"columns": list(said), "table": lines, "notes": notes(rows, said, unit), "conventions": conventions}


class Line(NamedTuple):
    """A line of the table before there are numbers."""

    names: dict[str, str]  # section, score, label, level, of
    pairs: dict[str, tuple[Score, Score]]  # column -> the first column's score and its own, both of the rows of the line that it answered


def scored_lines(rows: Sequence[dict], said: dict[str, Sequence[str | None]], classes: dict[int, list[str]] | None = None) -> list[Line]:
    """The lines that have rows. said: column -> its answer to each row, None where it has none; the first column, the model's, has all."""
    if not rows:
        raise UserError("there is no prediction to judge: the split or the file is empty")
    found = []
    for section, task, scorer in (
        (QUESTIONS, "ecgqa", lambda part, answers: metrics.ecgqa_scores(part, answers, classes)),
        (REPORTS, "report", metrics.report_scores),
        (FINDINGS, "report", findings.finding_scores),
    ):
        places = np.array(metrics.places(rows, task), np.int64)
        part = [rows[i] for i in places]
        answers = {name: [given[i] for i in places] for name, given in said.items()}
        answered = {name: np.flatnonzero([answer is not None for answer in given]) for name, given in answers.items()}
        scores = {name: scorer(part, [answer or "" for answer in answers[name]]) for name, at in answered.items() if len(at)}
        groups = {level: _groups(part, level) for level in GROUPED[section]}
        for each in zip(*scores.values()):
            for names, chosen in _lines(section, dict(zip(scores, each)), groups):
                first, *_ = chosen = {name: replace(score, rows=places[score.rows]) for name, score in chosen.items()}.values()
                pairs = {}
                for name, score in zip(scores, chosen):
                    at = answered[name]  # the model's own Score where it is of the same rows: its draws are then made once
                    pair = (first, score) if len(at) == len(part) else (first.on(places[at]), score.on(places[at]))
                    if len(score.rows) and len(pair[1].rows):
                        pairs[name] = pair
                if pairs:
                    found.append(Line(names, pairs))
    order = {level: i for i, level in enumerate(("all", "macro", *GROUPED[QUESTIONS], "finding"))}
    sections = list(GROUPED)
    return sorted(found, key=lambda line: (sections.index(line.names["section"]), order[line.names["level"]]))


def _lines(section: str, scores: dict[str, Score], groups: dict[str, np.ndarray]) -> Iterator[tuple[dict[str, str], dict[str, Score]]]:
    """The lines of one score, over all rows, macro, and group by group: the names of each and every column's score.

    scores: of each column. groups: level -> the group of each row, "" for none.
    """
    score = next(iter(scores.values()))
    family, _, finding = score.name.partition(":")
    line = {"section": section, "score": family, "label": score.label, "level": "finding" if finding else "all", "of": finding or "all"}
    yield line, scores
    if score.name == "exact_match":
        for level, many in MACRO.items():
            known = np.flatnonzero(groups[level] != "")
            if len(known):
                means = {name: macro(one.on(known), groups[level]) for name, one in scores.items()}
                yield {**line, "label": f"{score.label}, mean of {many}", "level": "macro", "of": level}, means
    for level, names in GROUPED[section].items():
        if family in names and not finding:
            for of in sorted(set(groups[level]) - {""}, key=_natural):
                rows = np.flatnonzero(groups[level] == of)
                yield {**line, "level": level, "of": of}, {name: one.on(rows) for name, one in scores.items()}


def _groups(rows: Sequence[dict], level: str) -> np.ndarray:
    """The group of each row [n] as text, "" for none."""
    if level == "multi_answer":
        groups = [SEVERAL if len(split_answers(row["reference"])) > 1 else "" for row in rows]
    elif level == "site":
        sources = {row.get("source", "") for row in rows}
        parts = [(row.get("source", "") if len(sources) > 1 else "", f"site {row['site']}" if row.get("site") else "") for row in rows]
        groups = [", ".join(filter(None, part)) for part in parts]
        groups = groups if len(set(groups)) > 1 else [""] * len(rows)  # one site alone is all rows
    else:
        groups = [str(row.get("template_id" if level == "template" else level, "")) for row in rows]
    return np.array(groups, dtype=object)


def macro(score: Score, groups: np.ndarray) -> Score:
    """The mean over groups of a score of each. groups: [all rows], of which those of the score are used. Its stats are to be 0 or 1, as those of exact match:
    a byte each, because every row has some for every group (of 270,000 questions of 40 templates 22 MB).
    """
    names, group = np.unique(groups[score.rows].astype(str), return_inverse=True)
    width = score.stats.shape[1]
    stats = np.zeros((len(score.rows), len(names), width), np.uint8)
    stats[np.arange(len(score.rows)), group] = score.stats

    def value(sums: np.ndarray) -> np.ndarray:
        return score.value(sums.reshape(*sums.shape[:-1], len(names), width)).mean(-1)

    return replace(score, stats=stats.reshape(len(score.rows), -1), value=value)


def find(metrics: dict, score: str, of: str = "all", level: str = "all") -> dict | None:
    """The line of a table, such as find(metrics, "exact_match", "single-verify", "question_type"); None if it has none."""
    return next((line for line in metrics["table"] if (line["score"], line["of"], line["level"]) == (score, of, level)), None)


def notes(rows: Sequence[dict], said: dict[str, list[str | None]], unit: str) -> list[str]:
    """What a reader of the numbers must know, a sentence each."""
    found = list(UNIT_NOTES[unit])
    if empty := sum(not row["prediction"].strip() for row in rows):
        found.append(f"{empty:,} of {len(rows):,} predictions are empty: they score 0.")
    for name, answers in said.items():
        if missing := sum(answer is None for answer in answers):
            found.append(f"{missing:,} of {len(rows):,} rows have no {name!r} control: its figures, and the difference to it, are of the others.")
    if unknown := sum(row.get("question_type") == UNKNOWN for row in rows):
        found.append(f"{unknown:,} questions name no type: they stand under {UNKNOWN!r}.")
    return found


def text_table(metrics: dict) -> str:
    """The table for a terminal of 120 columns, in percent, with the difference to the shuffled control, else to another. Lines of templates and of a
    finding's precision and recall are counted, not shown."""
    controls = [name for name in metrics["columns"] if name != MODEL]
    over = next((name for name in (*OVER, *controls) if name in controls), None)
    room = WIDTH - NAME - 29 - (24 if over else 0)
    shown = [name for i, name in enumerate(controls) if sum(map(_width, controls[: i + 1])) <= room]
    head = f"{'n':>8}{MODEL:>6}{'95 % interval':>15}" + "".join(f"{name:>{_width(name)}}" for name in shown) + (f"{'over ' + over:>24}" if over else "")

    def cells(line: dict) -> str:
        between = f"{percent(line['interval'][0])} to {percent(line['interval'][1])}" if line["interval"] else "-"
        values = "".join(f"{percent(line['values'][one]):>{_width(one)}}" for one in shown)
        difference = f"{signed(line['differences'][over]) if over in line['differences'] else '-':>24}" if over else ""
        return f"{line['n']:>8,}{percent(line['values'][MODEL]):>6}{between:>15}{values}{difference}"

    lines = shown_lines(metrics["table"], head, cells)
    if len(shown) < len(controls):
        lines += [f"In the JSON, for want of room here: {', '.join(controls[len(shown) :])}."]
    return "\n".join([*lines, *metrics["notes"]])


def shown_lines(table: Sequence[dict], head: str, cells: Callable[[dict], str]) -> list[str]:
    """Lines of text, each the name of a line and its cells, under the heads of sections and groups; the lines that are too many are counted."""
    chosen = [line for line in table if line["level"] != "template" and (line["level"] != "finding" or line["score"] == "f1")]
    chosen = [line for line in chosen if any(value is not None for value in line["values"].values())]
    lines, section, group = [], None, None
    for line in chosen:
        if line["section"] != section:
            section = line["section"]
            lines += ["", f"{section:<{NAME}}{head}"]
        title = f"{'F1' if line['level'] == 'finding' else line['label']}, {TITLES[line['level']]}" if line["level"] in TITLES else None
        if title and title != group:
            lines.append(f"{title}:")
        group, name = title, line["label"] if line["level"] in ("all", "macro") else f"{line['label']}, {line['of']}"
        if title:
            name = f"  {line['label'].rpartition(':')[0] if line['level'] == 'finding' else line['of']}"
        lines.append(f"{name if len(name) < NAME else name[: NAME - 2] + '…':<{NAME}}{cells(line)}")
    if len(chosen) < len(table):
        lines += [
            "",
            f"{len(table) - len(chosen)} more lines (templates, precision and recall of single findings, findings that no report has) are in the JSON.",
        ]
    return lines[1:]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def signed(difference: dict) -> str:
    """A difference as "+8.1 (+6.1 to +10.2)", in points of percent; without the interval where there is none."""
    value, low, high = (None if difference[name] is None else f"{round(100 * difference[name], 1) + 0.0:+.1f}" for name in ("difference", "low", "high"))
    return value if low is None else f"{value} ({low} to {high})"


def _difference(model: Score, control: Score, drawn: dict[int, np.ndarray | None]) -> dict | None:
    value = number(model.all() - control.all())
    ours, theirs = drawn[id(model)], drawn[id(control)]
    low, high = interval(None if ours is None else ours - theirs)
    return None if value is None else {"difference": value, "low": number(low), "high": number(high)}


def number(value: float | None) -> float | None:
    """For a file: no nan, and without the digits past the ninth, which hang on how many threads added up."""
    return None if value is None or np.isnan(value) else round(float(value), 9)


def _width(name: str) -> int:
    return max(len(name), 5) + 2


def _natural(name: str) -> tuple:
    """Numbers by size: site 2 before site 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split())
