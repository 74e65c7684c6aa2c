"""The training loop over `deepspeed.initialize`, the same for tokenizer, pretraining and instruction tuning.

A step draws all its micro-batches first, so that the summed loss is divided by the number of targets in the *global* batch: the gradient
is that of the mean over all targets, however ranks and accumulation cut the batch.
"""

import hashlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from toolkit.errors import UserError
from toolkit.files import run_folder, write_text
from toolkit.shards.order import Data, MicroBatch, micro_batches, sample_at
from toolkit.training import checkpoint, ds_config, early_stopping
from toolkit.training.arguments import TrainingArguments, as_record
from toolkit.training.distributed import Ranks, bf16_is_fast, sum_over_ranks
from toolkit.training.log import RunLog

RESULTS = "train_results.json"  # written last: a run folder that holds it is complete
FREE = {
    "output_dir", "deepspeed", "logging_steps", "eval_steps", "max_eval_samples", "save_steps", "save_total_limit", "max_steps", "num_train_epochs",
    "shard_cache", "shard_cache_gb", "on_bad_shard", "bad_shard_budget",
}  # fmt: skip


@dataclass
class Job:
    """What differs between the trainers. `loss` sums over targets; `evaluate` is called on all ranks, `sample` and `export` on rank 0."""

    model: torch.nn.Module
    data: Data
    loss: Callable[[Any, Any], torch.Tensor]
    evaluate: Callable[[Any], dict[str, float]]
    export: Callable[[torch.nn.Module, Path], None]
    identity: dict  # digests of what the run is made from; a resumed run must have the same
    sample: Callable[[Any], str] | None = None
    bf16: bool = True  # False: DeepSpeed keeps the weights in float32 whatever --precision says
    watch: str = "eval_loss"  # what --early_stopping_patience looks at; smaller is better


def train(args: TrainingArguments, job: Job, ranks: Ranks, description: str) -> dict:
    """Train to the last step, from the newest checkpoint if there is one; returns (and writes) the final metrics."""
    folder = Path(args.output_dir)
    bf16 = job.bf16 and (args.precision == "bf16" or (args.precision == "auto" and bf16_is_fast()))
    config = ds_config.resolve(args.deepspeed, args, ranks.world, bf16)
    global_batch = config["train_batch_size"]
    last = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * len(job.data) / global_batch)
    # what a resumed run must share with its checkpoint: all but what only says when to look, and where
    identity = {name: value for name, value in as_record(args).items() if name not in FREE}
    if args.early_stopping_patience:  # another validation would judge by another measure, more often or more rarely
        identity |= {"eval_steps": args.eval_steps, "max_eval_samples": args.max_eval_samples}
    identity |= {**job.identity, "steps": last, "bf16": bf16, "ranks": ranks.world, "ZeRO stage": config.get("zero_optimization", {}).get("stage", 0)}

    results = json.loads((folder / RESULTS).read_text()) if (folder / RESULTS).is_file() else None
    state = results or checkpoint.newest(folder) or {"step": 0, "samples": 0, "seconds": 0.0, "identity": identity}
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            was = state["identity"].get(name)
            raise UserError(f"--output_dir: {folder} holds a run with {name} {was}, not {value}; resume it with the same, or name a new folder")
    if results:
        if ranks.main:
            early_stopping.sweep(folder, complete=True)
            print(f"{folder} is complete already: {results['steps']} steps")
        return results
    if ranks.main:
        run_folder(folder)
        write_text(folder / "arguments.json", json.dumps(as_record(args), indent=2))
        write_text(folder / "ds_config.json", json.dumps(config, indent=2))

    engine = build_engine(job.model, args, config)
    first = state["step"]
    if first:
        checkpoint.load(engine, folder, state)
    log = RunLog(folder, first, last, description) if ranks.main else None

    batches = _prefetch(_steps(job.data, args, ranks, state["samples"], last - first))
    clock, seconds, interval, best, stopped = time.perf_counter(), state["seconds"], _Interval(), state.get("best"), state.get("stopped", False)
    for step in range(first, first if stopped else last):
        step_started = time.perf_counter()
        micro = next(batches)
        targets, tokens, ecgs = sum_over_ranks([sum(getattr(m, n) for m in micro) for n in ("targets", "tokens", "ecgs")], ranks.device)
        _set_learning_rate(engine, _learning_rate(args, step, last))
        _seed_step(args.seed, step, ranks.rank)
        summed = torch.zeros((), device=ranks.device)
        for batch in micro:
            loss = job.loss(engine, batch.inputs)
            engine.backward(loss * (ranks.world * len(micro) / targets))  # DeepSpeed divides by ranks and micro-batches
            engine.step()
            summed += loss.detach()
        loss_value = sum_over_ranks([summed.item()], ranks.device)[0] / targets
        if not math.isfinite(loss_value):
            raise UserError(f"the loss of step {step + 1} is {loss_value}: lower --learning_rate and name a new --output_dir")
        interval.add(loss_value, tokens, ecgs, time.perf_counter() - step_started)
        done = step + 1
        samples = state["samples"] + global_batch
        if log:
            log.bar.update()
        if args.eval_steps and done % args.eval_steps == 0 and done != last:
            metrics = _evaluate(job, engine, log, done)
            if args.early_stopping_patience:
                best = early_stopping.better(best, metrics, job.watch, done)
                if ranks.main and best["step"] == done:
                    job.export(engine.module, early_stopping.path_of(folder, best))
                stopped = done - best["step"] >= args.early_stopping_patience * args.eval_steps
        if done % args.logging_steps == 0 or done == last or stopped:
            norm = engine.get_global_grad_norm()
            values = {"loss": interval.loss, "learning_rate": _learning_rate(args, step, last), "grad_norm": None if norm is None else float(norm)}
            if log:
                log.line(done, {**values, **interval.speed()})
            interval = _Interval()
        state = {"step": done, "samples": samples, "seconds": seconds + time.perf_counter() - clock, "identity": identity, "best": best, "stopped": stopped}
        if done % args.save_steps == 0 or done == last or stopped:
            checkpoint.save(engine, folder, state, args.save_total_limit)
            if ranks.main:
                early_stopping.sweep(folder)
        if stopped:
            break

    return _finish(job, engine, log, folder, state)


