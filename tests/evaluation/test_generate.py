"""Shared-prefix batched generation against one question at a time with `transformers.generate`."""

import numpy as np
import torch

from toolkit.evaluation.generate import answer_tasks
from toolkit.lm.attention import plain_attention
from toolkit.tasks.prompts import prefix_ids, question_ids


def tasks(*questions):
    rows = [{"task": "ecgqa", "question": q, "answer": ["yes"]} for q in questions]
    return [*rows, {"task": "report", "report": "sinus rhythm."}]


def test_answers_equal_those_of_generate_one_by_one(tiny):
    model, tokenizer, vocabulary = tiny
    rng = np.random.default_rng(0)
    samples = [
        (rng.integers(0, 1296, (1, 313)).astype(np.uint16), tasks("Does this ECG show atrial fibrillation?", "Which?")),
        (rng.integers(0, 1296, (1, 313)).astype(np.uint16), tasks("A much longer question, so that the others are padded before theirs?")),
        (rng.integers(0, 1296, (1, 313)).astype(np.uint16), []),
    ]
    with plain_attention(model):
        answers = answer_tasks(model, tokenizer, vocabulary, samples, 12, "cpu")
        ecg_ids = [[i] for i in range(vocabulary.start, model.config.vocab_size)]
        for (codes, asked), given in zip(samples, answers, strict=True):
            assert len(given) == len(asked)
            for task, answer in zip(asked, given):
                prompt = torch.tensor([[*prefix_ids(tokenizer, vocabulary, codes), *question_ids(tokenizer, task)]])
                out = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, bad_words_ids=ecg_ids, pad_token_id=2
                )
                assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip() == answer


def test_two_ecgs_make_one_prefix(tiny):
    model, tokenizer, vocabulary = tiny
    pair = np.zeros((2, 313), np.uint16)
    assert len(prefix_ids(tokenizer, vocabulary, pair)) == 1 + 2 * 315
    with plain_attention(model):
        assert len(answer_tasks(model, tokenizer, vocabulary, [(pair, tasks("Compared?"))], 4, "cpu")[0]) == 2
