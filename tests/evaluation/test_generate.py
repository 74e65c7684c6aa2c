"""Shared-prefix batched generation against one question at a time with `transformers.generate`."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from toolkit.evaluation.generate import answer_rows, answer_tasks, tree
from toolkit.lm.attention import plain_attention
from toolkit.tasks.prompts import Prompts, end_id, prompt_ids, shared_ids


def tasks(*questions):
    rows = [{"task": "ecgqa", "question": q, "answer": ["yes"]} for q in questions]
    return [*rows, {"task": "report", "report": "sinus rhythm."}]


HOW = {
    "without": (Prompts(), {"gain_first": None}), "gain tokens": (Prompts(), {}), "gain text": (Prompts(gain_text=True), {"gain_first": None}),
    "background": (Prompts(background=True), {"gain_first": None}), "paper": (Prompts("paper", background=True), {}), "chat": (Prompts("chat"), {}),
}  # fmt: skip
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<|pad|>\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.mark.parametrize("how", HOW)
def test_answers_equal_those_of_generate_one_by_one(tiny_with_gains, how):
    model, tokenizer, vocabulary = tiny_with_gains
    prompts, changes = HOW[how]
    vocabulary, tokenizer = replace(vocabulary, **changes), copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    rng = np.random.default_rng(0)
    asked = [tasks("Does this ECG show atrial fibrillation?", "Which?"), tasks("A much longer question, so that the others are padded before theirs?"), []]
    gains = [[0.1] * 12, [0.051, 1.3, 0.015] * 4, [0.3] * 12]  # in words of several lengths
    ages = [(34.0, "female"), (None, ""), (90.0, "male")]
    metas = [{"gains": [one], "ages": [age], "sexes": [sex]} for one, (age, sex) in zip(gains, ages)]
    samples = [(rng.integers(0, 1296, (1, 313)).astype(np.uint16), meta, some) for some, meta in zip(asked, metas)]
    lengths = {len(shared_ids(tokenizer, vocabulary, prompts, *sample[:2])) for sample in samples}
    assert len(lengths) == {"gain text": 2, "background": 3}.get(how, 1) and (min(lengths) == 0) == (how == "paper")
    end = end_id(tokenizer, prompts)
    assert end == (2 if how == "chat" else 1)
    with plain_attention(model):
        answers = answer_tasks(model, tokenizer, vocabulary, prompts, samples, 12, "cpu")
        ecg_ids = [[i] for i in range(vocabulary.start, model.config.vocab_size)]
        for (codes, meta, asked), given in zip(samples, answers, strict=True):
            assert len(given) == len(asked)
            for task, answer in zip(asked, given):
                ids = [*shared_ids(tokenizer, vocabulary, prompts, codes, meta), *prompt_ids(tokenizer, vocabulary, prompts, codes, meta, task)]
                out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False, bad_words_ids=ecg_ids,
                                     eos_token_id=end, pad_token_id=2)  # fmt: skip
                assert tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip() == answer.prediction
                logits = model(out).logits[0, len(ids) - 1 : -1, : vocabulary.start]
                assert logits.log_softmax(-1).gather(1, out[0, len(ids) :, None]).sum().item() == pytest.approx(answer.loglik, abs=1e-3)


def test_two_ecgs_make_one_prefix(tiny_with_gains):
    model, tokenizer, vocabulary = tiny_with_gains
    pair, meta = np.zeros((2, 313), np.uint16), {"gains": [[0.1] * 12, [0.2] * 12]}
    assert len(shared_ids(tokenizer, vocabulary, Prompts(), pair, meta)) == 1 + 2 * (315 + 12)
    rows = [(pair, meta, tasks("Compared?")), (pair[:1], {"gains": meta["gains"][:1]}, tasks("Alone?"))]
    with plain_attention(model):
        mixed = answer_tasks(model, tokenizer, vocabulary, Prompts(), rows, 4, "cpu")  # padded after the shorter prefix
        alone = [answer_tasks(model, tokenizer, vocabulary, Prompts(), [row], 4, "cpu")[0] for row in rows]
    assert [[one.prediction for one in some] for some in mixed] == [[one.prediction for one in some] for some in alone]
    assert [one.loglik for some in mixed for one in some] == pytest.approx([one.loglik for some in alone for one in some], abs=1e-3)


def test_what_questions_begin_with_is_read_once():
    nodes = tree([[7, 8, 9], [7, 8], [7, 6, 9], []], 100)
    assert nodes == [(7, 100, [0, 1, 2]), (8, 101, [0, 1]), (9, 102, [0]), (6, 101, [2]), (9, 102, [2])]


def test_rows_for_the_metrics(tiny):
    model, tokenizer, vocabulary = tiny
    samples = [(np.full((n, 313), k, np.uint16), {}, [{**task, "id": f"{k}-{i}", "question_type": "single-verify"} for i, task in enumerate(tasks("Q?"))])
               for k, n in enumerate((2, 1, 2, 1))]  # fmt: skip
    with plain_attention(model):
        answer = lambda batch: answer_tasks(model, tokenizer, vocabulary, Prompts(), batch, 3, "cpu")
        rows = answer_rows(answer, samples, batch=3)
        alone = {row["id"]: row for sample in samples for row in answer_rows(answer, [sample])}
    assert {row["id"]: row for row in rows} == alone and len(rows) == 8
    assert alone["0-0"]["reference"] == "yes" and alone["0-1"]["reference"] == "sinus rhythm." and alone["0-1"]["task"] == "report"
