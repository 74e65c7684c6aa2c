"""`--train`: what moves, what stays bit for bit (also where ZeRO-3 holds parts of the weights), and the plain weights of what was trained."""

import copy
import math
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from toolkit.ecg.gains import GAIN_BINS
from toolkit.lm.lora import add_lora
from toolkit.lm.model import PackedLM
from toolkit.lm.trainable import choose_trainable, ecg_rows, merged_state
from toolkit.shards.packing import Group, Sequence, pack
from toolkit.tasks.vocabulary import ECGVocabulary

# text 0..9, start, end, 36 codes, an unused gap, 32 gain tokens, rows of padding
VOCABULARY, ROWS = ECGVocabulary(start=10, end=11, first=12, codes=36, gain_first=50), 96
SHAPE = dict(vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def llama(tied, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=tied, **SHAPE))


def row(seed=0):
    """Every token is an input and a target somewhere, so that without a hook every row of embedding and head would move."""
    ids = np.random.default_rng(seed).permutation(np.tile(np.arange(ROWS), 2)).reshape(6, 32)
    return pack([Group(Sequence(one, np.arange(32) > 0), []) for one in ids])


def step(model, optimizer, seed=0):
    PackedLM(model)(row(seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gains", [True, False])
def test_new_rows_moves_the_ecg_rows_alone(tied, gains):
    vocabulary = VOCABULARY if gains else replace(VOCABULARY, gain_first=None)
    before = llama(tied)
    model = choose_trainable(copy.deepcopy(before), vocabulary, "new_rows")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for seed in range(3):
        step(model, optimizer, seed)
    assert_only_rows_moved(before.state_dict(), model.state_dict(), set(range(10, 48)) | (set(range(50, 82)) if gains else set()))


def assert_only_rows_moved(before, after, rows):
    chosen = torch.zeros(ROWS, dtype=torch.bool)
    chosen[sorted(rows)] = True
    for name, weight in before.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            moved = (weight != after[name]).any(1)
            assert (moved == chosen).all(), name
        else:
            assert torch.equal(weight, after[name]), name


def test_new_rows_do_not_let_nan_of_other_rows_through():
    model = choose_trainable(llama(True), VOCABULARY, "new_rows")
    weight = model.get_input_embeddings().weight
    (weight * torch.full((ROWS, 1), math.nan).index_fill_(0, torch.tensor(ecg_rows(VOCABULARY)), 2.0)).sum().backward()
    expected = torch.zeros(ROWS, 1).index_fill_(0, torch.tensor(ecg_rows(VOCABULARY)), 2.0)
    assert torch.equal(weight.grad, expected.expand(-1, 32))


CASES = {  # how, stage, tied, bf16
    "sharded, bf16": ("new_rows", 3, False, True),
    "born sharded": ("new_rows", 3, True, False),
    "not sharded": ("new_rows", 2, True, False),
    "LoRA, born sharded": ("lora+norms+embeddings", 3, True, False),
    "LoRA, not sharded": ("lora+norms+embeddings", 0, True, False),
    "LoRA, born sharded, bf16": ("lora+norms+embeddings", 3, False, True),
}


def zero_rank(rank, port, folder):
    """One rank of real DeepSpeed runs, one a case: three steps, then the whole weights before and after, as plain ones, to a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 40 s to build, for inference alone
    deepspeed.init_distributed("gloo", verbose=False)
    for name in CASES:
        weights = train_three_steps(rank, name)
        if rank == 0:
            torch.save(weights, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def train_three_steps(rank, name):
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    how, stage, tied, bf16 = CASES[name]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    if stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "born" in name:
        kept = HfDeepSpeedConfig(config)
        model = AutoModelForCausalLM.from_config(llama(tied).config)
        del kept
        assert model.get_input_embeddings().weight.numel() == 0
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.load_state_dict(llama(tied).state_dict())
            before = {name: weight.clone() for name, weight in model.state_dict().items()}
    else:
        model = llama(tied).to(torch.bfloat16 if bf16 else torch.float32)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(1)
    module = PackedLM(choose_trainable(model, VOCABULARY, how))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if stage == 3:
        assert all(p.ds_tensor.numel() * 2 == p.ds_numel for p in module.parameters())  # halves, not whole weights
    engine.eval()  # no dropout, which differs between cases
    for number in range(6):
        engine.backward(engine(row(2 * number + rank)) / 186)
        engine.step()
    whole = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else module.state_dict()
    if rank:
        return None
    return before, {name: weight.clone() for name, weight in merged_state({n.removeprefix("lm."): w for n, w in whole.items()}, module.lm).items()}


@pytest.mark.launch
def test_on_two_ranks_under_zero(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(zero_rank, (port, tmp_path), nprocs=2)
    weights = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in CASES}
    for name, (before, after) in weights.items():
        if CASES[name][0] == "new_rows":
            before = {key: weight for key, weight in before.items() if key in after}  # no tied head
            assert_only_rows_moved(before, after, set(ecg_rows(VOCABULARY)))
    (before, sharded), (same, plain) = weights["LoRA, born sharded"], weights["LoRA, not sharded"]
    assert all(torch.equal(weight, same[name]) for name, weight in before.items())
    assert set(sharded) == set(plain) == set(before) - {"lm_head.weight"}
    for name, weight in plain.items():
        assert not torch.equal(weight, before[name]), name
        torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=0, msg=name)
    before, after = weights["LoRA, born sharded, bf16"]
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == torch.bfloat16 and after[name].isfinite().all() and not torch.equal(weight, after[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_releases_choice_of_trained_weights(tied):
    model = choose_trainable(llama(tied), VOCABULARY, "lora+norms+embeddings")
    adapted = {name.split(".")[-1]: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert set(adapted) == LINEAR
    assert all((m.r["default"], m.scaling["default"], m.lora_dropout["default"].p) == (64, 0.25, 0.05) for m in adapted.values())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    lora = {name for name in trained if ".lora_A." in name or ".lora_B." in name}
    full = {name.removeprefix("base_model.model.") for name in trained - lora}
    layers = {f"model.layers.{layer}.{norm}.weight" for layer in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")}
    assert len(lora) == 2 * 2 * 7
    assert full == {"model.embed_tokens.weight", "model.norm.weight"} | layers | ({"lm_head.weight"} if not tied else set())


def test_full_trains_everything():
    model = llama(True)
    assert choose_trainable(model, VOCABULARY, "full") is model and all(p.requires_grad for p in model.parameters())


def qwen(tied):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, tie_word_embeddings=tied, **SHAPE))  # q k v have a bias


def gpt2(tied):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tied))


@pytest.mark.parametrize(("make", "tied"), [(llama, True), (llama, False), (qwen, False), (gpt2, True)])
def test_merged_weights_are_those_of_peft_and_load_in_plain_transformers(make, tied, tmp_path):
    model = choose_trainable(make(tied), VOCABULARY, "lora+norms+embeddings")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))  # what training would do: lora_B is zero before it
    ids = torch.arange(ROWS).view(3, 32)
    expected = model.eval()(input_ids=ids, use_cache=False).logits
    state = {name: weight.clone() for name, weight in model.state_dict().items()}  # as gathered from ranks: a tied head is a tensor of its own
    merged = merged_state(state, model)

    oracle = copy.deepcopy(model).merge_and_unload().state_dict()
    assert set(oracle) - set(merged) == ({"lm_head.weight"} if tied else set()) and set(merged) <= set(oracle)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, oracle[name], atol=1e-6, rtol=0, msg=name)

    model.get_base_model().save_pretrained(tmp_path, state_dict=merged)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not isinstance(loaded, PeftModel) and (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert (loaded.eval()(input_ids=ids, use_cache=False).logits - expected).abs().max() < 1e-5
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)  # the trained model is left as it was


@pytest.mark.parametrize("tied", [True, False])
def test_merged_state_of_a_model_without_lora_is_its_own(tied, tmp_path):
    model = llama(tied)
    merged = merged_state({name: weight.clone() for name, weight in model.state_dict().items()}, model)
    assert ("lm_head.weight" in merged) == (not tied)
    model.save_pretrained(tmp_path, state_dict=merged)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_lora_is_merged_in_float32_and_cast_back():
    model = add_lora(llama(True).bfloat16(), 4, 8, 0.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    state, name = model.state_dict(), "model.layers.0.self_attn.q_proj"
    weight, up, down = (state[f"base_model.model.{name}.{part}.weight"].double() for part in ("base_layer", "lora_B.default", "lora_A.default"))
    merged = merged_state(state, model)[f"{name}.weight"]
    exact = weight + 2 * up @ down
    assert merged.dtype == torch.bfloat16 and ((merged.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()  # one rounding to 8 bits


def test_gain_rows_are_all_bins():
    assert len(ecg_rows(VOCABULARY)) == 2 + 36 + GAIN_BINS == len(set(ecg_rows(VOCABULARY)))
