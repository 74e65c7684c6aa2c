"""Attention for padding-free rows, registered with transformers as `heartspeed_packed`.

The layout of the row travels as the keyword argument `layout` of the model's forward (see toolkit/shards/packing.py). On a GPU in half precision
a row without branches is one call of a variable-length kernel. Elsewhere each prefix is one causal SDPA; the branches of a group are one SDPA
against that group alone, with a mask of [branch tokens, group tokens]. Nothing of the size of the whole row squared is ever built: a dense block
mask halves the speed of a 3,200-token row.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from toolkit.errors import UserError

NAME = "heartspeed_packed"
Groups = list[tuple[int, int, tuple[int, ...]]]


@dataclass(eq=False)
class Layout:
    """Of a row, the same for all layers. boundaries: int32 [groups + 1], where its sequences begin and end, for a variable-length kernel; or None."""

    groups: Groups
    boundaries: torch.Tensor | None

    @staticmethod
    def of(groups: Groups, device: torch.device) -> "Layout":
        plain = device.type == "cuda" and not any(branches for _, _, branches in groups)
        ends = [0, *(end for _, end, _ in groups)]
        return Layout(groups, torch.tensor(ends, dtype=torch.int32).to(device) if plain else None)

    @property
    def longest(self) -> int:
        return max(end - start + max(branches, default=0) for start, end, branches in self.groups)


@lru_cache
def variable_length_kernel() -> Callable | None:
    """(query [n, H, D], key and value [n, H_kv, D], boundaries, longest, scale) -> [n, H, D], causal in each sequence; None where there is none."""
    if torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, at, longest, scale: flash_attn_varlen_func(q, k, v, at, at, longest, longest, softmax_scale=scale, causal=True)
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    options = inspect.signature(varlen_attn).parameters  # they differ between 2.10 and 2.13
    causal = {"window_size": (-1, 0)} if "window_size" in options else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in options else {}
    return lambda q, k, v, at, longest, scale: varlen_attn(q, k, v, at, at, longest, longest, scale=scale, **causal, **grouped)


def branch_mask(prefix: int, branches: tuple[int, ...]) -> torch.Tensor:
    """bool [sum(branches), prefix + sum(branches)]: a branch token sees the prefix and its own branch up to itself."""
    branch = torch.repeat_interleave(torch.arange(len(branches)), torch.tensor(branches))
    own = (branch[:, None] == branch[None, :]).tril()
    return torch.cat([torch.ones(len(branch), prefix, dtype=torch.bool), own], 1)


@torch.compiler.disable  # traced, a layout is a constant: rows of six layouts were compiled six times, for over a minute each
def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout: Layout | None = None, **kwargs):
    """query [1, H, n, D], key and value [1, H_kv, n, D] -> ([1, n, H, D], None), as AttentionInterface wants it."""
    if layout is None:
        raise ValueError(f"{NAME} needs layout=; use `plain_attention(model)` for ordinary rows")
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") or (window and window < layout.longest):
        raise ValueError(f"{NAME} has no soft cap and no sliding window shorter than a sequence, and this backbone asks for one")
    if layout.boundaries is not None and query.dtype in (torch.bfloat16, torch.float16) and not dropout and variable_length_kernel():
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return variable_length_kernel()(q, k, v, layout.boundaries, layout.longest, scaling)[None], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []

    def attend(q: slice, kv: slice, **how):
        parts.append(scaled_dot_product_attention(query[:, :, q], key[:, :, kv], value[:, :, kv], scale=scaling, dropout_p=dropout, **how))

    lengths = {end - start for start, end, branches in layout.groups}
    if len(lengths) == 1 and not any(branches for _, _, branches in layout.groups):  # equal plain sequences: one call for all of them
        fold = [t.unflatten(2, (len(layout.groups), -1)).transpose(1, 2).squeeze(0) for t in (query, key, value)]  # [groups, H, length, D]
        folded = scaled_dot_product_attention(*fold, is_causal=True, scale=scaling, dropout_p=dropout)
        return folded.transpose(1, 2).flatten(0, 1).unsqueeze(0).contiguous(), None
    for start, end, branches in layout.groups:
        attend(slice(start, end), slice(start, end), is_causal=True)
        if branches:
            stop = end + sum(branches)
            attend(slice(end, stop), slice(start, stop), attn_mask=branch_mask(end - start, branches).to(query.device))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, packed_attention)


def use_packed_attention(model) -> None:
    """Switch a model to packed rows. Raises UserError for an architecture that would ignore the layout: its documents would see each other."""
    model.set_attn_implementation(NAME)  # only logs where it has no effect
    if model.config._attn_implementation != NAME:
        raise UserError(f"--backbone: {type(model).__name__} does not use transformers' AttentionInterface, so packed rows are not safe; use another")


@contextmanager
def plain_attention(model):
    """Within the block the model takes ordinary [batch, n] rows, masks and a cache (evaluation, generation)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
