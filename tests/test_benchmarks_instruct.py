"""benchmarks/instruct.py: both sides are given the same pairs of ECG and question."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import instruct
from benchmarks.baselines import collator, padded_samples
from toolkit.lm.lora import add_lora
from toolkit.shards.packing import Group, Sequence, pack

PAD = 0


@pytest.fixture
def row():
    """Two ECGs of 20 and 12 tokens, with three questions and one, whose last three tokens are the answer."""
    generator = np.random.default_rng(0)

    def sequence(length: int, answer: int) -> Sequence:
        return Sequence(generator.integers(1, 60, length), np.arange(length) >= length - answer)

    return pack([Group(sequence(20, 0), [sequence(n, 3) for n in (9, 6, 14)]), Group(sequence(12, 0), [sequence(7, 3)])])


def test_every_question_becomes_a_sample_with_its_ecg_before_it(row):
    samples = padded_samples(row)
    assert [len(sample["input_ids"]) for sample in samples] == [29, 26, 34, 19] and instruct.pairs_of(row) == 4
    first, second = np.split(row.input_ids, [20 + 9 + 6 + 14])
    prompts = [(first[:20], first[20:29]), (first[:20], first[29:35]), (first[:20], first[35:]), (second[:12], second[12:])]
    for sample, parts in zip(samples, prompts, strict=True):
        ids = np.concatenate(parts)
        assert sample["input_ids"].tolist() == ids.tolist()
        assert sample["labels"].tolist() == [-100] * (len(ids) - 3) + ids[-3:].tolist()


def test_the_two_sides_have_the_same_loss_and_a_difference_is_found(row):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False)
    lm = add_lora(LlamaForCausalLM(config), 4, 4, 0.0)
    batch = collator(PAD)(padded_samples(row))
    instruct.agree(lm, lm, row, batch, bf16=False)
    batch["input_ids"][0, 0] += 1  # an ECG token of another ECG
    with pytest.raises(AssertionError, match="12 targets"):
        instruct.agree(lm, lm, row, batch, bf16=False)


def test_every_ecg_of_the_synthetic_case_has_as_many_questions():
    rows = instruct.synthetic_questions()
    assert Counter(row["ecg_id"][0] for row in rows) == dict.fromkeys(range(1, instruct.RECORDS + 1), instruct.QUESTIONS)
    assert len({(*row["ecg_id"], row["question"]) for row in rows}) == len(rows) and all(row["answer"] for row in rows)
