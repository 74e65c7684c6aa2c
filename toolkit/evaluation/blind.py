"""The blind baseline: the best answer for a question without looking at the ECG.

It answers with the majority of the training split, so a model that does not beat it has learned the priors of the
templates and nothing of the signal. A constant report alone reaches BLEU-4 18.2 under a common convention on PTB-XL
(PAPER.md, section 2, item 22), so every score is shown beside this one.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable

from toolkit.tasks.answers import join_answers

# A plain dict, so that it can be written to JSON beside the metrics:
# {"answers": {key: joined answer}, "report": most frequent report}
BlindBaseline = dict


def fit(train_tasks: Iterable[dict]) -> BlindBaseline:
    """Majority answers of the training tasks, read once as a stream.

    A task is `{"id", "task": "ecgqa", "question_type", "template_id", "answer": list[str], "attribute": list[str] |
    None, ...}` or `{"id", "task": "report", "report": str}`. Ties go to the answer that sorts first, so the order of
    the tasks does not matter. Raises ValueError on an unknown task.
    """
    answers: dict[str, Counter] = defaultdict(Counter)
    reports: Counter = Counter()
    for task in train_tasks:
        if task["task"] == "report":
            reports[task["report"]] += 1
        elif task["task"] == "ecgqa":
            answer = join_answers(task["answer"])
            for key in _keys(task):
                answers[key][answer] += 1
        else:
            raise ValueError(f"task {task.get('id')!r}: {task['task']!r} is neither 'ecgqa' nor 'report'")
    return {
        "answers": {key: _majority(counts) for key, counts in sorted(answers.items())},
        "report": _majority(reports) if reports else "",
    }


def predict(baseline: BlindBaseline, task: dict) -> str:
    """The blind answer (joined) or report for one task; "" when training had nothing of its kind.

    A question falls back from (template, attributes) to template, question type, and all questions.
    """
    if task["task"] == "report":
        return baseline["report"]
    return next((baseline["answers"][key] for key in _keys(task) if key in baseline["answers"]), "")


def _keys(task: dict) -> list[str]:
    """JSON object keys must be strings, so each level is a small JSON array; the most specific level comes first."""
    # "A or B?" and "B or A?" are the same question without the ECG, hence sorted.
    attributes = sorted(task["attribute"] or [])
    template = task["template_id"]
    return [
        json.dumps(["template+attribute", template, attributes]),
        json.dumps(["template", template]),
        json.dumps(["question_type", task["question_type"]]),
        json.dumps(["overall"]),
    ]


def _majority(counts: Counter) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
