"""Answers over a template's classes alone (`--answers constrained`): every class's log-likelihood, all those of a question in one forward.

The classes' tokens are a tree whose root is the prompt's last token, so that what classes begin with in common is computed once. A mask makes each token
see the prompt and its own ancestors.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from toolkit.errors import UserError
from toolkit.evaluation.generate import Sample
from toolkit.lm.continuous import ECGAdapter, embedded
from toolkit.tasks.answers import ANSWER_SEPARATOR, join_answers
from toolkit.tasks.prompts import Prompts, answer_ids, prompt_ids, shared_ids
from toolkit.tasks.vocabulary import ECGVocabulary

NONE = "none"  # says that there is nothing to name: it stands in none of the 23,149 answers of several classes of ECG-QA that were to be had
LOGITS = 1 << 26  # most logits of a forward: 256 MB. The 231 nodes of ECG-QA's largest template, in a vocabulary of 128,256, have half as many


class Tree(NamedTuple):
    """Token strings as a tree. Node 0 is the prompt's last token; parents come before their children.

    tokens, depth: of each node [n], tokens[0] unused; sees: bool [n, n], its ancestors and itself. sources, targets: of each distinct step [m] of a string
    the node that it leaves and the token that it goes to. paths: the steps of every string. The last token of a string is a target, and no node.
    """

    tokens: list[int]
    depth: list[int]
    sees: torch.Tensor
    sources: list[int]
    targets: list[int]
    paths: list[list[int]]


class Prompted(NamedTuple):
    """What was read of n questions: the cache of all but the last token, its mask int64 [n, width] (1: real, 0: padding), and the last token int64 [n]."""

    cache: DynamicCache
    mask: torch.Tensor
    last: torch.Tensor


def answer_constrained(
    model,
    tokenizer,
    vocabulary: ECGVocabulary,
    prompts: Prompts,
    samples: list[Sample],
    classes: dict[int, list[str]],
    device,
    adapter: ECGAdapter | None = None,
    top: int = 5,
    beams: int = 3,
) -> list[list[dict]]:
    """Of every task of every sample (as `answer_tasks` takes them) the likeliest answer among its template's classes: {"prediction": str, "loglik": float,
    "likelihoods": {answer: loglik}}, the `top` likeliest, the best first.

    loglik: natural logarithm of the probability of the answer as training tokenises it, with the token that ends it, given ECG and question; of a softmax
    without ECG tokens. classes: of each template, as `answers_for_each_template.csv` names them. Questions that a yes or no does not answer may have several
    of them: the `beams` sets whose beginning `a;` is likelier than the best answer so far are extended by every class behind `a`, until there is none. As
    no answer is likelier than its beginning, the best one is lost only where more than `beams` sets of one size were to be extended.

    Raises UserError naming --classes for a template that is not there, ValueError for a report, which has no classes.
    """
    tasks = [task for *_, some in samples for task in some]
    choices = [_choices(task, classes) for task in tasks]
    if not tasks:
        return [[] for _ in samples]
    prompted = read_prompts(model, tokenizer, vocabulary, prompts, samples, device, adapter)

    @cache
    def tree_of(sets: tuple[tuple[str, ...], ...], several: bool) -> Tree:
        whole = [_ids(tokenizer, prompts, list(some)) for some in sets]
        begun = [_ids(tokenizer, prompts, [join_answers(some) + ANSWER_SEPARATOR.strip()])[:-1] for some in sets if several]
        return tree(whole + begun)

    found: list[dict[tuple[str, ...], float]] = [{} for _ in tasks]
    wanted = {row: tuple((name,) for name in names) for row, names in enumerate(choices)}
    while wanted:
        trees = {row: tree_of(sets, _several(tasks[row])) for row, sets in wanted.items()}
        scored, before, wanted = score(model, vocabulary, prompted, trees), wanted, {}
        for row, scores in scored.items():
            sets = before[row]
            found[row] |= zip(sets, scores)
            best = max(found[row].values())
            begun = sorted(((score, some) for some, score in zip(sets, scores[len(sets) :]) if score > best and some != (NONE,)), reverse=True)
            longer = tuple((*some, name) for _, some in begun[:beams] for name in choices[row] if name > some[-1] and name != NONE)
            if longer:
                wanted[row] = longer
    answers = iter([_answer(some, top) for some in found])
    return [[next(answers) for _ in some] for *_, some in samples]


@torch.no_grad()
def read_prompts(model, tokenizer, vocabulary: ECGVocabulary, prompts: Prompts, samples: list[Sample], device, adapter: ECGAdapter | None = None) -> Prompted:
    """Read the ECGs, what stands before the questions once, and all the questions. Arguments as `answer_tasks`; there is at least one task."""
    asked = [(codes, meta, task) for codes, meta, tasks in samples for task in tasks]
    questions = [prompt_ids(tokenizer, vocabulary, prompts, *one).tolist() for one in asked]
    shared = [shared_ids(tokenizer, vocabulary, prompts, codes, meta).tolist() for codes, meta, _ in samples]

    def read(rows: list[list[int]], mask: torch.Tensor, features: list[np.ndarray]) -> torch.Tensor:
        ids, mask, positions = _left_padded(rows, mask)
        given = {"inputs_embeds": embedded(model, adapter, ids, np.concatenate(features))} if features else {"input_ids": ids}
        model(**given, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return mask

    # without the config: a layer with a window would keep the last tokens alone. No sequence of training is longer than the window (lm/attention.py)
    cache, mask = DynamicCache(), torch.ones(len(samples), 0, dtype=torch.long, device=device)
    if shared[0]:
        mask = read(shared, mask, [meta["features"] for _, meta, _ in samples] if adapter else [])
    owner = torch.from_numpy(np.repeat(np.arange(len(samples)), [len(tasks) for *_, tasks in samples])).to(device)
    if shared[0]:
        cache.batch_select_indices(owner)
    mask = read([ids[:-1] for ids in questions], mask[owner], [meta["features"] for _, meta, _ in asked] if adapter and not shared[0] else [])
    return Prompted(cache, mask, mask.new_tensor([ids[-1] for ids in questions]))


def tree(strings: list[list[int]]) -> Tree:
    """Token strings, none of them empty, as a tree."""
    nodes: dict[tuple[int, ...], int] = {}  # by what stands between the prompt and the node's end; () is the prompt's last token
    steps: dict[tuple[int, ...], int] = {}
    for ids in map(tuple, strings):
        for place in range(len(ids)):
            nodes.setdefault(ids[:place], len(nodes))
            steps.setdefault(ids[: place + 1], len(steps))
    sees = torch.eye(len(nodes), dtype=torch.bool)
    for ids, node in nodes.items():
        if ids:
            sees[node] |= sees[nodes[ids[:-1]]]
    paths = [[steps[tuple(ids[: place + 1])] for place in range(len(ids))] for ids in strings]
    tokens, depth = [ids[-1] if ids else 0 for ids in nodes], [len(ids) for ids in nodes]
    return Tree(tokens, depth, sees, [nodes[ids[:-1]] for ids in steps], [ids[-1] for ids in steps], paths)


@torch.no_grad()
def score(model, vocabulary: ECGVocabulary, prompted: Prompted, trees: dict[int, Tree]) -> dict[int, list[float]]:
    """The log-likelihood of every string of the tree of each of these questions."""
    found, waiting = {}, sorted(trees, key=lambda row: len(trees[row].tokens))
    while waiting:
        width = [len(trees[row].tokens) for row in waiting]
        # no tree is padded to more than twice the smallest: 37 classes are 130 nodes, yes, no and not sure 6
        fitting = (at for at in range(1, len(waiting)) if width[at] > 2 * width[0] or (at + 1) * width[at] * vocabulary.start > LOGITS)
        count = next(fitting, len(waiting))
        some, waiting = waiting[:count], waiting[count:]
        found |= zip(some, _forward(model, vocabulary, prompted, some, [trees[row] for row in some]))
    return found


def _forward(model, vocabulary: ECGVocabulary, prompted: Prompted, rows: list[int], trees: list[Tree]) -> list[list[float]]:
    device, width = prompted.mask.device, max(len(one.tokens) for one in trees)
    ids, depth = torch.zeros(len(trees), width, dtype=torch.long), torch.zeros(len(trees), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding sees itself: a row that sees nothing is NaN, and 0 times that is NaN too
    for at, one in enumerate(trees):
        size = len(one.tokens)
        ids[at, :size], depth[at, :size], sees[at, :size, :size] = torch.tensor(one.tokens), torch.tensor(one.depth), one.sees
    chosen = torch.tensor(rows, device=device)
    ids, depth, before = ids.to(device), depth.to(device), prompted.mask[chosen]
    ids[:, 0] = prompted.last[chosen]
    visible = torch.cat([before.bool()[:, None].expand(-1, width, -1), sees.to(device)], 2)[:, None]
    # additive: with a mask of true and false, eager attention would add 0 and 1
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=device).masked_fill_(~visible, torch.finfo(model.dtype).min)
    cache = DynamicCache()  # its own: the prompts' is read again for longer answers
    for layer, kept in enumerate(prompted.cache.layers):
        cache.update(kept.keys[chosen], kept.values[chosen], layer)
    positions = before.sum(1, keepdim=True) + depth
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
    logits = logits[..., : vocabulary.start].float()  # ECG tokens, and the padding rows behind them, are never answers
    whole = logits.logsumexp(-1)
    scores = []
    for at, one in enumerate(trees):
        steps = (logits[at, one.sources, one.targets] - whole[at, one.sources]).double().cpu().numpy()
        scores.append([float(steps[path].sum()) for path in one.paths])
    return scores


def _choices(task: dict, classes: dict[int, list[str]]) -> list[str]:
    """The classes of a task's template in the order in which answers of several name them."""
    if task["task"] != "ecgqa":
        raise ValueError("a report has no classes; let the model write it (answer_tasks)")
    template = task.get("template_id")
    if not classes.get(template):
        raise UserError(
            f"--classes: has none for template {template} of the question {task['question']!r}; name the answers_for_each_template.csv of this dataset"
        )
    return sorted(set(classes[template]))


def _several(task: dict) -> bool:
    return not task["question_type"].endswith("verify")


def _ids(tokenizer, prompts: Prompts, answers: list[str]) -> list[int]:
    return answer_ids(tokenizer, prompts, {"task": "ecgqa", "answer": answers}).tolist()


def _answer(found: dict[tuple[str, ...], float], top: int) -> dict:
    best = sorted(found.items(), key=lambda one: (-one[1], one[0]))[:top]
    named = {join_answers(some): score for some, score in best}
    return {"prediction": join_answers(best[0][0]), "loglik": best[0][1], "likelihoods": named}


def _left_padded(rows: list[list[int]], before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [n, width] of rows that go on after the places `before` [n, m] (1: real, 0: padding), the mask [n, m + width] and positions [n, width]."""
    width = max(map(len, rows))
    ids = before.new_tensor([[0] * (width - len(row)) + row for row in rows])
    real = before.new_tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    mask = torch.cat([before, real], 1)
    return ids, mask, (mask.cumsum(1)[:, -width:] - 1).clamp(min=0)  # learnt positions have none before 0
