"""The chunked loss against full logits, the head's rows and wrappers, and Liger's kernels against eager in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from toolkit.errors import UserError
from toolkit.lm import kernels
from toolkit.lm.attention import plain_attention
from toolkit.lm.kernels import linear_cross_entropy
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import Group, Sequence, pack

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def inputs(m: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(m)
    hidden, weight = torch.randn(m, 8, generator=generator), torch.randn(31, 8, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(0, 31, (m,), generator=generator)


def make_row(low: int = 0, high: int = 97, seed: int = 0):
    rng = np.random.default_rng(seed)
    return pack([Group(Sequence(rng.integers(low, high, n), np.arange(n) > 0), []) for n in (19, 12, 26)])


def make_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SHAPE))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (0.5 * loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("m", [1, 6, 7, 8, 13, 14])  # one target, a chunk less one, a chunk and one more, two chunks
@pytest.mark.parametrize("frozen", [None, "hidden", "weight"])
def test_chunked_loss_and_gradients_equal_those_of_the_full_logits(m, frozen):
    hidden, weight, targets = inputs(m)
    if frozen:
        {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (3 * expected).backward()
    wanted = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    loss = linear_cross_entropy(hidden, weight, targets, chunk=7)
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip((hidden.grad, weight.grad), wanted):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_bf16_sums_in_float32():
    """Against float64 of the same bf16 numbers: the loss is float32, and 300 chunks lose no more of the weight's gradient than one."""
    hidden, weight, targets = inputs(600, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    expected.backward()
    for chunk in (2, 600):
        hidden.grad = weight.grad = None
        loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
        loss.backward()
        assert loss.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(loss.item(), expected.item(), rtol=1e-3, atol=0)  # the products are rounded to 8 bits
        for got, want in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
            assert (got.double() - want).abs().max() < 0.01 * want.abs().max()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("training", [True, False])
def test_never_are_there_more_logits_than_of_one_chunk(training):
    hidden, weight, targets = inputs(200)
    with Largest() as chunked, torch.set_grad_enabled(training):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=20)
        if training:
            loss.backward()
    with Largest() as full:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert full.elements == 200 * 31
    assert chunked.elements == (200 * 8 if training else 20 * 31)  # the gradient of hidden; without one the logits of a chunk
    assert loss.requires_grad == training


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_some_rows_is_the_softmax_over_them(tied, peft):
    model, rows, row = make_llama(tied), range(20, 77), make_row(20, 77)
    if peft:
        trained = [30, 76] if tied else {"embed_tokens": [30], "lm_head": [30, 76]}
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, trainable_token_indices=trained))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p) if "trainable_tokens" in name else 0)
    full, part = PackedLM(model)(row, logits=True), PackedLM(model, head_rows=rows)
    assert torch.equal(part(row, logits=True), full[:, 20:77])
    expected = gradients(part, F.cross_entropy(full[:, 20:77], torch.from_numpy(row.targets - 20), reduction="sum"))
    got = gradients(part, part(row))
    assert expected.keys() == got.keys() and (not peft or any("trainable_tokens" in name for name in got))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("outside", [19, 77])
def test_a_target_outside_of_the_heads_rows_is_an_error(outside):
    row = make_row(20, 77)
    row.targets[3] = outside
    with pytest.raises(ValueError, match="outside of the head's rows 20 to 76"):
        PackedLM(make_llama(), head_rows=range(20, 77))(row)


def test_generation_and_export_know_nothing_of_the_loss(tmp_path):
    model = make_llama().eval()
    prompt = torch.tensor([[3, 4, 5]])
    how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    before = model.generate(prompt, **how)
    packed = PackedLM(model)
    packed(make_row()).backward()
    with plain_attention(model):
        assert torch.equal(model.generate(prompt, **how), before)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(prompt, **how), before)


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: PhiForCausalLM(PhiConfig(**SHAPE)), "PhiForCausalLM has a head with a bias"),
        (lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=4.0, **SHAPE)), "GraniteForCausalLM has logits_scaling"),
    ],
)
def test_a_backbone_with_other_logits_is_refused(make, what):
    with pytest.raises(UserError, match=f"--backbone: {what}"):
        PackedLM(make())


def test_kernels_that_cannot_be_had_are_an_error_and_auto_goes_without(monkeypatch):
    model, cpu, gpu = make_llama(), torch.device("cpu"), torch.device("cuda")
    assert kernels.apply(model, "auto", cpu) == kernels.apply(model, "eager", gpu) == "eager"
    with pytest.raises(UserError, match="--kernels liger: its kernels need a GPU; use --kernels eager"):
        kernels.apply(model, "liger", cpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.apply(model, "auto", gpu) == "eager"
    with pytest.raises(UserError, match="not installed"):
        kernels.apply(model, "liger", gpu)


def liger_there() -> bool:
    return all(importlib.util.find_spec(package) for package in ("liger_kernel", "triton"))


@pytest.mark.skipif(not liger_there(), reason="needs liger-kernel and triton (CPU wheels): pip install --no-deps liger-kernel==0.8.5 triton")
def test_an_architecture_without_liger_kernels_is_named():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    assert kernels.apply(bloom, "auto", torch.device("cuda")) == "eager"
    with pytest.raises(UserError, match="--kernels liger: it has no kernels for the architecture 'bloom'"):
        kernels.apply(bloom, "liger", torch.device("cuda"))


@pytest.mark.skipif(not liger_there(), reason="needs liger-kernel and triton (CPU wheels): pip install --no-deps liger-kernel==0.8.5 triton")
def test_liger_gives_the_loss_and_gradients_of_eager():
    """A Llama, and one with LoRA and trained token rows: loss within 1e-6 of its size, each gradient within 1e-5 of its largest element."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, Path(__file__).with_name("liger_interpreted.py")], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["gradients"] for result in results] == [21, 29]
    for result in results:
        assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= set(result["replaced"]) and not {"LlamaRMSNorm", "LlamaMLP"} & set(result["replaced"])
        assert result["liger"] == pytest.approx(result["eager"], rel=1e-6)
        assert result["worst"] < 1e-5
