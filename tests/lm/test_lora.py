"""LoRA, rows and norms beside it: what is trained, also under ZeRO on two ranks, and the adapter's file, which plain PEFT loads."""

import copy
import os
import socket

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from toolkit.errors import UserError
from toolkit.lm.lora import add_lora, save_adapter, unmoved
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import Group, Sequence, pack

VOCABULARY, TRAINED = 96, range(40, 60)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}
BESIDE = [{}, {"trained_rows": TRAINED}, {"norms": True}, {"trained_rows": [3, 50], "norms": True}]


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=tied, **shape))


def row(seed=0):
    """Every token is an input and a target somewhere."""
    ids = np.random.default_rng(seed).permutation(np.tile(np.arange(VOCABULARY), 2)).reshape(6, 32)
    return pack([Group(Sequence(one, np.arange(32) > 0), []) for one in ids])


def lora(model, **more) -> PeftModel:
    torch.manual_seed(1)
    return add_lora(model, rank=4, alpha=8, dropout=0.0, **more)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def steps(model, rows, lr=1e-2) -> list[float]:
    """Plain torch: a step of AdamW on each list of rows; the mean losses before them."""
    packed, losses = PackedLM(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for some in rows:
        loss = sum(packed(one) for one in some) / sum(len(one.targets) for one in some)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(VOCABULARY).view(3, 32), use_cache=False).logits


