"""Model FLOPs against torch's own counter, which sees each matrix product of a real forward and backward pass."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from toolkit.lm.flops import GPUS, peak_flops, row_flops, seen_pairs
from toolkit.lm.lora import add_lora
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import Group, Packed, Sequence, pack

SHAPE = dict(vocab_size=192, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **more}))


def sequence(n: int, targets: int) -> Packed:
    target = np.zeros(n, bool)
    target[n - targets :] = True
    return pack([Group(Sequence(np.arange(n, dtype=np.int64), target), [])])


def counted(model, row: Packed) -> float:
    """What torch counts, with eager attention: its scores are of the whole square, twice the pairs that are needed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        hidden = base.get_decoder()(torch.from_numpy(row.input_ids)[None], use_cache=False).last_hidden_state[0]
        scores = base.get_output_embeddings()(hidden[torch.from_numpy(row.predict_at)])
        torch.nn.functional.cross_entropy(scores, torch.from_numpy(row.targets)).backward()
    return counter.get_total_flops()


def unseen(config, n: int) -> int:
    """FLOPs that eager attention spends on pairs behind the causal mask."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 3 * 4 * config.num_hidden_layers * config.num_attention_heads * head_size * (n * n - n * (n + 1) // 2)


@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: llama(tie_word_embeddings=True),
        lambda: llama(head_dim=16),  # heads wider than the hidden size / heads
        lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),  # linear layers with biases
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=192, n_embd=48, n_layer=3, n_head=6)),  # Conv1D instead of linear layers
    ],
)
def test_all_matrix_products_of_a_training_step_are_counted(make):
    model, row = make(), sequence(40, 25)
    assert row_flops(model)(row) == counted(model, row) - unseen(model.config, 40)


def test_frozen_weights_have_no_gradient_of_their_own():
    row = sequence(40, 25)
    lora = add_lora(llama(), rank=4, alpha=8, dropout=0.0)
    lora.get_base_model().get_input_embeddings().weight.requires_grad_(True)  # else nothing before the first LoRA needs a gradient either
    assert row_flops(lora)(row) == counted(lora, row) - unseen(lora.config, 40)
    full = llama()
    full.lm_head.weight.requires_grad_(False)
    assert row_flops(full)(row) == counted(full, row) - unseen(full.config, 40) == row_flops(llama())(row) - 2 * 25 * 48 * 192


def test_with_a_frozen_embedding_the_first_layers_input_gradients_are_counted_though_not_computed():
    model, row = add_lora(llama(), rank=4, alpha=8, dropout=0.0), sequence(40, 25)
    skipped = 2 * 40 * (48 * (48 + 16 + 16) + 3 * 48 * 4)  # of q, k, v and their LoRA's first factors
    assert row_flops(model)(row) == counted(model, row) - unseen(model.config, 40) + skipped


def test_rows_of_the_embedding_trained_through_peft_need_the_gradient_of_a_tied_head():
    config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[3, 4])
    model, row = get_peft_model(llama(tie_word_embeddings=True), config), sequence(40, 25)
    assert row_flops(model)(row) == counted(model, row) - unseen(model.config, 40)


def test_a_slice_of_the_head():
    model, row = llama(), sequence(40, 25)
    assert row_flops(model)(row) - row_flops(model, head_rows=64)(row) == 3 * 2 * 25 * 48 * (192 - 64)


def test_pairs_are_those_of_the_dense_mask():
    """Against the mask that says who sees whom, written out."""
    parts = [(5, [3, 2]), (4, []), (7, [1])]
    groups = [Group(Sequence(np.zeros(p, int), np.zeros(p, bool)), [Sequence(np.zeros(b, int), np.ones(b, bool)) for b in bs]) for p, bs in parts]
    seen = 0
    for prefix, branches in parts:
        who = [(None, i) for i in range(prefix)] + [(k, i) for k, b in enumerate(branches) for i in range(b)]
        seen += sum((kk == kq and bk <= bq) or (kk is None and kq is not None) for kq, bq in who for kk, bk in who)
    assert seen_pairs(pack(groups)) == seen


def test_counts_are_the_same_without_weights():
    """On the meta device, as toolkit.plan counts; and where ZeRO-3 has left a weight empty, with its shape in `ds_shape`."""
    row = sequence(40, 25)
    with torch.device("meta"):
        assert row_flops(llama())(row) == row_flops(llama())(row)
    model = llama()
    expected = row_flops(model)(row)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert row_flops(model)(row) == expected


def test_a_packed_model_takes_the_row_that_is_counted():
    """The row is the one that PackedLM computes, also with branches."""
    groups = [Group(Sequence(np.arange(9), np.zeros(9, bool)), [Sequence(np.arange(4), np.ones(4, bool)), Sequence(np.arange(2), np.ones(2, bool))])]
    row, model = pack(groups), llama()
    assert PackedLM(model)(row, logits=True).shape == (6, 192)
    linear = 2 * 3 * (48 * (48 + 16 + 16 + 48) + 3 * 48 * 96)  # q k v o, gate up down of three layers
    pairs = 9 * 10 // 2 + 4 * 9 + 10 + 2 * 9 + 3
    assert row_flops(model)(row) == 3 * (15 * linear + 6 * 2 * 48 * 192 + pairs * 4 * 3 * 48)


def test_peak_of_this_machine_is_measured():
    flops, source = peak_flops(torch.device("cpu"), bf16=False)
    assert source == "measured matmul, fp32" and 1e8 < flops < 1e15


@pytest.mark.parametrize(
    ("name", "bf16", "expected", "source"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989e12, "data sheet of NVIDIA H100 80GB HBM3, dense bf16"),
        ("NVIDIA A100-SXM4-40GB", False, 19.5e12, "data sheet of NVIDIA A100-SXM4-40GB, dense fp32"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", True, 1.0, "measured matmul, bf16"),  # a part of the card
        ("Tesla V100-SXM2-16GB", True, 1.0, "measured matmul, bf16"),  # which has no bf16
    ],
)
def test_peak_of_known_cards(monkeypatch, name, bf16, expected, source):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr("toolkit.lm.flops._measured", lambda device, dtype: 1.0)
    assert peak_flops(torch.device("cuda"), bf16) == (expected, source)
    assert sum(torch.cuda.get_device_name(None) == gpu.device for gpu in GPUS.values()) <= 1
