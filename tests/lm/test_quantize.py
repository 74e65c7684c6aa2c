"""4-bit backbones: what is refused, and a training step against the same weights unpacked."""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolkit.errors import UserError
from toolkit.lm import quantize
from toolkit.lm.flops import row_flops
from toolkit.lm.lora import add_lora
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import Group, Sequence, pack


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(UserError, match="--quantize nf4: needs a CUDA GPU"):
        quantize.check_nf4(torch.device("cpu"), 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--quantize nf4: bitsandbytes is not installed"):
        quantize.check_nf4(torch.device("cuda"), 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="--quantize nf4: does not go with ZeRO-3"):
        quantize.check_nf4(torch.device("cuda"), 3)
    quantize.check_nf4(torch.device("cuda"), 2)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
@pytest.mark.parametrize("tied", [True, False])
def test_lora_beside_nf4_trains_as_beside_the_same_weights_unpacked(tied, tmp_path):
    """On the CPU, in training mode: in evaluation mode bitsandbytes repacks the weights there, and no gradient passes them any more."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    shape = dict(vocab_size=192, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    plain = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **shape))
    plain.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    packed, _ = quantize.load_nf4(str(tmp_path), torch.device("cpu"))
    packed.train()
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 2 * 7 and (packed.lm_head.weight is packed.model.embed_tokens.weight) == tied
    assert packed.lm_head.weight.shape == (192, 64) and packed.lm_head.weight.dtype == torch.bfloat16
    plain.bfloat16().train()
    for name, layer in layers.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        unpacked = plain.get_submodule(name).weight
        assert 0 < (weight - unpacked).abs().max() < 0.3 * unpacked.abs().max()
        unpacked.data = weight.to(torch.bfloat16)

    ids = np.random.default_rng(0).permutation(np.tile(np.arange(192), 2)).reshape(12, 32)
    row, found = pack([Group(Sequence(one, np.arange(32) > 0), []) for one in ids]), []
    for model in (packed, plain):
        torch.manual_seed(1)
        model = add_lora(model, 4, 8, 0.0, trained_rows=range(100, 120), norms=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".lora_B." in name:
                    p.normal_(std=0.1)  # zero, no gradient would reach lora_A
        loss = PackedLM(model)(row)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, row_flops(model)(row)))
    (loss, gradients, flops), (expected, others, as_many) = found
    assert flops == as_many and loss == pytest.approx(expected, rel=1e-3) and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.nn.functional.cosine_similarity(gradient.float().flatten(), others[name].float().flatten(), 0) > 0.99, name
