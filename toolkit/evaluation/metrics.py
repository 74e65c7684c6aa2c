"""Scores of prediction rows: exact match for questions, BLEU and ROUGE-L for reports.

A prediction row is a dict `{"id", "task": "ecgqa" | "report", "question_type", "prediction": str, "reference": str}`;
several answers to one question stand in one string, joined by `toolkit.tasks.answers.ANSWER_SEPARATOR`.
Every number here is a fraction in 0..1; the conventions below belong beside the numbers, because at least four
incompatible definitions of BLEU are in use for ECG reports.
"""

import math
from collections import Counter
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from toolkit.evaluation.statistics import patient_bootstrap
from toolkit.tasks.answers import split_answers

SINGLE_QUESTION_TYPES = ("single-verify", "single-choose", "single-query")

EXACT_MATCH_CONVENTION = (
    "set equality of the normalised answers (lower case, stripped, split on the answer separator); overall is the "
    "micro average over questions; an empty prediction scores 0"
)
REPORT_CONVENTION = (
    "BLEU-n: sacrebleu corpus BLEU of order n, nrefs:1 case:lc eff:no tok:13a smooth:exp; ROUGE-L: rouge-score F1 "
    "without stemming, mean over reports; an empty prediction scores 0 and is never dropped"
)
OVER_BLIND_CONVENTION = (
    "exact match minus that of the blind baseline on the same questions, with a 95 % percentile interval of 2,000 bootstrap "
    "draws of patients, each with all questions; a question about ECGs of two patients is the first one's; the model and "
    "the baseline stay as they are in all draws"
)

_MAX_ORDER = 4


def question_counts(rows: Sequence[dict]) -> dict[str, int]:
    """Number of questions per question type, the three single types always and first, then others by name."""
    found = Counter(row["question_type"] for row in _of_task(rows, "ecgqa"))
    others = sorted(set(found) - set(SINGLE_QUESTION_TYPES))
    return {kind: found[kind] for kind in (*SINGLE_QUESTION_TYPES, *others)}


def is_correct(row: dict, by: str = "prediction") -> bool:
    """Whether the answers by the model, or with `by` "blind" by the baseline, are the set of the reference's answers."""
    return split_answers(row[by]) == split_answers(row["reference"])


def exact_match(rows: Sequence[dict]) -> dict[str, float | None]:
    """Fraction of questions whose set of answers equals the reference set.

    Returns `{"overall": micro average, "<question_type>": fraction, ...}`; None stands where there is no question.
    Raises ValueError on a row of an unknown task.
    """
    right = Counter(row["question_type"] for row in _of_task(rows, "ecgqa") if is_correct(row))
    asked = question_counts(rows)
    scores = {"overall": _fraction(sum(right.values()), sum(asked.values()))}
    return scores | {kind: _fraction(right[kind], n) for kind, n in asked.items()}


def over_blind(rows: Sequence[dict], patients: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
    """How much better than the blind baseline the model answers, per question type and overall, by `OVER_BLIND_CONVENTION`.

    rows: predictions, with the baseline's answer as "blind". patients: [len(rows)], the patient of each.
    Returns `{"overall": {"difference", "low", "high", "n", "patients"}, "<question_type>": ...}`, difference, low and high as
    fractions in -1..1 or None (see `patient_bootstrap`), n questions of so many patients. Raises ValueError on a row of an unknown task.
    """
    asked = {kind: [] for kind in ("overall", *question_counts(rows))}
    for row, patient in zip(rows, patients, strict=True):
        if row["task"] == "ecgqa":
            judged = is_correct(row), is_correct(row, "blind"), patient
            asked["overall"].append(judged)
            asked[row["question_type"]].append(judged)
    compared = {}
    for kind, judged in asked.items():
        right, blind, whose = zip(*judged) if judged else ((), (), ())
        difference, low, high = patient_bootstrap(right, blind, whose)
        compared[kind] = {"difference": difference, "low": low, "high": high, "n": len(right), "patients": len(set(whose))}
    return compared


def report_scores(rows: Sequence[dict]) -> dict[str, float | int | None]:
    """BLEU-1..4 and ROUGE-L of the report rows, by `REPORT_CONVENTION`.

    Returns `{"bleu_1", ..., "bleu_4", "rouge_l", "n"}`; the scores are None when there is no report.
    Raises ValueError on a row of an unknown task.
    """
    reports = _of_task(rows, "report")
    names = [f"bleu_{order}" for order in range(1, _MAX_ORDER + 1)]
    if not reports:
        return dict.fromkeys([*names, "rouge_l"]) | {"n": 0}

    # force: without it sacrebleu warns that text ending in " ." looks tokenised, which ECG reports may well do.
    corpus = BLEU(lowercase=True, tokenize="13a", smooth_method="exp", max_ngram_order=_MAX_ORDER, force=True)
    counted = corpus.corpus_score([row["prediction"] for row in reports], [[row["reference"] for row in reports]])
    scores = {}
    for order, name in enumerate(names, start=1):
        # Lower orders use the same n-gram counts, so the corpus is tokenised and counted once, not four times.
        bleu = BLEU.compute_bleu(
            counted.counts[:order], counted.totals[:order], counted.sys_len, counted.ref_len,
            smooth_method="exp", max_ngram_order=order,
        )  # fmt: skip
        scores[name] = min(bleu.score / 100, 1.0)  # a perfect corpus comes back as 100.00000000000004

    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    each = (rouge.score(row["reference"], row["prediction"])["rougeL"].fmeasure for row in reports)
    # fsum: the exact sum, so that the order in which ranks delivered the rows cannot move the last digit.
    return scores | {"rouge_l": math.fsum(each) / len(reports), "n": len(reports)}


def _of_task(rows: Sequence[dict], task: str) -> list[dict]:
    # A misspelt task must not vanish from every denominator unseen.
    for row in rows:
        if row["task"] not in ("ecgqa", "report"):
            raise ValueError(f"prediction row {row.get('id')!r}: task {row['task']!r} is neither 'ecgqa' nor 'report'")
    return [row for row in rows if row["task"] == task]


def _fraction(part: int, whole: int) -> float | None:
    return part / whole if whole else None
