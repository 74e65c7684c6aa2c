"""Compare two systems on the same tasks: both scores, their difference with its interval, and how likely such a difference is by chance.

python -m toolkit.evaluation.compare runs/a/evaluate runs/b/evaluate             # folders of launchers/evaluate.py
python -m toolkit.evaluation.compare ours.jsonl theirs.jsonl --json              # or files of predictions, as toolkit.evaluation.score takes them

Rows are matched by id; where a file has none, by their number. Tasks that one file alone has are counted and left out. The difference is the first minus the
second, with a 95 % interval of 2,000 bootstrap draws of patients, the same for both; p is of 10,000 swaps of the two systems' answers, patient by patient.
The headline scores (exact match, BLEU-4 (corpus), ROUGE-L, F1 of clinical findings; as many as there are) were chosen beforehand and are corrected by Holm
for their number. p of any other line is not corrected: of twenty, one is below 0.05 by chance. Research software: a better score is no better care.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.evaluation.predictions import UNIT_NOTES, read_predictions, units
from toolkit.evaluation.statistics import holm, interval, permutation, resampled_all
from toolkit.evaluation.table import FINDINGS, QUESTIONS, REPORTS, Line, number, percent, scored_lines, shown_lines, signed
from toolkit.tasks.answers import split_answers

PREDICTIONS = "predictions.jsonl"
HEADLINE = {(QUESTIONS, "exact_match"), (REPORTS, "bleu_4_corpus"), (REPORTS, "rouge_l"), (FINDINGS, "f1")}  # of all rows
SYSTEMS = ("first", "second")
SAME = ("task", "question", "template_id")  # columns that a task has alike in both files, if both have them
NAMED = 3  # ids that a note names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m toolkit.evaluation.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs=2, metavar="E", help="folder of launchers/evaluate.py, or file of predictions")
    parser.add_argument("--json", action="store_true", help="print JSON, with all lines")
    args = parser.parse_args(argv)
    found = compare(*args.systems)
    print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) if args.json else compared_text(found))


def compare(first: str, second: str, draws: int = 2000, swaps: int = 10_000) -> dict:
    """{"systems", "matched", "alone": [n, n], "table", "notes"} of two folders or files.

    A line of "table": {"section", "score", "label", "level", "of", "n", "patients", "values": {"first", "second"}, "difference", "low", "high", "p", "p_holm"},
    fractions; None where undefined, p_holm of headline scores only. Raises UserError where nothing can be compared, and where a task differs in the two.
    """
    files = [Path(path) / PREDICTIONS if Path(path).is_dir() else Path(path) for path in (first, second)]
    ours, theirs = ({row["id"]: row for row in read_predictions(path, "E")} for path in files)
    both = [name for name in ours if name in theirs]
    if not both:
        raise UserError(f"E: {files[0]} ({next(iter(ours))!r}, ...) and {files[1]} ({next(iter(theirs))!r}, ...) have no id in common; judge the same tasks")
    for name in both:
        check_alike(ours[name], theirs[name], files)
    rows = [ours[name] for name in both]
    patients, unit = units(rows)
    if unit != "patients" and (known := units([theirs[name] for name in both]))[1] == "patients":
        patients, unit = known
    said = {system: [one[name]["prediction"] for name in both] for system, one in zip(SYSTEMS, (ours, theirs))}
    found = scored_lines(rows, said)
    drawn = resampled_all([score for line in found for score in line.pairs["second"]], patients, draws)
    lines = [compared(line, patients, unit, drawn, swaps) for line in found]
    heads = [line for line in lines if (line["section"], line["score"]) in HEADLINE and line["level"] == "all" and line["p"] is not None]
    for line, p in zip(heads, holm([line["p"] for line in heads])):
        line["p_holm"] = p
    alone = [[name for name in one if name not in other] for one, other in ((ours, theirs), (theirs, ours))]
    remarks = [
        f"{len(names):,} tasks are in {path} alone and left out: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}."
        for names, path in zip(alone, files) if names
    ]  # fmt: skip
    for path, given in zip(files, said.values()):
        if empty := sum(not one.strip() for one in given):
            remarks.append(f"{empty:,} of {len(given):,} predictions of {path} are empty: they score 0.")
    return {
        "systems": [str(first), str(second)], "matched": len(both), "alone": [len(names) for names in alone], "table": lines,
        "notes": remarks + list(UNIT_NOTES[unit]),
    }  # fmt: skip


def check_alike(one: dict, other: dict, files: list[Path]) -> None:
    """Raises UserError if two rows of one id are not of one task."""
    for column in SAME:
        if column in one and column in other and one[column] != other[column]:
            raise UserError(f"E: task {one['id']!r} is not the same in both: its {column} is {one[column]!r} in {files[0]}, {other[column]!r} in {files[1]}")
    parts = split_answers if one["task"] == "ecgqa" else str.split
    if parts(one["reference"]) != parts(other["reference"]):
        raise UserError(
            f"E: the references of task {one['id']!r} differ, {one['reference']!r} in {files[0]}, {other['reference']!r} in {files[1]}: "
            "give judgements of the same data, or ids that belong to one task alone"
        )


def compared(line: Line, patients: np.ndarray, unit: str, drawn: dict[int, np.ndarray | None], swaps: int) -> dict:
    """A line with its numbers."""
    one, other = line.pairs["second"]
    low, high = interval(None if drawn[id(one)] is None else drawn[id(one)] - drawn[id(other)])
    difference = number(one.all() - other.all())
    return {
        **line.names, "n": len(one.rows), "patients": len(np.unique(patients[one.rows])) if unit == "patients" else None,
        "values": dict(zip(SYSTEMS, (number(one.all()), number(other.all())))), "difference": difference, "low": None if difference is None else number(low),
        "high": None if difference is None else number(high), "p": permutation(one, other, patients, swaps), "p_holm": None,
    }  # fmt: skip


def compared_text(found: dict) -> str:
    """The comparison for a terminal of 120 columns, in percent."""
    lines = [f"first:  {found['systems'][0]}", f"second: {found['systems'][1]}", f"{found['matched']:,} tasks in both"]
    head = f"{'n':>8}{'first':>8}{'second':>8}{'first - second':>24}{'p':>9}{'p (Holm)':>10}"

    def cells(line: dict) -> str:
        difference = "-" if line["difference"] is None else signed(line)
        values = "".join(f"{percent(line['values'][name]):>8}" for name in SYSTEMS)
        return f"{line['n']:>8,}{values}{difference:>24}{_p(line['p']):>9}{_p(line['p_holm'], ''):>10}"

    lines += ["", *shown_lines(found["table"], head, cells)]
    if corrected := sum(line["p_holm"] is not None for line in found["table"]):
        lines.append(f"p (Holm): corrected for the number of headline scores, {corrected}. The other p are not corrected for theirs.")
    return "\n".join([*lines, *found["notes"]])


def _p(p: float | None, missing: str = "-") -> str:
    return missing if p is None else f"{p:.4f}"


if __name__ == "__main__":
    exit_2_on_user_error(main)()
