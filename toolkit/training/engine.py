"""The DeepSpeed engine, and one optimizer step on it."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from toolkit.shards.order import Data, MicroBatch
from toolkit.training import checkpoint
from toolkit.training.arguments import TrainingArguments
from toolkit.training.distributed import Ranks, sum_over_ranks
from toolkit.training.heartbeat import mark


@dataclass
class Taken:
    """What an optimizer step did: the mean loss over the global batch, the norm of its gradients before clipping, whether it changed the weights."""

    loss: float
    grad_norm: float
    applied: bool
    keys: list[str]  # of the samples whose loss is not finite; of all samples of the step if it was skipped and none is to blame
    forward: float | None  # seconds that a GPU took for the forward passes; None on a CPU


def build_engine(model: torch.nn.Module, args: TrainingArguments, config: dict):
    """`deepspeed.initialize` with torch's own fused AdamW (DeepSpeed's fused ones compile for a minute on the first run). Every step sets its rate."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrix = lambda p: len(getattr(p, "ds_shape", p.shape)) >= 2  # a parameter born sharded has no shape of its own
    groups = [
        {"params": [p for p in trainable if matrix(p)], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if not matrix(p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for moments in engine.basic_optimizer.state.values():
        moments["step"].zero_()  # at stage 0 in bf16 DeepSpeed makes the moments by a step without gradients and counts it: the first was 0.73 of AdamW's
    checkpoint.watch_files(engine)
    engine.clip_fp32_gradients = lambda: None  # of ZeRO stage 0, which `take_step` does: DeepSpeed's fails where a step has no gradients
    return engine


def take_step(
    engine, loss: Callable, micro: list[MicroBatch], targets: float, ranks: Ranks, data: Data, samples: list[list[int]], seed: tuple[int, int]
) -> Taken:
    """Collective. Forward, backward and update over the micro-batches of this rank; `targets` are those of the global batch.

    seed: (of the run, step), what dropout is drawn from. A step whose gradients are not finite changes no weight at any ZeRO stage.
    """
    summed = torch.zeros(len(micro), device=ranks.device)
    own_norm, events = None, []
    for k, batch in enumerate(micro):
        _seed_dropout(*seed, k * ranks.world + ranks.rank)
        mark("forward/backward")
        events.append(_event(ranks.device))
        value = loss(engine, batch.inputs)
        events.append(_event(ranks.device))
        engine.backward(value * (ranks.world * len(micro) / targets))  # DeepSpeed divides by ranks and micro-batches
        if k == len(micro) - 1 and engine.optimizer is engine.basic_optimizer:
            own_norm = _clip(engine.module, engine.gradient_clipping())  # ZeRO stage 0 in fp32: DeepSpeed would step on what is not finite
        mark("step")
        engine.step()
        summed[k] = value.detach()
    mean = sum_over_ranks([summed.sum().item()], ranks.device)[0] / targets
    norm = own_norm if own_norm is not None else float(engine.get_global_grad_norm())
    applied = engine.was_step_applied() and (own_norm is None or math.isfinite(own_norm))
    keys = [] if applied and math.isfinite(mean) else _suspects(data, samples, summed.isfinite().tolist(), ranks)
    forward = sum(begun.elapsed_time(ended) for begun, ended in zip(events[::2], events[1::2])) / 1e3 if events[0] else None
    return Taken(mean, norm, applied, keys, forward)


def _event(device: torch.device):
    """A mark in the work of a GPU, with its time; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _clip(module: torch.nn.Module, max_norm: float) -> float:
    """Norm of the averaged gradients, the same on every rank, and clip them; drops them if it is not finite, so that AdamW passes over all parameters."""
    held = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in held])
    if not norm.isfinite():
        for p in held:
            p.grad = None
    elif max_norm:
        torch.nn.utils.clip_grads_with_norm_(held, max_norm, norm)
    return norm.item()


def _suspects(data: Data, samples: list[list[int]], finite: list[bool], ranks: Ranks) -> list[str]:
    """Collective. Keys of the samples in micro-batches without a finite loss, or of all if there is no such micro-batch."""
    every: list = [None] * ranks.world
    dist.all_gather_object(every, [([data.key(i) for i in part], good) for part, good in zip(samples, finite)])
    parts = [part for of_rank in every for part in of_rank]
    bad = [key for keys, good in parts if not good for key in keys]
    return bad or [key for keys, _ in parts for key in keys]


def learning_rate(args: TrainingArguments, step: int, last: int) -> float:
    """Linear warm-up that starts above zero, then half a cosine to zero."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - args.warmup_steps) / max(1, last - args.warmup_steps)))


def set_learning_rate(engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _seed_dropout(seed: int, step: int, number: int) -> None:
    """From the micro-batch's place in the global batch: a resumed run needs no stored generator state, and other ranks with as large micro-batches draw
    the same."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {number}".encode()).digest()[:7], "little"))
