"""FlexAttention's view of a row with branches, as far as a CPU can tell: its forward runs there, uncompiled or through dynamo, its backward does not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from toolkit.lm import attention

CPU = torch.device("cpu")
SHAPES = st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(1, 60), max_size=5)), min_size=1, max_size=3)


def laid_out(shapes) -> list:
    """Groups end to end of (tokens of the prefix, tokens of each branch)."""
    groups, at = [], 0
    for prefix, branches in shapes:
        groups.append((at, at + prefix, tuple(branches)))
        at += prefix + sum(branches)
    return groups


def brute_force(groups, n: int) -> torch.Tensor:
    """bool [n, n], pair by pair of sequences; what lies beyond the row is a sequence of its own."""
    seen = np.zeros((n, n), bool)
    end_of_row = 0
    for start, end, branches in groups:
        seen[start:end, start:end] = np.tri(end - start)
        at = end
        for length in branches:
            seen[at : at + length, start:end] = True
            seen[at : at + length, at : at + length] = np.tri(length)
            at += length
        end_of_row = at
    seen[end_of_row:, end_of_row:] = np.tri(n - end_of_row)
    return torch.from_numpy(seen)


def qkv(n: int, heads: int = 3, kv_heads: int = 1, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(1, n, h, size, generator=generator).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]


def dense(q, k, v, blocks, scale):
    """Differentiable, what flex_attention does: the mask function on every pair."""
    at = torch.arange(blocks.shape[-1])
    return scaled_dot_product_attention(q, k, v, attn_mask=blocks.mask_mod(0, 0, at[:, None], at), scale=scale, enable_gqa=True)


def causal(q, k, v, blocks, scale):
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_mask_and_blocks_equal_brute_force(shapes):
    groups = laid_out(shapes)
    blocks = attention.block_mask(groups, CPU)
    n = blocks.shape[-1]
    row = groups[-1][1] + sum(groups[-1][2])
    assert n % attention.BLOCK == 0 and 0 <= n - row < attention.BLOCK
    truth, at = brute_force(groups, n), torch.arange(n)
    assert torch.equal(blocks.mask_mod(0, 0, at[:, None], at), truth)
    by_torch = create_block_mask(lambda b, h, q, k: truth[q, k], None, None, n, n, device="cpu")  # forward's lists, and backward's
    for of_keys in ("kv", "full_kv", "q", "full_q"):
        counts, order = (getattr(blocks, f"{of_keys}_{what}")[0, 0] for what in ("num_blocks", "indices"))
        expected_counts, expected_order = (getattr(by_torch, f"{of_keys}_{what}")[0, 0] for what in ("num_blocks", "indices"))
        assert torch.equal(counts, expected_counts)
        assert all(torch.equal(a[:c], b[:c]) for a, b, c in zip(order, expected_order, counts.tolist()))


@settings(max_examples=8, deadline=None)
@given(SHAPES)
def test_flex_forward_equals_sdpa_by_parts_and_a_dense_mask(shapes):
    groups = laid_out(shapes)
    row = groups[-1][1] + sum(groups[-1][2])
    q, k, v = qkv(row)
    found = attention.by_kernel(attention.by_blocks, q, k, v, attention.block_mask(groups, CPU), None)
    masked = scaled_dot_product_attention(q, k, v, attn_mask=brute_force(groups, row), enable_gqa=True).transpose(1, 2)
    assert found.shape == (1, row, 3, 8)
    torch.testing.assert_close(found, masked, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(attention.packed_attention(None, q, k, v, None, layout=attention.Layout.of(groups, CPU))[0], masked, atol=2e-6, rtol=1e-5)


def test_rows_of_all_lengths_are_compiled_twice():
    """Those of one block, then all others, each of another layout; so also after them one of one block. What inductor makes of the graphs needs a GPU."""
    graphs, rng = [], np.random.default_rng(0)
    kernel = torch.compile(attention.by_blocks, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    longer = [[(int(rng.integers(150, 400)), rng.integers(1, 60, int(rng.integers(0, 7))).tolist()) for _ in range(1 + number % 3)] for number in range(6)]
    for shapes in ([(70, [20, 3])], *longer, [(41, [8]), (33, [9])]):
        groups = laid_out(shapes)
        q, k, v = qkv(groups[-1][1] + sum(groups[-1][2]))
        found = torch.compiler.disable(attention.by_kernel)(kernel, q, k, v, attention.block_mask(groups, CPU), 0.25)  # as packed_attention calls it
        torch.testing.assert_close(found, attention.by_parts(q, k, v, groups, 0.25, 0.0), atol=2e-6, rtol=1e-5)
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_of_a_kernel_passes_a_right_one_alone(dtype):
    check = lambda kernel: attention.disagreement(kernel, CPU, dtype, 2, 1, 8, 0.25)
    assert check(dense) < (1e-5 if dtype == torch.float32 else 0.02)
    assert check(causal) > 0.05
    assert not check(lambda q, k, v, blocks, scale: dense(q, k, v, blocks, scale) * torch.nan) < 0.05
    assert check(lambda q, k, v, blocks, scale: dense(q, k, v, blocks, 0.2)) > 0.05  # another scale
    assert check(lambda q, k, v, blocks, scale: dense(q, k.detach() + 0 * k, v, blocks, scale)) > 0.05  # right forward, no gradient


def test_the_check_leaves_no_trace_in_a_checkpointed_layer():
    """It runs in the first forward and not when that is computed again; dropout's generator stands where it stood."""
    calls = []

    def layer(x):
        if not calls:
            calls.append(attention.disagreement(dense, CPU, torch.float32, 2, 1, 8, None))
        return torch.nn.functional.dropout(x * x, 0.5)

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        x = torch.arange(8.0, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        return x.grad

    assert torch.equal(gradient(), gradient()) and len(calls) == 1 and calls[0] < 1e-5
    calls.clear()
    with torch.no_grad():  # the first row may be one of validation
        layer(torch.ones(2))
    assert calls[0] < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_attention_on_a_gpu():
    kernel = attention.branch_kernel(torch.device("cuda:0"), torch.bfloat16, 24, 8, 128, 128**-0.5)
    groups = laid_out([(313, [22] * 23), (313, []), (313, [20] * 23)])
    row = groups[-1][1] + sum(groups[-1][2])
    q, k, v = (t.to("cuda", torch.bfloat16) for t in qkv(row, 24, 8, 128))
    found, _ = attention.packed_attention(None, q, k, v, None, scaling=128**-0.5, layout=attention.Layout.of(groups, q.device))
    assert kernel is not None
    torch.testing.assert_close(found, attention.by_parts(q, k, v, groups, 128**-0.5, 0.0), atol=0.02, rtol=0.02)
