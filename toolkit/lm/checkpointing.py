"""`--gradient_checkpointing none|full|every_N`: recompute activations of decoder layers in the backward pass instead of keeping them."""

import functools
import re

from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from toolkit.errors import UserError


def checkpoint_layers(lm: PreTrainedModel | PeftModel, how: str) -> None:
    """Checkpoint no decoder layer, all of them (`full`), or the last of every N (`every_2`: half of them), in training mode; in place.

    Non-reentrant, as ZeRO-3 needs; so no input has to require a gradient, and frozen embeddings are fine.
    Raises UserError for other words and for an architecture whose layers transformers cannot checkpoint.
    """
    every = layers_apart(how)
    if not every:
        return
    layers = decoder_layers(lm)
    if every > len(layers):
        raise UserError(f"--gradient_checkpointing: {how} checkpoints nothing, the backbone has {len(layers)} layers; use a smaller N")
    for layer in layers[every - 1 :: every]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # where transformers' own switch puts it


def layers_apart(how: str) -> int:
    """N of `every_N`, 1 for `full`, 0 for `none`. Raises UserError for other words."""
    number = re.fullmatch(r"every_([1-9]\d*)", how)
    if how not in ("none", "full") and not number:
        raise UserError(f"--gradient_checkpointing: {how!r} is none of none, full, every_N (every_2: each second layer)")
    return int(number[1]) if number else int(how == "full")


def decoder_layers(lm: PreTrainedModel | PeftModel) -> list[GradientCheckpointingLayer]:
    """The layers of the decoder, first to last. Raises UserError if they are not transformers' usual kind."""
    base = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    layers = [module for module in base.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"--backbone: {type(base).__name__} has no layers that transformers can checkpoint or compile one by one; leave these flags out")
    return layers
