"""Answers over a template's classes against each candidate alone: a plain forward over prompt and answer, without cache, tree or mask."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from toolkit.errors import UserError
from toolkit.evaluation.constrained import answer_constrained, read_prompts, score, tree
from toolkit.lm.attention import plain_attention
from toolkit.lm.continuous import ECGAdapter
from toolkit.tasks.answers import join_answers
from toolkit.tasks.prompts import Prompts, answer_ids, prompt_ids, shared_ids

CLASSES = {1: ["yes", "no", "not sure"], 3: ["normal ecg", "atrial fibrillation", "none", "atrial flutter"], 8: ["sinus rhythm (regular)", "sinus rhythm"]}
GAINS, AGES = [0.1] * 12, {"ages": [34.0], "sexes": ["female"]}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def how(request, tiny_with_gains):
    """(model, tokenizer, vocabulary) with a softmax that is far from even, as a trained one is."""
    model, tokenizer, vocabulary = tiny_with_gains
    torch.manual_seed(0)
    if request.param == "gpt2":
        size = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.15}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=model.config.vocab_size, bos_token_id=0, eos_token_id=1, **size)).eval()
    with plain_attention(model):
        model = copy.deepcopy(model)
    if request.param == "llama":
        with torch.no_grad():
            model.model.norm.weight.mul_(3)
    return model, tokenizer, vocabulary


def task(template: int, kind: str, question: str) -> dict:
    return {"task": "ecgqa", "template_id": template, "question_type": kind, "question": question, "answer": ["none"]}


def samples_of(*asked: list[dict]) -> list[tuple]:
    """Of one ECG, of two, of one, ..., so that prompts are padded."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 1296, (1 + i % 2, 313)).astype(np.uint16) for i in range(len(asked))]
    return [(one, {"gains": [GAINS] * len(one), **{k: v * len(one) for k, v in AGES.items()}}, tasks) for one, tasks in zip(codes, asked)]


def alone(how, prompts: Prompts, sample: tuple, asked: dict, answers: list[str]) -> float:
    model, tokenizer, vocabulary = how
    before = [*shared_ids(tokenizer, vocabulary, prompts, *sample[:2]), *prompt_ids(tokenizer, vocabulary, prompts, *sample[:2], asked)]
    answer = answer_ids(tokenizer, prompts, {**asked, "answer": answers}).tolist()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1, : vocabulary.start]
    return logits.float().log_softmax(-1)[range(len(answer)), answer].double().sum().item()


ASKED = [[task(3, "single-query", "Which?"), task(1, "single-verify", "A much longer question, so that the others are padded before theirs?")],
         [task(8, "comparison_consecutive-query", "Which of the two?")], [], [task(3, "single-choose", "Which rhythm?")]]  # fmt: skip


@pytest.mark.parametrize("style", ["ecg_first", "paper"])
def test_every_class_scores_as_it_does_alone(how, style):
    prompts, samples = Prompts(style, background=style == "paper"), samples_of(*ASKED)
    given = answer_constrained(*how, prompts, samples, CLASSES, "cpu", top=100)
    assert [len(some) for some in given] == [2, 1, 0, 1]
    for sample, answers in zip(samples, given):
        for asked, answer in zip(sample[2], answers):
            found = answer["likelihoods"]
            assert set(CLASSES[asked["template_id"]]) <= found.keys()
            for text, loglik in found.items():
                assert loglik == pytest.approx(alone(how, prompts, sample, asked, text.split("; ")), abs=1e-4), text
            assert list(found.values()) == sorted(found.values(), reverse=True)
            assert (answer["prediction"], answer["loglik"]) == next(iter(found.items()))
    assert set(given[0][1]["likelihoods"]) == set(CLASSES[1])  # yes or no is one answer


def test_pairs_and_triples_score_as_they_do_alone(how):
    model, tokenizer, vocabulary = how
    names, (sample,) = CLASSES[3], samples_of(ASKED[0][:1])
    sets = [some for n in (1, 2, 3) for some in combinations(sorted(names), n)]
    strings = [answer_ids(tokenizer, Prompts(), {"task": "ecgqa", "answer": list(some)}).tolist() for some in sets]
    prompted = read_prompts(*how, Prompts(), [sample], "cpu")
    (found,) = score(model, vocabulary, prompted, {0: tree(strings)}).values()
    assert found == pytest.approx([alone(how, Prompts(), sample, sample[2][0], list(some)) for some in sets], abs=1e-4)


def leaning(how, sample: tuple, text: str):
    """A copy of a model that leans towards each token of an answer where that would stand, whatever stands before it."""
    model, (_, tokenizer, vocabulary) = copy.deepcopy(how[0]), how
    start = len(shared_ids(tokenizer, vocabulary, Prompts(), *sample[:2])) + len(prompt_ids(tokenizer, vocabulary, Prompts(), *sample)) - 1
    ids, seen = answer_ids(tokenizer, Prompts(), {"task": "ecgqa", "answer": [text]}).tolist(), {}
    lean = torch.zeros(1024, model.config.vocab_size)
    lean[range(start, start + len(ids)), ids] = 12.0

    def remember(module, args, given):
        seen["at"] = given["position_ids"] if "position_ids" in given else torch.arange(given["input_ids"].shape[1])[None]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + lean[seen["at"][:, -logits.shape[1] :]])
    return model