def _finish(job: Job, engine, log: RunLog | None, folder: Path, state: dict) -> dict:
    """Collective. The last validation, the exported model (with early stopping the best one) and train_results.json, which it returns."""
    final = best = state.get("best")
    if not state.get("stopped"):  # else it was validated when it stopped
        metrics = _evaluate(job, engine, log, state["step"])
        final = early_stopping.better(best, metrics, job.watch, state["step"]) if best else {"step": state["step"], "metrics": metrics}
    results = {**final["metrics"], "steps": state["step"], "samples": state["samples"], "train_seconds": state["seconds"], "identity": state["identity"]}
    if best:
        results["best_step"] = final["step"]
    if log:
        if final is best:
            early_stopping.take(folder, best)
        else:
            job.export(engine.module, folder)
        write_text(folder / RESULTS, json.dumps(results, indent=2))
        early_stopping.sweep(folder, complete=True)
        log.close()
    return results


def build_engine(model: torch.nn.Module, args: TrainingArguments, config: dict):
    """`deepspeed.initialize` with torch's own AdamW (DeepSpeed's fused ones compile for a minute on the first run)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def _steps(data: Data, args: TrainingArguments, ranks: Ranks, cursor: int, steps: int) -> Iterator[list[MicroBatch]]:
    for _ in range(steps):
        parts = micro_batches(cursor, args.per_device_train_batch_size, args.gradient_accumulation_steps, ranks.rank, ranks.world)
        yield [data.batch([sample_at(args.seed, len(data), position) for position in part]) for part in parts]
        cursor += args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world


def _prefetch(source: Iterator, depth: int = 2) -> Iterator:
    """Make the next steps' batches in a thread while this one is computed; an error in it is raised here."""
    ready: queue.Queue = queue.Queue(depth)

    def fill():
        try:
            for item in source:
                ready.put((item, None))
        except BaseException as error:  # handed over, not swallowed
            ready.put((None, error))

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item, error = ready.get()
        if error is not None:
            raise error
        yield item


class _Interval:
    """Sums over the steps between two log lines; validation and checkpoints between them are not counted as time."""

    def __init__(self):
        self.losses, self.tokens, self.ecgs, self.seconds = [], 0, 0, 0.0

    def add(self, loss: float, tokens: float, ecgs: float, seconds: float) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        self.ecgs += ecgs
        self.seconds += seconds

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    def speed(self) -> dict:
        speed = {"tokens_per_second": self.tokens, "ecgs_per_second": self.ecgs}
        return {name: count / self.seconds for name, count in speed.items()} | {"step_seconds": self.seconds / len(self.losses)}


def _evaluate(job: Job, engine, log: RunLog | None, step: int) -> dict:
    engine.eval()
    results = job.evaluate(engine)
    samples = job.sample(engine) if job.sample and log else None
    engine.train()
    if log:
        log.line(step, results)
        if samples:
            log.text(step, samples)
    return results


def _learning_rate(args: TrainingArguments, step: int, last: int) -> float:
    """Linear warm-up that starts above zero, then half a cosine to zero."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - args.warmup_steps) / max(1, last - args.warmup_steps)))


def _set_learning_rate(engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout from (seed, step, rank): a resumed run needs no stored generator state."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "little"))
