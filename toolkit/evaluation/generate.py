"""Greedy answers to the tasks of ECGs: the prefix is computed once per ECG, its cache shared by all its questions."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache

from toolkit.lm.continuous import ECGAdapter, embedded
from toolkit.tasks.prompts import Prompts, end_id, prompt_ids, reference_text, shared_ids
from toolkit.tasks.vocabulary import ECGVocabulary

Sample = tuple[np.ndarray, dict, list[dict]]  # codes uint16 [n_ecgs, 313], the sample's json, the tasks to answer
BATCH = 8  # ECGs with all their questions


def answer_rows(answer: Callable[[list[Sample]], list[list[str]]], samples: list[Sample], batch: int = BATCH) -> list[dict]:
    """A prediction row, as evaluation/metrics.py takes them, for every task of every sample. answer: `answer_tasks`, of a batch of them."""
    rows = []
    samples = sorted(samples, key=lambda sample: len(sample[0]))  # those of a batch best have as many ECGs
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        for (*_, tasks), answers in zip(part, answer(part)):
            for task, given in zip(tasks, answers):
                kind = {name: task[name] for name in ("task", "question_type")}
                rows.append({"id": task.get("id"), **kind, "prediction": given, "reference": reference_text(task)})
    return rows


@torch.no_grad()
def answer_tasks(
    model,
    tokenizer,
    vocabulary: ECGVocabulary,
    prompts: Prompts,
    samples: list[Sample],
    max_new_tokens: int,
    device,
    adapter: ECGAdapter | None = None,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[list[str]]:
    """The model's answer to every task of every sample; best with as many ECGs in each, so that they need no padding.

    model: a causal LM with ordinary attention. ECG tokens are never answers and are masked out. adapter: what reads the `features` that each sample's json
    then has, in the places of its code tokens. agree: makes the chosen tokens int64 [n] of all ranks one, where these must take as many forwards.
    """
    asked = [(codes, meta, task) for codes, meta, tasks in samples for task in tasks]
    if not asked:
        return [[] for _ in samples]
    questions = [prompt_ids(tokenizer, vocabulary, prompts, *one).tolist() for one in asked]
    shared = [shared_ids(tokenizer, vocabulary, prompts, codes, meta).tolist() for codes, meta, _ in samples]
    features = [meta["features"] for _, meta, _ in samples] if adapter else []

    def read(ids: torch.Tensor, features: list[np.ndarray]) -> dict:
        """What the model takes for ids [n, width] that hold the ECGs of these features, if any."""
        return {"inputs_embeds": embedded(model, adapter, ids, np.concatenate(features))} if features else {"input_ids": ids}

    cache, mask = DynamicCache(config=model.config), torch.ones(len(samples), 0, dtype=torch.long, device=device)
    if shared[0]:
        ids, mask, positions = left_padded(shared, mask)
        padded = {} if mask.all() else {"attention_mask": mask, "position_ids": positions}
        model(**read(ids, features), past_key_values=cache, use_cache=True, logits_to_keep=1, **padded)
    owner = torch.from_numpy(np.repeat(np.arange(len(samples)), [len(tasks) for *_, tasks in samples])).to(device)
    if shared[0]:
        cache.batch_select_indices(owner)
    ids, mask, positions = left_padded(questions, mask[owner])
    given = read(ids, [] if shared[0] else [meta["features"] for _, meta, _ in asked] if adapter else [])
    end = end_id(tokenizer, prompts)
    answers: list[list[int]] = [[] for _ in questions]
    active = torch.arange(len(questions), device=device)
    for _ in range(max_new_tokens):
        logits = model(**given, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits[:, vocabulary.start :] = -torch.inf  # ECG tokens, and the padding rows behind them
        chosen = logits.argmax(-1)
        chosen = agree(chosen) if agree else chosen
        goes_on = chosen != end
        for row, token in zip(active[goes_on].tolist(), chosen[goes_on].tolist()):
            answers[row].append(token)
        if not goes_on.any():
            break
        if not goes_on.all():  # finished answers leave the batch: a report is much longer than a yes
            kept = goes_on.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            active, chosen, mask, positions = active[kept], chosen[kept], mask[kept], positions[kept]
        given, positions = {"input_ids": chosen[:, None]}, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    texts = iter([tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers])
    return [[next(texts) for _ in tasks] for *_, tasks in samples]


def left_padded(rows: list[list[int]], before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [n, width] of rows that go on after the places `before` [n, m] (1: real, 0: padding), the mask [n, m + width] and positions [n, width].

    Padded on the left, between what is there and the row, so that what follows begins at one place in all of them.
    """
    width = max(map(len, rows))
    ids = before.new_tensor([[0] * (width - len(row)) + row for row in rows])
    real = before.new_tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    mask = torch.cat([before, real], 1)
    return ids, mask, (mask.cumsum(1)[:, -width:] - 1).clamp(min=0)  # learnt positions have none before 0
