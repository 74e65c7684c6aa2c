"""What a tuning run looks at beside its loss: the answers it generates, and that LoRA is trained at all."""

import torch
import torch.distributed as dist

from toolkit.evaluation import metrics
from toolkit.evaluation.generate import Sample, answer_rows, answer_tasks
from toolkit.lm.attention import plain_attention
from toolkit.lm.lora import unmoved
from toolkit.shards.order import spaced
from toolkit.shown import Shown
from toolkit.tasks.instruct import TaskData
from toolkit.tasks.prompts import Prompts, question_text, reference_text
from toolkit.tasks.vocabulary import ECGVocabulary
from toolkit.training.distributed import Ranks, sum_over_ranks

WATCHED, SHOWN = 48, 64  # most tokens of an answer that is judged by exact match, and of one that is shown

Asked = tuple[object, ECGVocabulary, Prompts]  # tokenizer, where the ECG tokens are, how questions are put


def questions_of(data: TaskData, limit: int) -> list[Sample]:
    """Questions of at most `limit` ECGs that have any, evenly spaced."""
    asked = [i for i in range(len(data) if limit else 0) if any(task["task"] == "ecgqa" for task in data.tasks(i))]
    samples = [data.sample(asked[i]) for i in spaced(len(asked), limit)]
    return [(codes, meta, [task for task in tasks if task["task"] == "ecgqa"]) for codes, meta, tasks in samples]


def exact_match(engine, how: Asked, samples: list[Sample], ranks: Ranks) -> dict[str, float]:
    """Collective. Exact match of the answers of a `PackedLM` engine to questions, of all and of each type."""
    # under ZeRO-3 every forward is a collective, and answers differ in length: there each rank answers all
    spread = engine.zero_optimization_stage() < 3
    mine = samples[ranks.rank :: ranks.world] if spread else samples
    with plain_attention(engine.module.lm) as plain:
        agree = None if spread else _rank_0s
        parts = [answer_rows(lambda batch: answer_tasks(plain, *how, batch, WATCHED, ranks.device, engine.module.adapter, agree), mine)]
    if spread:
        own, parts = parts[0], [None] * ranks.world
        dist.all_gather_object(parts, own)
    scores = metrics.exact_match([row for part in parts for row in part])
    return {"eval_exact_match": scores.pop("overall"), **{f"eval_exact_match/{kind}": score for kind, score in scores.items() if score is not None}}


def shown(engine, how: Asked, samples: list[Sample], ranks: Ranks) -> Shown:
    """Answers beside their references, for TensorBoard, on rank 0; collective under ZeRO-3."""
    together = engine.zero_optimization_stage() == 3
    if not (ranks.main or together):
        return Shown()
    with plain_attention(engine.module.lm) as plain:
        answers = answer_tasks(plain, *how, samples, SHOWN, ranks.device, engine.module.adapter, _rank_0s if together else None)
    pairs = [(task, given) for (*_, tasks), some in zip(samples, answers) for task, given in zip(tasks, some)]
    return Shown(texts={"samples": "\n\n".join(f"{question_text(task)} {given.prediction} (reference: {reference_text(task)})" for task, given in pairs)})


def check_lora(module, ranks: Ranks) -> None:
    """Collective, after the first step of a `PackedLM`. Raises RuntimeError if a LoRA factor B is still zero: PEFT and ZeRO can miss each other silently."""
    still = set(unmoved(module.lm))
    names = [name for name, _ in module.lm.named_parameters() if "lora_B" in name]
    ranks_still = sum_over_ranks([name in still for name in names], ranks.device)
    stuck = [name for name, count in zip(names, ranks_still) if count == ranks.world]
    if stuck:
        raise RuntimeError(f"after the first step {len(stuck)} of {len(names)} LoRA weights are still zero, so nothing trains them: {stuck[0]}, ...")


def _rank_0s(tokens: torch.Tensor) -> torch.Tensor:
    """Of two words that are equally likely another GPU may choose the other one, and then take another number of forwards."""
    dist.broadcast(tokens, 0)
    return tokens