def adapted(model) -> set[str]:
    return {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("tied", [True, False])
def test_lora_is_where_it_is_asked_for(tied):
    assert adapted(lora(llama(tied))) == LINEAR
    assert adapted(lora(llama(tied), targets=["q_proj", "mlp.up_proj"])) == {"q_proj", "up_proj"}
    assert adapted(lora(llama(tied), targets=["q_proj", "all-linear"])) == LINEAR


@pytest.mark.parametrize("unknown", ["lm_head", "proj", "c_attn", "embed_tokens"])  # the head stays as it is: the loss takes its weight
def test_unknown_targets_are_named_with_those_there_are(unknown):
    with pytest.raises(UserError, match=f"--lora_targets: no layer is called '{unknown}'; this backbone has q_proj, .*down_proj, or say all-linear"):
        lora(llama(False), targets=["q_proj", unknown])


def test_linear_layers_of_gpt2_are_known():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    assert adapted(lora(model, targets=["c_attn"], trained_rows=TRAINED, norms=True)) == {"c_attn"}
    steps(model, [[row()]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_nothing_else_moves(tied, beside):
    before = llama(tied)
    model = lora(copy.deepcopy(before), **beside)
    steps(model, [[row(0)], [row(1)]])
    after = model.merge_and_unload()
    rows = torch.zeros(VOCABULARY, dtype=torch.bool)
    rows[list(beside.get("trained_rows", []))] = True
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == tied
    for name, weight in before.state_dict().items():
        moved, kind = weight != after.state_dict()[name], name.split(".")[-2]
        if kind in ("embed_tokens", "lm_head"):
            assert torch.equal(moved.any(1), rows), name
        else:
            assert moved.any() == (kind in LINEAR or (kind in NORMS and "norms" in beside)), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_an_adapter_loads_with_plain_peft(tied, beside, tmp_path):
    base = llama(tied)
    base.save_pretrained(tmp_path / "base")
    model = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **beside)
    steps(model, [[row(0)], [row(1)]])
    save_adapter(model, tmp_path / "adapter", trained(model))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(w.numel() for w in saved.values()) == sum(w.numel() for w in trained(model).values())
    assert all(".lora_" in name or "trainable_tokens_delta" in name or name.split(".")[-2] in NORMS for name in saved)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    model.get_base_model().set_attn_implementation("sdpa")
    assert torch.equal(logits(loaded), logits(model)) and not torch.allclose(logits(loaded), logits(base), atol=1e-3)


@pytest.mark.parametrize("lose", ["self_attn.q_proj.lora_B", "trainable_tokens_delta", "input_layernorm"])
@pytest.mark.parametrize("empty", [True, False])
def test_an_adapter_that_lacks_a_weight_is_not_saved(lose, empty, tmp_path):
    model = lora(llama(True), trained_rows=TRAINED, norms=True)
    state = trained(model)
    name = next(name for name in state if lose in name)
    if empty:
        state[name] = torch.empty(0)  # as ZeRO-3 leaves it
    else:
        del state[name]
    with pytest.raises(RuntimeError, match=f"1 of its {len(trained(model))} weights are missing or empty: {name}$"):
        save_adapter(model, tmp_path / "adapter", state)
    assert not (tmp_path / "adapter").exists()


def test_unmoved_names_what_the_optimizer_did_not_reach():
    model = lora(llama(True))
    zero = {name for name, _ in model.named_parameters() if "lora_B" in name}
    assert set(unmoved(model)) == zero and len(zero) == 14
    left = next(p for name, p in model.named_parameters() if name.endswith("1.mlp.up_proj.lora_B.default.weight"))
    left.requires_grad_(False)
    steps(model, [[row()]])
    assert [name.removeprefix("base_model.model.model.") for name in unmoved(model)] == ["layers.1.mlp.up_proj.lora_B.default.weight"]
    left.requires_grad_(True)
    steps(model, [[row()]])
    assert unmoved(model) == []


CASES = {"ZeRO-2, tied": (2, True, False), "ZeRO-2": (2, False, False), "ZeRO-3, tied": (3, True, False), "ZeRO-3": (3, False, False), "bf16": (3, True, True)}
STEPS = 4


def zero_rank(rank, port, folder):
    """One rank of real DeepSpeed runs, one a case; rank 0 saves losses, trained weights and adapter."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    from toolkit.training.distributed import start

    ranks = start()
    for name in CASES:
        found = train_under_zero(ranks, name, folder)
        if ranks.main:
            torch.save(found, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def train_under_zero(ranks, case, folder):
    import deepspeed

    from toolkit.training.distributed import sum_over_ranks
    from toolkit.training.zero3 import _load_sharded, whole_state

    stage, tied, bf16 = CASES[case]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    base = folder / f"tied {tied}"
    model = _load_sharded(base, config) if stage == 3 else AutoModelForCausalLM.from_pretrained(base)
    assert (model.get_input_embeddings().weight.numel() == 0) == (stage == 3)
    model = lora(model, trained_rows=TRAINED, norms=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=PackedLM(model), optimizer=optimizer, config=config)
    losses, moved = [], []
    for number in range(STEPS):
        moved.append(unmoved(model))
        one = row(2 * number + ranks.rank)
        loss = engine(one)
        engine.backward(loss / len(one.targets))  # both ranks have as many targets
        engine.step()
        losses.append(sum_over_ranks([loss.item()], ranks.device)[0] / (2 * len(one.targets)))
    state = whole_state(model, ranks, trained_only=True)
    if ranks.main:
        save_adapter(model, folder / case, state)
    return losses, state, moved


@pytest.mark.launch
def test_two_ranks_under_zero_train_what_one_process_trains(tmp_path):
    for tied in (True, False):
        llama(tied).save_pretrained(tmp_path / f"tied {tied}")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(zero_rank, (port, tmp_path), nprocs=2)
    for case, (_, tied, bf16) in CASES.items():
        losses, state, moved = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        alone = lora(llama(tied), trained_rows=TRAINED, norms=True)
        before = trained(alone)
        expected = steps(alone, [[row(2 * number), row(2 * number + 1)] for number in range(STEPS)])
        assert losses == pytest.approx(expected, abs=0.02 if bf16 else 1e-5), case
        assert [len(names) for names in moved] == [14, 0, 0, 0], case
        assert set(state) == set(before), case
        for name, weight in trained(alone).items():
            assert state[name].isfinite().all() and not torch.equal(state[name].float(), before[name]), f"{case}: {name}"
            if not bf16:  # there AdamW turns small gradients around
                torch.testing.assert_close(state[name], weight, atol=1e-5, rtol=0, msg=f"{case}: {name}")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / f"tied {tied}"), tmp_path / case)
        alone.get_base_model().set_attn_implementation("sdpa")
        if not bf16:
            torch.testing.assert_close(logits(loaded), logits(alone), atol=1e-4, rtol=0, msg=case)
