"""Run by test_kernels.py with TRITON_INTERPRET=1: a packed row of a tiny Llama through Liger's kernels against eager. Prints a line of JSON for each model."""

import json

import numpy as np
import torch
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime import interpreter

from toolkit.lm import kernels
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import Group, Sequence, pack

# The interpreter of triton 3.9 gives a kernel its scalar floats as Python's, which have no .to(), and has no libdevice
convert = interpreter._implicit_cvt


def convert_floats_too(argument):
    if not isinstance(argument, float):
        return convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)


interpreter._implicit_cvt = convert_floats_too


@triton.jit
def rsqrt(x):
    return 1 / tl.sqrt(x)


rms_norm.rsqrt = rsqrt


def sequence(rng, n: int) -> Sequence:
    return Sequence(rng.integers(20, 80, n), np.arange(n) > 0)


def loss_and_gradients(model, how: str, row, rows) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = PackedLM(model, how, rows)(row)
    (loss / len(row.targets)).backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def make(tied: bool, peft: bool):
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **shape))
    with torch.no_grad():
        for p in model.parameters():  # weights of 0.02 and norms of 1 would leave most of the arithmetic without an effect
            p.add_(0.1 * torch.randn_like(p))
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, trainable_token_indices=[30, 40])
    return get_peft_model(model, lora) if peft else model


rng = np.random.default_rng(0)
row = pack([Group(sequence(rng, n), [sequence(rng, 4), sequence(rng, 3)]) for n in (9, 6)])
cases = [(make(tied=False, peft=False), None), (make(tied=True, peft=True), range(20, 80))]
eager = [loss_and_gradients(model, "eager", row, rows) for model, rows in cases]  # all before the first `apply`, which replaces the RoPE of all Llamas
for (model, rows), (loss, gradients) in zip(cases, eager):
    assert kernels.apply(model, "liger", torch.device("cuda")) == "liger"  # no GPU is asked for anything
    liger, got = loss_and_gradients(model, "liger", row, rows)
    replaced = {module._get_name() for module in model.modules()}
    worst = max(((got[name] - g).abs().max() / g.abs().max()).item() for name, g in gradients.items())
    print(json.dumps({"eager": loss, "liger": liger, "gradients": len(gradients), "worst": worst, "replaced": sorted(replaced)}))
