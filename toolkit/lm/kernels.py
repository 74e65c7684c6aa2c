"""The loss over the vocabulary without the full logits, and Liger's kernels (`--kernels`) and torch.compile (`--compile`) for a model's layers."""

import functools
import importlib.util
from types import MethodType

import torch
from peft import PeftModel
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.lm.checkpointing import decoder_layers

# Rows of logits at a time. Forward and backward of the head of `tiny` (2,504 targets, 2,368 words, 1 thread): 101 ms in fp32 and 56 in bf16, as
# with the full logits (104, 55); with 64 rows 106 and 68. Of smollm2 (1,252, 50,496) with 1,024, 256, 64 rows in bf16: 1.7, 1.9, 3.3 s.
CHUNK = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, while a chunk's probabilities are there; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_gradients):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if with_gradients and ctx.needs_input_grad[0] else None
        of_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if with_gradients and ctx.needs_input_grad[1] else None
        minus_one = torch.full((1, 1), -1.0, dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            h, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            p = (h @ weight.T).to(wide)
            p.sub_(p.amax(1, keepdim=True))
            at_target = p.gather(1, target)
            total = p.exp_().sum(1, keepdim=True)
            loss += (total.log() - at_target).sum()
            if of_hidden is None and of_weight is None:
                continue
            p = p.div_(total).scatter_add_(1, target, minus_one.expand_as(target)).to(hidden.dtype)  # the gradient of the logits
            if of_hidden is not None:
                torch.mm(p, weight, out=of_hidden[start : start + chunk])
            if of_weight is not None:
                of_weight += p.T @ h
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        of_hidden, of_weight = ((g if g is None else (g * gradient).to(ctx.dtype)) for g in ctx.saved_tensors)
        return of_hidden, of_weight, None, None, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Sum of the cross-entropy of softmax(hidden @ weight.T), a float32 scalar (float64 for float64 inputs).

    hidden [m, H] and weight [V, H] of one dtype, targets int64 [m]. Never holds more than [chunk, V] logits. The products are of the inputs'
    dtype, the softmax and the sum of the weight's gradient are float32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())


def liger_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`linear_cross_entropy` by Liger's fused kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(weight, hidden, targets)


LOSSES = {"eager": linear_cross_entropy, "liger": liger_cross_entropy}


def apply(lm: PreTrainedModel | PeftModel, how: str, device: torch.device) -> str:
    """`--kernels`: `liger` gives this model Liger's RMSNorm, RoPE and SwiGLU in place, `auto` does so where it can. Returns `liger` or `eager`.

    Of the architecture's RoPE the module of transformers knows one only: other models of that architecture in this process get Liger's as well.
    Raises UserError if `liger` is asked for and cannot be had.
    """
    base = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    missing = None if how == "eager" else _missing(base.config.model_type, device)
    if how == "liger" and missing:
        raise UserError(f"--kernels liger: {missing}; use --kernels eager")
    if how == "eager" or missing:
        return "eager"
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' own Trainer calls

    _apply_liger_kernel_to_instance(base, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    return "liger"


def _missing(architecture: str, device: torch.device) -> str | None:
    """What keeps Liger from this model on this device."""
    if device.type == "cpu":
        return "its kernels need a GPU"
    if not all(importlib.util.find_spec(package) for package in ("liger_kernel", "triton")):
        return "liger-kernel or triton is not installed (pip install liger-kernel)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return None if architecture in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it has no kernels for the architecture {architecture!r}"


def compile_layers(lm: PreTrainedModel | PeftModel) -> None:
    """`--compile`: torch.compile of each decoder layer's computation, in place, before or after `checkpoint_layers`; not with ZeRO-3.

    The attention stays outside of the graphs. Rows of one length are compiled once, of other lengths once more, whatever their layouts.
    """
    for layer in decoder_layers(lm):
        layer.forward = MethodType(_compiled_forward, layer)
        layer.compiled = torch.compile(type(layer).forward.__wrapped__)  # without transformers' checkpointing


def _compiled_forward(layer, *args, **kwargs):
    """The graph stands inside of the checkpointing: around it dynamo gives the layer up without a word."""
    run = functools.partial(layer.compiled, layer, **kwargs)
    return layer._gradient_checkpointing_func(run, *args) if layer.gradient_checkpointing and layer.training else run(*args)
