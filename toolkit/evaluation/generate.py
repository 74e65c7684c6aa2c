"""Greedy answers to the tasks of ECGs: the prefix is computed once per ECG, its cache shared by all its questions."""

import numpy as np
import torch
from transformers import DynamicCache

from toolkit.tasks.prompts import prefix_ids, question_ids
from toolkit.tasks.vocabulary import ECGVocabulary


@torch.no_grad()
def answer_tasks(model, tokenizer, vocabulary: ECGVocabulary, samples: list[tuple[np.ndarray, list[dict]]], max_new_tokens: int, device) -> list[list[str]]:
    """The model's answer to every task of every sample.

    samples: (codes uint16 [n_ecgs, 313], tasks); all with the same n_ecgs, so that prefixes need no padding.
    model: a causal LM with ordinary attention. ECG tokens are never answers and are masked out.
    """
    prefixes = np.stack([prefix_ids(tokenizer, vocabulary, codes) for codes, _ in samples])
    owner = np.repeat(np.arange(len(samples)), [len(tasks) for _, tasks in samples])
    questions = [question_ids(tokenizer, task) for _, tasks in samples for task in tasks]
    if not questions:
        return [[] for _ in samples]
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.from_numpy(prefixes).to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(torch.from_numpy(owner).to(device))

    width = max(map(len, questions))  # padded on the left, between prefix and question, so that all answers begin at one place
    ids = torch.tensor([[0] * (width - len(q)) + q for q in questions], device=device)
    real = torch.tensor([[0] * (width - len(q)) + [1] * len(q) for q in questions], device=device)
    mask = torch.cat([torch.ones(len(questions), prefixes.shape[1], dtype=real.dtype, device=device), real], 1)
    positions = (prefixes.shape[1] + real.cumsum(1) - 1).clamp_min(0)
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
    return [[next(texts) for _ in tasks] for _, tasks in samples]
