"""A packed row against the same sequences computed one by one with transformers' own attention."""

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from toolkit.errors import UserError
from toolkit.lm import attention
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import Group, Sequence, pack

SHAPE = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
BACKBONES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, **SHAPE)),
    "llama, grouped heads, tied": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SHAPE)),
}


def sequence(rng, n, first_may_be_target):
    target = rng.random(n) < 0.6
    target[0] = target[0] and first_may_be_target
    target[-1] = True
    return Sequence(rng.integers(0, 97, n), target)


def make_groups(branches: bool):
    rng = np.random.default_rng(0)
    lengths = (31, 31, 31) if not branches else (31, 17, 23)
    return [Group(sequence(rng, n, False), [sequence(rng, m, True) for m in ((5, 9, 3) if branches else ())]) for n in lengths]


@pytest.fixture(params=BACKBONES, scope="module")
def model(request):
    torch.manual_seed(0)
    model = BACKBONES[request.param]().eval()
    model.set_attn_implementation(attention.NAME)
    return model


def one_by_one(model, groups):
    """Logits at every target in the order of `pack`, each prefix + branch as a row of its own, with plain SDPA."""
    out = []
    with attention.plain_attention(model):
        for group in groups:
            for k, part in enumerate([group.prefix, *group.branches]):
                before = [] if k == 0 else group.prefix.ids
                ids = torch.from_numpy(np.concatenate([before, part.ids]).astype(np.int64))[None]
                logits = model(input_ids=ids, use_cache=False).logits[0]
                out.append(logits[len(before) - 1 + np.flatnonzero(part.target)])
    return torch.cat(out)


@pytest.mark.parametrize("branches", [False, True])
def test_logits_equal_those_of_each_sequence_alone(model, branches):
    groups = make_groups(branches)
    with torch.no_grad():
        difference = PackedLM(model)(pack(groups), logits=True) - one_by_one(model, groups)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_those_of_each_sequence_alone(model, checkpointing):
    groups = make_groups(True)
    row = pack(groups)
    torch.nn.functional.cross_entropy(one_by_one(model, groups), torch.from_numpy(row.targets), reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    PackedLM(model)(row).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model.eval()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)  # sums of 60 losses


def test_another_group_or_branch_is_never_seen(model):
    """Changing one branch moves no logit of any other."""
    groups = make_groups(True)
    with torch.no_grad():
        before = PackedLM(model)(pack(groups), logits=True)
        groups[1].branches[1].ids[:] = (groups[1].branches[1].ids + 1) % 97
        after = PackedLM(model)(pack(groups), logits=True)
    counts = [int(s.target.sum()) for g in groups for s in (g.prefix, *g.branches)]
    changed = [bool((b != a).any()) for b, a in zip(before.split(counts), after.split(counts))]
    assert changed == [False] * 6 + [True] + [False] * 5


def test_an_architecture_that_would_ignore_the_layout_is_refused():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="--backbone: BloomForCausalLM"):
        attention.use_packed_attention(bloom)


def test_a_sliding_window_shorter_than_a_sequence_is_refused():
    windowed = MistralForCausalLM(MistralConfig(num_key_value_heads=4, sliding_window=16, **SHAPE))
    attention.use_packed_attention(windowed)
    with pytest.raises(ValueError, match="sliding window"):
        PackedLM(windowed)(pack(make_groups(False)))


def test_packed_attention_without_a_layout_is_an_error(model):
    with pytest.raises(ValueError, match="needs layout"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
