"""Gradient checkpointing: the same gradients from fewer kept bytes, with frozen embeddings too."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from toolkit.errors import UserError
from toolkit.lm.checkpointing import checkpoint_layers
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import Group, Sequence, pack

LAYERS = 4


def make(peft: bool):
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False)) if peft else model


def kept_bytes_and_gradients(peft: bool, how: str) -> tuple[int, dict[str, torch.Tensor]]:
    model, kept = make(peft), {}
    checkpoint_layers(model, how)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    rng = np.random.default_rng(0)
    row = pack([Group(Sequence(rng.integers(0, 97, n), np.arange(n) > 0), []) for n in (40, 33)])

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = PackedLM(model).train()
    torch.manual_seed(1)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = packed(row)
    total = sum(kept.values())
    loss.backward()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("peft", [False, True])
def test_gradients_are_the_same_and_less_is_kept(peft):
    """With PEFT the embedding is frozen: nothing that enters the first layer requires a gradient."""
    kept, expected = kept_bytes_and_gradients(peft, "none")
    fewer = []
    for how in ("every_2", "full"):
        bytes_kept, got = kept_bytes_and_gradients(peft, how)
        assert all(got[name] is not None and torch.equal(got[name], expected[name]) for name in expected)
        fewer.append(bytes_kept)
    assert kept > fewer[0] > fewer[1]
    assert kept - fewer[0] == pytest.approx(fewer[0] - fewer[1], rel=0.2)  # half of the layers is half of the saving


def test_every_n_checkpoints_the_last_layer_of_each_n():
    for how, expected in (("none", []), ("full", [0, 1, 2, 3]), ("every_1", [0, 1, 2, 3]), ("every_2", [1, 3]), ("every_3", [2]), ("every_4", [3])):
        model = make(False)
        checkpoint_layers(model, how)
        assert [i for i, layer in enumerate(model.model.layers) if layer.gradient_checkpointing] == expected


@pytest.mark.parametrize("how", ["all", "every_0", "every_", "every_2x", "True"])
def test_other_words_are_refused(how):
    with pytest.raises(UserError, match="--gradient_checkpointing: .* is none of none, full, every_N"):
        checkpoint_layers(make(False), how)


def test_more_than_there_are_layers_is_refused():
    with pytest.raises(UserError, match="every_5 checkpoints nothing, the backbone has 4 layers"):
        checkpoint_layers(make(False), "every_5")
