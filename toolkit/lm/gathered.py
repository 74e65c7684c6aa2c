"""Weights that ZeRO-3 holds in parts, whole for a moment."""

from contextlib import AbstractContextManager, nullcontext

import torch


def gathered(weights: list[torch.nn.Parameter]) -> AbstractContextManager:
    """Within the block the weights are whole on every rank. Collective if one of them is sharded."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    import deepspeed  # `deepspeed.zero` is no module to import from

    return deepspeed.zero.GatheredParameters(weights)