def test_the_likeliest_set_is_found(how):
    """Among three classes nothing is lost to the beams: the answer is the best of all sets."""
    names = ["atrial fibrillation", "normal ecg", "sinus rhythm"]
    sets = [join_answers(some) for n in (1, 2, 3) for some in combinations(names, n)]
    codes, meta, _ = samples_of([])[0]
    asked, found = task(5, "single-query", "Which?"), []
    for text in (sets[1], sets[3], sets[4], sets[6]):
        model = leaning(how, (codes, meta, asked), text)
        ((answer,),) = answer_constrained(model, *how[1:], Prompts(), [(codes, meta, [asked])], {5: names}, "cpu")
        each = {some: alone((model, *how[1:]), Prompts(), (codes, meta), asked, some.split("; ")) for some in sets}
        assert answer["prediction"] == max(each, key=each.get)
        assert answer["loglik"] == pytest.approx(max(each.values()), abs=1e-4)
        found.append(answer["prediction"])
    assert {answer.count("; ") for answer in found} == {0, 1, 2}


def test_none_stands_alone(how):
    codes, meta, _ = samples_of([])[0]
    asked = task(3, "single-query", "Which?")
    model = leaning(how, (codes, meta, asked), "none; yes")
    ((answer,),) = answer_constrained(model, *how[1:], Prompts(), [(codes, meta, [asked])], {3: ["none", "yes"]}, "cpu", top=100)
    assert set(answer["likelihoods"]) == {"none", "yes"}


def test_answers_depend_neither_on_the_batch_nor_on_what_fits(how, monkeypatch):
    samples = samples_of(*ASKED)
    together = answer_constrained(*how, Prompts(), samples, CLASSES, "cpu")
    backwards = answer_constrained(*how, Prompts(), samples[::-1], CLASSES, "cpu")[::-1]
    monkeypatch.setattr("toolkit.evaluation.constrained.LOGITS", 1)  # a question at a time
    alone = [answer_constrained(*how, Prompts(), [one], CLASSES, "cpu")[0] for one in samples]
    for other in (backwards, alone):
        for some, others in zip(together, other, strict=True):
            for a, b in zip(some, others, strict=True):
                assert a["prediction"] == b["prediction"] and a["likelihoods"] == pytest.approx(b["likelihoods"], abs=1e-4)


@pytest.mark.parametrize("style", ["ecg_first", "paper"])
def test_continuous_ecgs(tiny, style):
    """Features that the adapter turns into the embeddings of the codes themselves: the answers are those of the codes."""
    model, tokenizer, vocabulary = tiny
    with plain_attention(model):
        table = model.get_input_embeddings().weight[list(vocabulary.code_rows)].detach()
        adapter = ECGAdapter(np.zeros(256), np.ones(256), 256, vocabulary.code_rows)
        with torch.no_grad():
            adapter.weight.copy_(torch.eye(256) * 16)  # times 256 ** -0.5
            adapter.bias.zero_()
        samples = samples_of(ASKED[0], ASKED[1])
        expected = answer_constrained(model, tokenizer, vocabulary, Prompts(style), samples, CLASSES, "cpu")
        for codes, meta, _ in samples:
            meta["features"] = table[codes.reshape(-1).astype(int)].numpy()
        found = answer_constrained(model, tokenizer, vocabulary, Prompts(style), samples, CLASSES, "cpu", adapter)
    for some, others in zip(found, expected, strict=True):
        for a, b in zip(some, others, strict=True):
            assert a["likelihoods"] == pytest.approx(b["likelihoods"], abs=1e-4)


def test_a_tree_holds_what_strings_have_in_common_once():
    one = tree([[5, 6, 1], [5, 7, 1], [5, 6], [9, 1]])
    assert one.tokens == [0, 5, 6, 7, 9] and one.depth == [0, 1, 2, 2, 1]
    assert one.sees.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    steps = [[(one.sources[k], one.targets[k]) for k in path] for path in one.paths]
    assert steps == [[(0, 5), (1, 6), (2, 1)], [(0, 5), (1, 7), (3, 1)], [(0, 5), (1, 6)], [(0, 9), (4, 1)]]


def test_mistakes(how):
    samples = samples_of([task(70, "single-query", "Which?")])
    for classes in ({}, {70: []}):
        with pytest.raises(UserError, match="--classes: has none for template 70 of the question 'Which\\?'"):
            answer_constrained(*how, Prompts(), samples, classes, "cpu")
    with pytest.raises(ValueError, match="a report has no classes"):
        answer_constrained(*how, Prompts(), samples_of([{"task": "report", "question_type": "report", "report": "sinus rhythm."}]), CLASSES, "cpu")
    assert answer_constrained(*how, Prompts(), samples_of([], []), CLASSES, "cpu") == [[], []]
