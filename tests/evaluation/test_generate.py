"""Shared-prefix batched generation against one question at a time with `transformers.generate`."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from toolkit.evaluation.generate import answer_tasks
from toolkit.lm.attention import plain_attention
from toolkit.tasks.prompts import prefix_ids, question_ids


def tasks(*questions):
    rows = [{"task": "ecgqa", "question": q, "answer": ["yes"]} for q in questions]
    return [*rows, {"task": "report", "report": "sinus rhythm."}]


GAINS = {"without": {"gain_first": None}, "tokens": {}, "text": {"gain_first": None, "gain_text": True}}


@pytest.mark.parametrize("how", GAINS)
def test_answers_equal_those_of_generate_one_by_one(tiny_with_gains, how):
    model, tokenizer, vocabulary = tiny_with_gains
    vocabulary = replace(vocabulary, **GAINS[how])
    rng = np.random.default_rng(0)
    asked = [tasks("Does this ECG show atrial fibrillation?", "Which?"), tasks("A much longer question, so that the others are padded before theirs?"), []]
    gains = [[0.1] * 12, [0.051, 1.3, 0.015] * 4, [0.3] * 12]  # in words of several lengths
    samples = [(rng.integers(0, 1296, (1, 313)).astype(np.uint16), [one], some) for some, one in zip(asked, gains)]
    lengths = {len(prefix_ids(tokenizer, vocabulary, *sample[:2])) for sample in samples}
    assert len(lengths) == (2 if how == "text" else 1) and min(lengths) == 316 + {"without": 0, "tokens": 12, "text": min(lengths) - 316}[how]
    with plain_attention(model):
        answers = answer_tasks(model, tokenizer, vocabulary, samples, 12, "cpu")
        ecg_ids = [[i] for i in range(vocabulary.start, model.config.vocab_size)]
        for (codes, one, asked), given in zip(samples, answers, strict=True):
            assert len(given) == len(asked)
            for task, answer in zip(asked, given):
                prompt = torch.tensor([[*prefix_ids(tokenizer, vocabulary, codes, one), *question_ids(tokenizer, task)]])
                out = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, bad_words_ids=ecg_ids, pad_token_id=2
                )
                assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip() == answer


def test_two_ecgs_make_one_prefix(tiny_with_gains):
    model, tokenizer, vocabulary = tiny_with_gains
    pair, gains = np.zeros((2, 313), np.uint16), [[0.1] * 12, [0.2] * 12]
    assert len(prefix_ids(tokenizer, vocabulary, pair, gains)) == 1 + 2 * (315 + 12)
    with plain_attention(model):
        assert len(answer_tasks(model, tokenizer, vocabulary, [(pair, gains, tasks("Compared?"))], 4, "cpu")[0]) == 2
