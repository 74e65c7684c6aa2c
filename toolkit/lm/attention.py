"""Attention for padding-free rows, registered with transformers as `heartspeed_packed`.

The layout of the row travels as the keyword argument `layout` of the model's forward (see toolkit/shards/packing.py). On a GPU of compute capability 8.0
or more, in half precision and without dropout, a row without branches is one call of a variable-length kernel, and a row with branches one call of
FlexAttention (compiled by triton at its first row, and checked there against what runs elsewhere). Elsewhere each prefix is one causal SDPA; the branches
of a group are one SDPA against that group alone, with a mask of [branch tokens, group tokens]. Nothing of the size of the whole row squared is ever built:
a dense block mask halves the speed of a 3,200-token row on a CPU.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from toolkit.errors import UserError, first_line

NAME = "heartspeed_packed"
Groups = list[tuple[int, int, tuple[int, ...]]]
BLOCK = 128  # tokens, FlexAttention's own


@dataclass(eq=False)
class Layout:
    """Of a row, the same for all layers, and what a GPU's kernel wants to know of it.

    boundaries: int32 [groups + 1], where the sequences of a row without branches begin and end; blocks: `block_mask` of a row with branches.
    """

    groups: Groups
    boundaries: torch.Tensor | None = None
    blocks: BlockMask | None = None

    @staticmethod
    def of(groups: Groups, device: torch.device) -> "Layout":
        if device.type != "cuda":
            return Layout(groups)
        if any(branches for _, _, branches in groups):
            return Layout(groups, blocks=block_mask(groups, device))
        return Layout(groups, torch.tensor([0, *(end for _, end, _ in groups)], dtype=torch.int32).to(device))

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


def block_mask(groups: Groups, device: torch.device) -> BlockMask:
    """What FlexAttention has to know of a row, padded to a multiple of BLOCK tokens: which blocks of [BLOCK queries, BLOCK keys] it passes over, which it
    takes whole, and for the others which key a query sees. Counted from the lengths: `create_block_mask` would build [tokens, tokens] first."""
    row = max(end + sum(branches) for _, end, branches in groups)
    blocks = -(-row // BLOCK)
    lengths, prefix = [], []  # of every sequence: its tokens, the number of the prefix that it sees (of a prefix: its own)
    for start, end, branches in [*groups, (row, blocks * BLOCK, ())]:  # the padding sees itself alone, so that no query is without a key
        prefix += [len(lengths)] * (1 + len(branches))
        lengths += [end - start, *branches]
    prefix, sequence = np.array(prefix), np.repeat(np.arange(len(lengths)), lengths)  # sequence: of every token
    tokens = np.bincount(sequence * blocks + np.arange(len(sequence)) // BLOCK, minlength=len(lengths) * blocks)
    tokens = tokens.reshape(len(lengths), blocks).astype(np.float32)  # [sequences, blocks]
    sees = tokens + tokens[prefix] * (prefix != np.arange(len(prefix)))[:, None]
    pairs = np.tril(tokens.T @ sees)  # of a query and a key that it sees; right below the diagonal, where every key comes before every query
    whole = np.tril(pairs == BLOCK**2, -1)
    listed = []
    for some in ((pairs > 0) & ~whole, whole):  # per block of queries: how many blocks of keys, and which come first
        listed += [some.sum(1), np.argsort(~some, 1, kind="stable")]
    place = lambda array: torch.from_numpy(array.astype(np.int32)).to(device)
    of_token, prefix_of_token = place(sequence), place(prefix[sequence])

    def seen(batch, head, query, key):
        return (key <= query) & ((of_token[key] == of_token[query]) | (of_token[key] == prefix_of_token[query]))

    return BlockMask.from_kv_blocks(*(place(array)[None, None] for array in listed), BLOCK_SIZE=BLOCK, mask_mod=seen)


def by_blocks(query, key, value, blocks: BlockMask, scale: float | None) -> torch.Tensor:
    """query [1, H, n, D], key and value [1, H_kv, n, D] -> [1, H, n, D]; n a multiple of BLOCK."""
    return flex_attention(query, key, value, block_mask=blocks, scale=scale, enable_gqa=True)


@lru_cache
def branch_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int, scale: float | None) -> Callable | None:
    """`by_blocks`, compiled once for rows of any length; None, with a warning, where it cannot be had or is not right."""
    if torch.cuda.get_device_capability(device) < (8, 0) or not importlib.util.find_spec("triton"):
        return None
    # what changes from row to row becomes variable with the second length; dynamic=True would make the scale and the size of a block variable too
    kernel = torch.compile(by_blocks)
    try:
        off = disagreement(kernel, device, dtype, heads, kv_heads, size, scale)
        problem = None if off < 0.05 else f"it is off by {off:.2g}"
    except Exception as error:  # without a C compiler, with another triton, ...: as many classes as compilers have
        problem = f"{type(error).__name__}: {first_line(error)}"
    if problem:
        warnings.warn(f"branches go through SDPA with a mask, which is slower: FlexAttention does not work here ({problem})", stacklevel=2)
    return None if problem else kernel


def disagreement(kernel: Callable, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int, scale: float | None) -> float:
    """Largest relative difference of a kernel's output and gradients from SDPA's, on a row of one block and on a longer one.

    The first is compiled for its length, the second for all lengths from two blocks on. So no row fits both graphs: a checkpointed layer that is computed
    again with another graph than before ends in an error. Leaves no trace where it is called.
    """
    generator, found = torch.Generator(device).manual_seed(0), []  # of its own, for dropout draws from the common one
    for groups in ([(0, 60, (9, 1)), (70, 100, (15,))], [(0, 313, (24, 300)), (637, 737, ()), (737, 800, (40,))]):
        blocks, row = block_mask(groups, device), groups[-1][1] + sum(groups[-1][2])
        # as projections leave them
        inputs = [torch.randn(1, row, n, size, generator=generator, device=device).to(dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]
        results = []
        for way in (partial(by_kernel, kernel, blocks=blocks, scale=scale), partial(by_parts, groups=groups, scale=scale, dropout=0.0)):
            # validation has switched gradients off, and a checkpointed layer would count the saved tensors as its own
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                leaves = [t.detach().requires_grad_() for t in inputs]
                output = way(*leaves)
                results.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)])
        found += [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(*results)]
    return torch.stack(found).max().item()  # NaN if one is


def by_kernel(kernel: Callable, query, key, value, blocks: BlockMask, scale: float | None) -> torch.Tensor:
    """[1, n, H, D] of a row of any length: padded for the kernel, and the padding cut off."""
    row = query.shape[2]
    q, k, v = (pad(t, (0, 0, 0, blocks.shape[-1] - row)).contiguous() for t in (query, key, value))  # one memory layout, or it compiles again
    return kernel(q, k, v, blocks, scale)[:, :, :row].transpose(1, 2).contiguous()


def branch_mask(prefix: int, branches: tuple[int, ...]) -> torch.Tensor:
    """bool [sum(branches), prefix + sum(branches)]: a branch token sees the prefix and its own branch up to itself."""
    branch = torch.repeat_interleave(torch.arange(len(branches)), torch.tensor(branches))
    own = (branch[:, None] == branch[None, :]).tril()
    return torch.cat([torch.ones(len(branch), prefix, dtype=torch.bool), own], 1)


def by_parts(query, key, value, groups: Groups, scale: float | None, dropout: float) -> torch.Tensor:
    """[1, n, H, D] by SDPA: a call for each prefix and one for the branches of each group."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    parts = []

    def attend(q: slice, kv: slice, **how):
        parts.append(scaled_dot_product_attention(query[:, :, q], key[:, :, kv], value[:, :, kv], scale=scale, dropout_p=dropout, **how))

    lengths = {end - start for start, end, _ in groups}
    if len(lengths) == 1 and not any(branches for _, _, branches in groups):  # equal plain sequences: one call for all of them
        fold = [t.unflatten(2, (len(groups), -1)).transpose(1, 2).squeeze(0) for t in (query, key, value)]  # [groups, H, length, D]
        folded = scaled_dot_product_attention(*fold, is_causal=True, scale=scale, dropout_p=dropout)
        return folded.transpose(1, 2).flatten(0, 1).unsqueeze(0).contiguous()
    for start, end, branches in groups:
        attend(slice(start, end), slice(start, end), is_causal=True)
        if branches:
            stop = end + sum(branches)
            attend(slice(end, stop), slice(start, stop), attn_mask=branch_mask(end - start, branches).to(query.device))
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


@torch.compiler.disable  # traced, a layout is a constant: rows of six layouts were compiled six times, for over a minute each
def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout: Layout | None = None, **kwargs):
    """query [1, H, n, D], key and value [1, H_kv, n, D] -> ([1, n, H, D], None), as AttentionInterface wants it."""
    if layout is None:
        raise ValueError(f"{NAME} needs layout=; use `plain_attention(model)` for ordinary rows")
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") or (window and window < layout.longest):
        raise ValueError(f"{NAME} has no soft cap and no sliding window shorter than a sequence, and this backbone asks for one")
    if query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        if layout.boundaries is not None and (kernel := variable_length_kernel()):
            q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
            return kernel(q, k, v, layout.boundaries, layout.longest, scaling)[None], None
        if layout.blocks is not None and (kernel := branch_kernel(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], scaling)):
            return by_kernel(kernel, query, key, value, layout.blocks, scaling), None
    return by_parts(query, key, value, layout.groups, scaling, dropout), None


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
