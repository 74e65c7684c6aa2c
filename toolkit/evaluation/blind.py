"""The blind baselines: the best answer for a question without looking at the ECG.

They answer with the majority of the training split, so a model that does not beat them has learned the priors of the
templates and nothing of the signal. `majority` knows the template of the question alone; `blind` also the attributes that it
names ("A or B?"). For reports both say the most frequent one, which alone reaches BLEU-4 18.2 under a common convention on 136 reports of
PTB-XL, so every score is shown beside theirs.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable

from toolkit.evaluation.leak import short
from toolkit.shards.reader import Shards, locate
from toolkit.tasks.answers import join_answers

# A plain dict, so that it can be written to JSON beside the metrics:
# {"answers": {key: joined answer}, "report": most frequent report, "classes": {template: the single answers that it ever had}}
BlindBaseline = dict


def fit(train_tasks: Iterable[dict]) -> BlindBaseline:
    """Majority answers of the training tasks, read once as a stream.

    A task is `{"id", "task": "ecgqa", "question_type", "template_id", "answer": list[str], "attribute": list[str] |
    None, ...}` or `{"id", "task": "report", "report": str}`. Ties go to the answer that sorts first, so the order of
    the tasks does not matter. Raises ValueError on an unknown task.
    """
    answers: dict[str, Counter] = defaultdict(Counter)
    classes: dict[int, set[str]] = defaultdict(set)
    reports: Counter = Counter()
    for task in train_tasks:
        if task["task"] == "report":
            reports[task["report"]] += 1
        elif task["task"] == "ecgqa":
            answer = join_answers(task["answer"])
            classes[task["template_id"]].update(task["answer"])
            for key in _keys(task):
                answers[key][answer] += 1
        else:
            raise ValueError(f"task {task.get('id')!r}: {task['task']!r} is neither 'ecgqa' nor 'report'")
    return {
        "answers": {key: _majority(counts) for key, counts in sorted(answers.items())},
        "report": _majority(reports) if reports else "",
        "classes": {template: sorted(known) for template, known in classes.items()},
    }


def of_shards(folders: list[str], **cache) -> tuple[BlindBaseline | None, str]:
    """The majority answers, and of which training split: the dataset's own, which is harder to beat; if it has none, what the model was tuned on."""
    for folder in folders:
        index = locate(folder, "--shards", **cache)[2]
        if index["kind"] == "tasks" and index["splits"].get("train", {}).get("samples"):
            train = Shards.open(folder, "train", kind="tasks", **cache)
            return fit(task for i in range(len(train)) for task in train.meta(i)["tasks"]), f"train of {short(folder)}"
    return None, "no training split at hand"


def digest_of(baseline: BlindBaseline | None) -> str | None:
    """What tells a baseline from another: 16 hex digits."""
    return baseline and hashlib.sha256(json.dumps(baseline, sort_keys=True).encode()).hexdigest()[:16]


def predict(baseline: BlindBaseline, task: dict, attributes: bool = True) -> str:
    """The blind answer (joined) or report for one task; "" when training had nothing of its kind.

    A question falls back from (template, attributes), left out without `attributes`, to template, question type, and all questions.
    """
    if task["task"] == "report":
        return baseline["report"]
    return next((baseline["answers"][key] for key in _keys(task)[not attributes :] if key in baseline["answers"]), "")


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
