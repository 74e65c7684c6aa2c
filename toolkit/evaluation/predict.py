"""Rows of predictions.jsonl: each task of a batch put to the model with its ECG, and with what stands in for it; and what is said without a model."""

from collections.abc import Callable, Sequence

from toolkit.evaluation import blind
from toolkit.evaluation.constrained import answer_constrained
from toolkit.evaluation.generate import Sample, answer_tasks
from toolkit.evaluation.inputs import FLAT, SHUFFLED, Inputs, noise_name
from toolkit.tasks.prompts import reference_text

KEPT = ("id", "task", "question_type", "attribute_type", "template_id", "question")
Say = Callable[[list[Sample]], list[list[dict]]]


def speaker(how: tuple, max_new_tokens: int, device, adapter, classes: dict[int, list[str]] | None) -> Say:
    """What answers samples: for each of their tasks {"prediction", "loglik"}. how: model, tokenizer, vocabulary, prompts.

    With classes, questions are answered by the likeliest of their template's, and "likelihoods" says the next ones too; reports are generated always.
    """

    def free(samples: list[Sample]) -> list[list[dict]]:
        return [[one._asdict() for one in some] for some in answer_tasks(*how, samples, max_new_tokens, device, adapter)]

    def both(samples: list[Sample]) -> list[list[dict]]:
        parts = []
        for answer, kind in ((free, "report"), (lambda part: answer_constrained(*how, part, classes, device, adapter), "ecgqa")):
            part = [(codes, meta, [task for task in tasks if task["task"] == kind]) for codes, meta, tasks in samples]
            parts.append({kind: iter([one for some in answer(part) for one in some])})
        given = parts[0] | parts[1]
        return [[next(given[task["task"]]) for task in tasks] for *_, tasks in samples]

    return free if classes is None else both


def predict(
    batch: Sequence[int], inputs: Inputs, kinds: list[str | float], say: Say, baseline: blind.BlindBaseline | None, numbers: dict[str, int]
) -> list[dict]:
    """The rows of a batch of samples. kinds: what is shown beside the ECG itself (`Inputs.of`); numbers: of each patient an ordinal one."""
    metas = [inputs.shards.meta(i) for i in batch]

    def shown(kind, places: list[int]) -> list[list[dict]]:
        return say([(*inputs.of(kind, batch[n]), metas[n]["tasks"]) for n in places])

    everywhere = list(range(len(batch)))
    answers = shown(None, everywhere)
    controls: dict[str, dict[int, list[dict]]] = {}
    for kind in kinds:
        places = [n for n in everywhere if kind != SHUFFLED or inputs.donors[batch[n]] >= 0]
        name = kind if isinstance(kind, str) else noise_name(kind)
        controls[name] = dict(zip(places, shown(kind, places))) if places else {}
    rows = []
    for n, (i, meta) in enumerate(zip(batch, metas)):
        labels, sites = meta.get("labels", []), meta.get("sites", [])
        about = {"sample": i, "patient": numbers[meta["patients"][0]], "source": meta["source"]}
        about |= {"site": sites[0]} if sites and sites[0] else {}
        about |= {"labels": sorted({label for some in labels for label in some})} if labels else {}
        for k, task in enumerate(meta["tasks"]):
            words = {"majority": blind.predict(baseline, task, attributes=False), "blind": blind.predict(baseline, task)} if baseline else {}
            seen = {name: found[n][k]["prediction"] for name, found in controls.items() if n in found}
            rows.append({**{name: task[name] for name in KEPT if name in task}, **about, "reference": reference_text(task), **_rounded(answers[n][k]),
                         "controls": words | seen})  # fmt: skip
    return rows


def kinds_of(controls: str, noise_db: list[float]) -> list[str | float]:
    """What `--controls` and `--noise_db` show beside the ECG itself."""
    return [*((SHUFFLED, FLAT) if controls == "all" else ()), *noise_db]


def _rounded(answer: dict) -> dict:
    """To 5 decimals: the last bits of a sum depend on the machine."""
    rounded = {name: value if isinstance(value, str) else {k: round(v, 5) for k, v in value.items()} if isinstance(value, dict) else round(value, 5)
               for name, value in answer.items()}  # fmt: skip
    return rounded


def ordinals(patients: list[str]) -> dict[str, int]:
    """Patients numbered as they come: what files of results say instead of pseudonyms, which could be undone."""
    return {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
