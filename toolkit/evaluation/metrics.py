"""Scores of prediction rows: exact match, F1 and invalid answers for questions; BLEU, METEOR and ROUGE for reports (`text.py`).

A prediction row is a dict `{"id", "task": "ecgqa" | "report", "question_type", "template_id", "prediction": str, "reference": str, ...}`;
several answers to one question stand in one string, joined by `toolkit.tasks.answers.ANSWER_SEPARATOR`. What is judged may also be other
texts than the column "prediction", such as a control's, so `ecgqa_scores` and `report_scores` take them beside the rows.
Every score is a fraction in 0..1. `CONVENTIONS` belongs beside the numbers.
"""

import ast
import csv
import os
from collections import Counter
from collections.abc import Sequence

from toolkit.errors import UserError, first_line
from toolkit.evaluation import text
from toolkit.evaluation.scores import Score, mean_score
from toolkit.tasks.answers import ANSWER_SEPARATOR, split_answers

TASKS = ("ecgqa", "report")
SINGLE_QUESTION_TYPES = ("single-verify", "single-choose", "single-query")

QUESTION_KINDS = ("verify", "choose", "query", "unknown")  # the last one of predictions that do not say
CONVENTIONS = {
    "exact_match": (
        'set equality of the normalised answers (lower case, stripped, split on the answer separator "; "); over all questions it is the micro average, '
        "and an empty prediction scores 0"
    ),
    "answer_f1": (
        'mean over questions of a type that ends in "query" of F1 = 2 |prediction and reference| / (|prediction| + |reference|), both as the sets of '
        "exact match; an empty prediction scores 0"
    ),
    "invalid": (
        "share of predictions that are empty or hold an answer outside the template's classes, right or wrong, so that fewer are better; over questions "
        "whose template has classes"
    ),
    **text.CONVENTIONS,
}


def is_correct(row: dict) -> bool:
    """Whether the answers of the prediction are the set of the reference's answers."""
    return split_answers(column(row, "prediction")) == split_answers(column(row, "reference"))


def exact_match(rows: Sequence[dict]) -> dict[str, float | None]:
    """Fraction of questions whose set of answers equals the reference set; reports among the rows are passed over.

    Returns `{"overall": micro average, "<question_type>": fraction, ...}`, the three single types always and first, then the others by name; None
    stands where there is no question. Raises UserError on a row of an unknown task or without a column.
    """
    questions = [rows[i] for i in places(rows, "ecgqa")]
    asked = Counter(column(row, "question_type") for row in questions)
    right = Counter(row["question_type"] for row in questions if is_correct(row))
    kinds = (*SINGLE_QUESTION_TYPES, *sorted(set(asked) - set(SINGLE_QUESTION_TYPES)))
    found = {"overall": (right.total(), asked.total()), **{kind: (right[kind], asked[kind]) for kind in kinds}}
    return {kind: part / whole if whole else None for kind, (part, whole) in found.items()}


def ecgqa_scores(rows: Sequence[dict], predictions: Sequence[str], classes: dict[int, list[str]] | None) -> list[Score]:
    """exact_match of all questions; answer_f1 of query questions; with classes, invalid of those questions whose template has some.

    predictions: [len(rows)], what is judged of each row. classes: of `read_classes`. A score of no row is left out. Raises UserError without rows, and
    on a row of an unknown task or question type, without a column or with a reference that holds no answer; ValueError if predictions do not fit the rows.
    """
    questions = _judged(rows, predictions, "ecgqa")
    wanted = {i: split_answers(column(rows[i], "reference")) for i in questions}
    for i in questions:
        check_question_type(column(rows[i], "question_type"), _name(rows[i]))
        if not wanted[i]:
            raise UserError(f"{_name(rows[i])}: the column 'reference' holds no answer")
    given = {i: split_answers(predictions[i]) for i in questions}
    queries = [i for i in questions if column(rows[i], "question_type").endswith("query")]
    closed = [i for i in questions if rows[i].get("template_id") in (classes or {})]
    allowed = {template: frozenset().union(*map(split_answers, answers)) for template, answers in (classes or {}).items()}

    judged = (
        ("exact_match", "Exact match", questions, lambda i: given[i] == wanted[i]),
        ("answer_f1", "Answer F1 (query)", queries, lambda i: 2 * len(given[i] & wanted[i]) / (len(given[i]) + len(wanted[i]))),
        ("invalid", "Invalid answers", closed, lambda i: not given[i] or not given[i] <= allowed[rows[i]["template_id"]]),
    )
    return [mean_score(name, label, at, [score(i) for i in at]) for name, label, at, score in judged if at]


