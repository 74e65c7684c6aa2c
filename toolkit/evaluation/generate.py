"""Greedy answers to the tasks of ECGs: the prefix is computed once per ECG, its cache shared by all its questions."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from toolkit.errors import UserError
from toolkit.lm.continuous import ECGAdapter, embedded
from toolkit.tasks.prompts import Prompts, end_id, prompt_ids, reference_text, shared_ids
from toolkit.tasks.vocabulary import ECGVocabulary

Sample = tuple[np.ndarray, dict, list[dict]]  # codes uint16 [n_ecgs, 313], the sample's json, the tasks to answer
BATCH = 8  # ECGs with all their questions


class Answer(NamedTuple):
    """What a model says, and the natural logarithm of its probability: the sum over its tokens, the one that ends it with them."""

    prediction: str
    loglik: float
    tokens: int
    cut: bool  # it went on to the last token that it was allowed


def answer_rows(answer: Callable[[list[Sample]], list[list[Answer]]], samples: list[Sample], batch: int = BATCH) -> list[dict]:
    """A prediction row, as evaluation/metrics.py takes them, for every task of every sample. answer: `answer_tasks`, of a batch of them."""
    rows = []
    samples = sorted(samples, key=lambda sample: len(sample[0]))  # those of a batch best have as many ECGs
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        for (*_, tasks), answers in zip(part, answer(part)):
            for task, given in zip(tasks, answers):
                kind = {name: task[name] for name in ("task", "question_type")}
                rows.append({"id": task.get("id"), **kind, "prediction": given.prediction, "reference": reference_text(task)})
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
) -> list[list[Answer]]:
    """The model's answer to every task of every sample; best with as many ECGs in each, so that they need no padding.

    model: a causal LM with ordinary attention. ECG tokens are never answers and are masked out, so probabilities are among the others. adapter: what reads
    the `features` that each sample's json then has, in the places of its code tokens. agree: makes the chosen tokens int64 [n] of all ranks one, where these
    must take as many forwards.
    """
    asking = [sample for sample in samples if sample[2]]
    if not asking:
        return [[] for _ in samples]
    asked = [(codes, meta, task) for codes, meta, tasks in asking for task in tasks]
    questions = [prompt_ids(tokenizer, vocabulary, prompts, *one).tolist() for one in asked]
    shared = [shared_ids(tokenizer, vocabulary, prompts, codes, meta).tolist() for codes, meta, _ in asking]
    # a row of the batch is an ECG with all its questions; or, where nothing is shared, a question
    sizes = [len(tasks) for *_, tasks in asking] if shared[0] else [1] * len(asked)
    features = [meta["features"] for _, meta, _ in (asking if shared[0] else asked)] if adapter else []
    longest = max(map(len, questions)) + max(map(len, shared))
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if longest >= context:
        raise UserError(f"--model: a prompt of {longest} tokens leaves no room for an answer in its context of {context}; judge tasks about fewer ECGs")
    of_row = [some.tolist() for some in np.split(np.arange(len(asked)), np.cumsum(sizes)[:-1])]
    starts = [len(ids) for ids in shared] if shared[0] else [0] * len(asked)
    rows = Rows(model, device, sizes)
    if shared[0]:
        rows.read([[(token, place, range(size)) for place, token in enumerate(ids)] for ids, size in zip(shared, sizes)], adapter, features)
    # all questions of a row but for the last token of each: what follows that is to be known
    trees = [tree([questions[q][:-1] for q in some], start) for some, start in zip(of_row, starts)]
    rows.read(trees, *(() if shared[0] else (adapter, features)))
    end = end_id(tokenizer, prompts)
    answers: list[list[int]] = [[] for _ in questions]
    logliks = [0.0] * len(questions)
    # of each answer that goes on, by row: its question, its next token, that one's place, its branch
    active = [[(q, questions[q][-1], start + len(questions[q]) - 1, n) for n, q in enumerate(some)] for some, start in zip(of_row, starts)]
    for _ in range(int(min(max_new_tokens, context - longest))):
        going = [n for n, some in enumerate(active) if some]
        if not going:
            break
        if len(going) < len(active):  # finished answers leave the batch: a report is much longer than a yes
            rows.keep(going)
            active = [active[n] for n in going]
        logits = rows.read([[(token, place, [branch]) for _, token, place, branch in some] for some in active], keep=0)
        logits = torch.cat([logits[n, : len(some)] for n, some in enumerate(active)]).float()
        logits[:, vocabulary.start :] = -torch.inf  # ECG tokens, and the padding rows behind them
        chosen = logits.argmax(-1)
        chosen = agree(chosen) if agree else chosen
        likely = iter(zip(chosen.tolist(), logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()))
        for n, some in enumerate(active):
            active[n] = []
            for q, _, place, branch in some:
                token, loglik = next(likely)
                logliks[q] += loglik
                if token != end:
                    answers[q].append(token)
                    active[n].append((q, token, place + 1, branch))
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    cut = {q for some in active for q, *_ in some}
    given = (Answer(text, logliks[q], len(answers[q]), q in cut) for q, text in enumerate(texts))
    return [[next(given) for _ in tasks] for *_, tasks in samples]


Node = tuple[int, int, Sequence[int]]  # a token, its position, the branches of its row that it belongs to


def tree(branches: list[list[int]], start: int) -> list[Node]:
    """The tokens of branches that begin at position `start`, what several have in common at their beginning once: 25 tokens a question
    become 14 where an ECG has 13 questions (derived, of PTB-XL)."""
    nodes: dict[tuple[int, ...], Node] = {}
    for n, branch in enumerate(branches):
        for k, token in enumerate(branch):
            nodes.setdefault(tuple(branch[: k + 1]), (token, start + k, []))[2].append(n)
    return list(nodes.values())


class Rows:
    """A batch whose rows are read on step by step: branches that see what they have in common, and themselves, but not each other.

    A row's tokens stand in the cache once, whatever the number of branches. sizes: branches of each row.
    """

    def __init__(self, model, device, sizes: list[int]):
        self.model, self.device = model, device
        # without the config: a layer with a window would keep the last tokens alone. No sequence of training is longer than the window (lm/attention.py)
        self.cache = DynamicCache()
        self.seen = torch.zeros(len(sizes), max(sizes), 0, dtype=torch.bool, device=device)  # [rows, branches, tokens]: which a branch sees

    def read(self, rows: list[list[Node]], adapter: ECGAdapter | None = None, features: Sequence[np.ndarray] = (), keep: int = 1) -> torch.Tensor:
        """Logits [rows, width, vocabulary] after the next tokens of every row, each after those it goes on from, padded on the right; of the last `keep` places
        alone, 0: of all.

        adapter, features: of rows that hold ECGs, for a model that reads these as features.
        """
        width, before = max(map(len, rows)), self.seen.shape[2]
        ids, places, branch = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        seen = torch.zeros(*self.seen.shape[:2], width, dtype=torch.bool)
        for n, row in enumerate(rows):
            if row:
                tokens, positions, members = zip(*row)
                ids[n, : len(row)], places[n, : len(row)] = torch.tensor(tokens), torch.tensor(positions)
                branch[n, : len(row)] = torch.tensor([some[0] for some in members])
                at = [(b, k) for k, some in enumerate(members) for b in some]
                seen[(n, *map(list, zip(*at)))] = True
        ids, places, branch, seen = (one.to(self.device) for one in (ids, places, branch, seen))
        self.seen = torch.cat([self.seen, seen], 2)
        how = {}
        if before or not seen.all():  # else plain causal attention, which needs no mask and half the time
            mask = self.seen[torch.arange(len(rows), device=self.device)[:, None], branch]
            mask[:, :, before:] &= torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
            dtype = self.model.dtype
            how = {"attention_mask": torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]}
        given = {"inputs_embeds": embedded(self.model, adapter, ids, np.concatenate(features))} if adapter else {"input_ids": ids}
        return self.model(**given, **how, position_ids=places, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        kept = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(kept)
        self.seen = self.seen[kept]
