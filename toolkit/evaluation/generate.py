"""Greedy answers to the tasks of ECGs: the prefix is computed once per ECG, its cache shared by all its questions."""

import numpy as np
import torch
from transformers import DynamicCache

from toolkit.tasks.prompts import ecg_ids, gain_ids, question_ids
from toolkit.tasks.vocabulary import ECGVocabulary


@torch.no_grad()
def answer_tasks(
    model, tokenizer, vocabulary: ECGVocabulary, samples: list[tuple[np.ndarray, list | None, list[dict]]], max_new_tokens: int, device
) -> list[list[str]]:
    """The model's answer to every task of every sample.

    samples: (codes uint16 [n_ecgs, 313], gains [n_ecgs, 12] mV, tasks); all with the same n_ecgs, so that ECGs need no padding.
    model: a causal LM with ordinary attention. ECG tokens are never answers and are masked out.
    """
    prefixes = np.stack([ecg_ids(tokenizer, vocabulary, codes, gains) for codes, gains, _ in samples])
    owner = torch.from_numpy(np.repeat(np.arange(len(samples)), [len(tasks) for *_, tasks in samples])).to(device)
    questions = [question_ids(tokenizer, task) for *_, tasks in samples for task in tasks]
    if not questions:
        return [[] for _ in samples]
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.from_numpy(prefixes).to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    mask = torch.ones(prefixes.shape, dtype=torch.long, device=device)
    if vocabulary.gain_text:
        ids, mask, positions = left_padded([gain_ids(tokenizer, vocabulary, gains) for _, gains, _ in samples], mask)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(owner)
    ids, mask, positions = left_padded(questions, mask[owner])
    answers: list[list[int]] = [[] for _ in questions]
    active = torch.arange(len(questions), device=device)
    for _ in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits[:, vocabulary.start :] = -torch.inf  # ECG tokens, and the padding rows behind them
        chosen = logits.argmax(-1)
        goes_on = chosen != tokenizer.eos_token_id
        for row, token in zip(active[goes_on].tolist(), chosen[goes_on].tolist()):
            answers[row].append(token)
        if not goes_on.any():
            break
        if not goes_on.all():  # finished answers leave the batch: a report is much longer than a yes
            kept = goes_on.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            active, chosen, mask, positions = active[kept], chosen[kept], mask[kept], positions[kept]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
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
    return ids, mask, mask.cumsum(1)[:, -width:] - 1