def check_question_type(kind: str, where: str) -> None:
    """Raises UserError for a question type that does not end as those of ECG-QA do: the end says how it is answered and scored."""
    if kind.rpartition("-")[2] not in QUESTION_KINDS:
        raise UserError(f"{where}: question type {kind!r} is unknown; it has to end with {', '.join(QUESTION_KINDS[:-2])} or {QUESTION_KINDS[-2]}")


def report_scores(rows: Sequence[dict], predictions: Sequence[str]) -> list[Score]:
    """The scores of `text.text_scores` of the report rows; [] where there is none.

    predictions: [len(rows)], what is judged of each row. Raises UserError without rows, and on a row of an unknown task or without a
    reference; ValueError if predictions do not fit the rows.
    """
    reports = _judged(rows, predictions, "report")
    if not reports:
        return []
    return text.text_scores(reports, [column(rows[i], "reference") for i in reports], [predictions[i] for i in reports])


def read_classes(path: str | os.PathLike) -> dict[int, list[str]]:
    """Template -> its possible answers, from ECG-QA's answers_for_each_template.csv: columns template_id and classes, a Python list.

    Raises UserError naming --classes and the line.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            if not {"template_id", "classes"} <= set(lines.fieldnames or ()):
                raise UserError(f"--classes: {path} has no columns template_id and classes; it is to be ECG-QA's answers_for_each_template.csv")
            classes: dict[int, list[str]] = {}
            for line in lines:
                template, answers = _classes_of(line, f"--classes: line {lines.line_num} of {path}")
                if template in classes:
                    raise UserError(f"--classes: line {lines.line_num} of {path}: template {template} was there before")
                classes[template] = answers
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--classes: {path} cannot be read: {first_line(error)}") from None
    if not classes:
        raise UserError(f"--classes: {path} holds no template")
    return classes


def _classes_of(line: dict, where: str) -> tuple[int, list[str]]:
    try:
        template, answers = int(line["template_id"]), ast.literal_eval(line["classes"])
    except (TypeError, ValueError, SyntaxError):
        raise UserError(f"{where}: a template number and a list such as \"['no', 'yes']\" are to stand there") from None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise UserError(f"{where}: classes is to be a list of answers, such as ['no', 'yes']")
    if parted := next((answer for answer in answers if ANSWER_SEPARATOR.strip() in answer), None):
        raise UserError(f"{where}: the class {parted!r} holds a ';', which parts answers; write it with ','")
    return template, answers


def places(rows: Sequence[dict], task: str) -> list[int]:
    """Where the rows of a task are. Raises UserError on a row of an unknown task: a misspelt one must not vanish from every denominator unseen."""
    for row in rows:
        if column(row, "task") not in TASKS:
            raise UserError(f"{_name(row)}: task {row['task']!r} is neither 'ecgqa' nor 'report'")
    return [i for i, row in enumerate(rows) if row["task"] == task]


def column(row: dict, name: str) -> str:
    """A text column of a prediction row. Raises UserError naming row and column if it is missing or no text."""
    if not isinstance(row.get(name), str):
        raise UserError(f"{_name(row)}: " + (f"the column {name!r} is {row[name]!r}, not a text" if name in row else f"the column {name!r} is missing"))
    return row[name]


def _judged(rows: Sequence[dict], predictions: Sequence[str], task: str) -> list[int]:
    if not rows:
        raise UserError("there is no prediction to judge: the split or the file is empty")
    if len(predictions) != len(rows):
        raise ValueError(f"{len(predictions)} predictions for {len(rows)} rows")
    return places(rows, task)


def _name(row: dict) -> str:
    return f"prediction row {row.get('id')!r}"
