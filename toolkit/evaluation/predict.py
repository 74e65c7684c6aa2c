"""Rows of predictions.jsonl: each task of a batch put to the model with its ECG, and with what stands in for it; and what is said without a model."""

from collections.abc import Callable, Sequence

from toolkit.errors import UserError
from toolkit.evaluation import blind
from toolkit.evaluation.answering import Asked
from toolkit.evaluation.constrained import answer_constrained
from toolkit.evaluation.generate import Sample, answer_tasks
from toolkit.evaluation.inputs import FLAT, SHUFFLED, Inputs, noise_name
from toolkit.tasks.prompts import reference_text

ROOM = 2  # times the longest own answer: what the model may say to another ECG
KEPT = ("id", "task", "question_type", "attribute_type", "template_id", "question")
Say = Callable[[list[Sample], int], list[list[dict]]]


def speaker(how: tuple, device, adapter, classes: dict[int, list[str]] | None) -> Say:
    """What answers samples in so many tokens: for each of their tasks {"prediction", "loglik", "tokens", "cut"}. how: model, tokenizer, vocabulary, prompts.

    With classes, questions are answered by the likeliest of their template's, and "likelihoods" says the next ones too; reports are generated always.
    """

    def free(samples: list[Sample], most: int) -> list[list[dict]]:
        return [[one._asdict() for one in some] for some in answer_tasks(*how, samples, most, device, adapter)]

    def both(samples: list[Sample], most: int) -> list[list[dict]]:
        parts = []
        chosen = lambda part: answer_constrained(*how, part, classes, device, adapter)
        for answer, kind in ((lambda part: free(part, most), "report"), (chosen, "ecgqa")):
            part = [(codes, meta, [task for task in tasks if task["task"] == kind]) for codes, meta, tasks in samples]
            parts.append({kind: iter([one for some in answer(part) for one in some])})
        given = parts[0] | parts[1]
        return [[next(given[task["task"]]) for task in tasks] for *_, tasks in samples]

    return free if classes is None else both


def predict(
    batch: Sequence[int], inputs: Inputs, kinds: list[str | float], say: Say, most: int, baseline: blind.BlindBaseline | None, numbers: dict[str, int]
) -> list[dict]:
    """The rows of a batch of samples. kinds: what is shown beside the ECG itself (`Inputs.of`); most: tokens of an answer; numbers: of each patient an ordinal.

    What the model says to other ECGs may be `ROOM` times as long as its longest answer of the batch: shown a flat line, a model may never end, and that took
    13 times as long as its own answers.
    """
    metas = [inputs.shards.meta(i) for i in batch]

    def shown(kind, places: list[int], most: int) -> list[list[dict]]:
        return say([(*inputs.of(kind, batch[n]), metas[n]["tasks"]) for n in places], most)

    everywhere = list(range(len(batch)))
    answers = shown(None, everywhere, most)
    room = min(most, ROOM * max([one.get("tokens", 0) for some in answers for one in some]) + 1)
    controls: dict[str, dict[int, list[dict]]] = {}
    for kind in kinds:
        places = [n for n in everywhere if kind != SHUFFLED or inputs.donors[batch[n]] >= 0]
        name = kind if isinstance(kind, str) else noise_name(kind)
        controls[name] = dict(zip(places, shown(kind, places, room))) if places else {}
    rows = []
    for n, (i, meta) in enumerate(zip(batch, metas)):
        labels, sites = meta.get("labels", []), meta.get("sites", [])
        about = {"sample": i, "patient": numbers[meta["patients"][0]], "source": meta["source"]}
        about |= {"site": sites[0]} if sites and sites[0] else {}
        about |= {"labels": sorted({label for some in labels for label in some})} if labels else {}
        for k, task in enumerate(meta["tasks"]):
            words = {"majority": blind.predict(baseline, task, attributes=False), "blind": blind.predict(baseline, task)} if baseline else {}
            seen = {name: found[n][k]["prediction"] for name, found in controls.items() if n in found}
            rows.append({**{name: task[name] for name in KEPT if name in task}, **about, "reference": reference_text(task), **_said(answers[n][k]),
                         "controls": words | seen})  # fmt: skip
    return rows


def kinds_of(controls: str, noise_db: list[float]) -> list[str | float]:
    """What `--controls` and `--noise_db` show beside the ECG itself."""
    return [*((SHUFFLED, FLAT) if controls == "all" else ()), *noise_db]


def _said(answer: dict) -> dict:
    """What a row says of an answer. Log-likelihoods to 4 decimals: the last bits of a sum depend on the machine."""
    said = {"prediction": answer["prediction"], "loglik": round(answer["loglik"], 4)}
    said |= {"likelihoods": {text: round(value, 4) for text, value in answer["likelihoods"].items()}} if "likelihoods" in answer else {}
    return said | ({"cut": True} if answer.get("cut") else {})


def check_classes(asked: list[Asked], classes: dict[int, list[str]] | None) -> None:
    """Raises UserError naming --classes if there is a question of a template without answers: known now, not at its batch."""
    if not classes:
        raise UserError("--answers constrained: there is no training split to take the answers from; name ECG-QA's answers_for_each_template.csv by --classes")
    absent = sorted({template for one in asked for template in one.templates} - classes.keys(), key=str)
    if absent:
        raise UserError(f"--classes: no answers for template {', '.join(map(str, absent))}; name the answers_for_each_template.csv of this dataset")


def ordinals(patients: list[str]) -> dict[str, int]:
    """Patients numbered as they come: what files of results say instead of pseudonyms, which could be undone."""
    return {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
