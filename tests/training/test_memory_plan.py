"""Memory by formula against what a real DeepSpeed engine holds on each of two ranks, and what autograd really keeps."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from toolkit.errors import UserError
from toolkit.lm.kernels import linear_cross_entropy
from toolkit.training.memory_plan import activation_bytes, layer_bytes, loss_bytes, peak_bytes, state_bytes

SHAPE = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
HOLDING = """
import gc, json, multiprocessing, os, sys, torch, deepspeed
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

def held():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

def hold(rank, port, shape, stage, bf16, offload):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.model.embed_tokens.weight.requires_grad_(False)
    small = {"reduce_bucket_size": 4096, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 4096, "stage3_max_live_parameters": 0}
    zero = {"stage": stage, **small, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16}, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    if stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(2):
        ids = torch.randint(0, 500, (1, 16))
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        if step == 0:
            engine.step()
    if rank == 0:
        print("held", json.dumps([[stage, bf16, offload], held()]), flush=True)
    dist.barrier()
    os._exit(0)

made = json.loads(sys.argv[1])
for number, case in enumerate(made["cases"]):
    ranks = [multiprocessing.get_context("fork").Process(target=hold, args=(rank, 29561 + number, made["shape"], *case)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
"""


@pytest.mark.launch
def test_the_state_of_an_engine(tmp_path):
    """Bytes after a backward pass, when the optimizer's moments are there; the embedding is frozen."""
    cases = [(1, True, False), (2, True, False), (3, True, False), (2, True, True), (3, True, True)]
    script = tmp_path / "holding.py"
    script.write_text(HOLDING)
    argument = json.dumps({"cases": cases, "shape": SHAPE})
    run = subprocess.run([sys.executable, script, argument], capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}, timeout=300)
    held = dict((tuple(case), size) for case, size in (json.loads(line[5:]) for line in run.stdout.splitlines() if line.startswith("held ")))
    assert set(held) == set(cases), run.stderr[-3000:]
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    total = sum(p.numel() for p in model.parameters())
    trained = total - model.model.embed_tokens.weight.numel()
    for (stage, bf16, offload), measured in held.items():
        zero = {"stage": stage, "offload_optimizer": offload, "offload_param": offload and stage == 3}
        state = state_bytes(zero, total, trained, 2, bf16)
        planned = state.weights + state.gradients + state.optimizer + state.host
        assert planned == pytest.approx(measured, rel=0.08 if offload else 0.04), (stage, bf16, offload)


def test_parts_by_hand():
    """Of a model of 1,000 weights on 4 ranks, the largest of 50: what is kept from one micro-batch to the next, and what is there for a moment, is counted."""
    full = state_bytes({"stage": 0}, 1000, 1000, 4, True, 50)
    assert (full.weights, full.gradients, full.optimizer, full.kept, full.transient) == (2000, 2000, 4000 + 8000, 0, 4000)  # fp32 gradients for the step
    wide = state_bytes({"stage": 0}, 1000, 1000, 4, False, 50, accumulates=True)
    assert (wide.weights, wide.gradients, wide.optimizer, wide.kept, wide.transient) == (4000, 4000, 8000, 4000, 4000)  # laid end to end to be sent
    one = state_bytes({"stage": 1, "reduce_bucket_size": 10}, 1000, 1000, 4, False, 50)
    assert (one.weights, one.gradients, one.optimizer, one.buffers, one.kept, one.transient) == (4000, 4000, 3000, 40, 0, 1000)
    sums = state_bytes({"stage": 1, "reduce_bucket_size": 10}, 1000, 1000, 4, True, 50)
    assert (sums.weights, sums.gradients, sums.optimizer, sums.buffers, sums.kept, sums.transient) == (2000, 6000, 3000, 0, 4000, 4000 + 2000)
    two = state_bytes({"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10}, 1000, 600, 4, True, 50)
    assert (two.weights, two.gradients, two.optimizer, two.buffers, two.host) == (2000, 600, 1800, 40, 0)
    assert (two.kept, two.transient) == (0, 300 + 2 * 100)  # its part of the gradients in bf16, and two of the largest
    assert two.begun == 600 + 100  # its part of the sums, and the head's gradient
    assert state_bytes({"stage": 2}, 1000, 600, 4, True, 500).transient == 300 + 2 * 1000
    assert state_bytes({"stage": 2}, 1000, 600, 1, True, 500).transient == 8 * 500  # the norm of the largest, in fp64
    assert state_bytes({"stage": 2}, 1000, 600, 4, True, 50, accumulates=True).kept == 600
    three = state_bytes({"stage": 3, "reduce_bucket_size": 10}, 1000, 600, 4, True, 50)
    assert (three.weights, three.gradients, three.optimizer, three.buffers) == (500, 600, 1800, 20 + 2000)
    assert (three.kept, three.transient) == (600, 600)
    away = state_bytes(
        {"stage": 3, "reduce_bucket_size": 10, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 1000, 600, 4, True, 50
    )
    assert (away.weights, away.gradients, away.optimizer, away.host, away.transient) == (0, 0, 0, 500 + 1800 + 2 * 600, 200)


def test_the_most_at_a_time_is_activations_or_gradients():
    state = state_bytes({"stage": 2, "reduce_bucket_size": 10}, 1000, 1000, 2, True, 50, accumulates=True)
    fixed = 2000 + 6000 + 20
    assert (state.gradients, state.kept, state.transient) == (2000, 2000, 1000 + 200)
    assert peak_bytes(state, 500, 300) == fixed + 2000 + 1000 + 200
    assert peak_bytes(state, 5000, 300) == fixed + 2000 + 5300
    state.kept = 0  # a single micro-batch
    assert peak_bytes(state, 5000, 300) == fixed + 2000 + 100 + 5000


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_activations_are_what_autograd_keeps_of_a_real_row(kv_heads):
    """On the meta device against a real forward pass."""
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": kv_heads})
    model, n, kept = LlamaForCausalLM(config), 200, {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.get_decoder()(torch.zeros(1, n, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    with torch.device("meta"):
        bare = LlamaForCausalLM(config)
    assert out and 4 * layer_bytes(bare, n) == pytest.approx(real, rel=0.02)


def test_gradient_checkpointing_by_hand():
    assert activation_bytes(100, 28, 3, "none") == 2800
    assert activation_bytes(100, 28, 3, "full") == 28 * 3 + 100
    assert activation_bytes(100, 28, 3, "every_3") == 19 * 100 + 9 * 3 + 100
    for how in ("half", "every_0", "every_", "every_x", "0"):
        with pytest.raises(UserError, match="--gradient_checkpointing: .* is none of none, full, every_N"):
            activation_bytes(100, 28, 3, how)


@pytest.mark.parametrize("trained", [True, False])
def test_the_loss_never_holds_more_than_planned(trained):
    """The bytes of what the loss makes, largest at any time, counted by a memory profile of the real one."""
    rows, width, m = 3000, 64, 1100  # two chunks and a bit
    hidden, weight = torch.randn(m, width, requires_grad=True), torch.randn(rows, width, requires_grad=trained)
    targets = torch.randint(0, rows, (m,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, targets).backward()
    held = peak = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    planned = loss_bytes(rows, width, trained, bf16=False)
    assert 0.9 * planned < peak < 1.05 * planned + 2 * m * width * 4  # and the gradient of the hidden states
