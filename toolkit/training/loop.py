"""The training loop over `deepspeed.initialize`, the same for tokenizer, pretraining and instruction tuning.

A step draws all its micro-batches first, so that the summed loss is divided by the number of targets in the *global* batch: the gradient
is that of the mean over all targets, however ranks and accumulation cut the batch.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from toolkit.errors import UserError, first_line
from toolkit.files import share, write_text
from toolkit.lm.flops import peak_flops
from toolkit.shards.order import Data
from toolkit.shown import Shown
from toolkit.training import checkpoint, early_stopping, heartbeat, stop, stragglers, watchdog
from toolkit.training.arguments import TrainingArguments, as_record
from toolkit.training.batches import prefetch, steps
from toolkit.training.collectives import LAST as LAST_COLLECTIVE
from toolkit.training.distributed import Ranks, sum_over_ranks, wants_bf16
from toolkit.training.engine import Taken, build_engine, learning_rate, set_learning_rate, take_step
from toolkit.training.heartbeat import NOW, mark
from toolkit.training.log import RunLog
from toolkit.training.profile import Profiler
from toolkit.training.resume import RESULTS, Run, find_run
from toolkit.training.speed import Interval
from toolkit.training.zero3 import MADE

SAID = 20  # sample keys in a message
LAST = "last"  # the model of the last step, beside the best one


@dataclass
class Job:
    """What differs between the trainers. `loss` sums over targets; `evaluate`, `show` and `export` are called on all ranks."""

    model: torch.nn.Module
    data: Data
    loss: Callable[[Any, Any], torch.Tensor]
    evaluate: Callable[[Any], dict[str, float]]
    export: Callable[[torch.nn.Module, Path], None]
    identity: dict  # digests of what the run is made from; a resumed run must have the same
    show: Callable[[Any], Shown] | None = None
    flops: Callable[[Any], float] | None = None  # of a micro-batch, forward and backward
    hidden_size: int | None = None  # what ZeRO-3's bucket sizes follow
    bf16: bool = True  # False: DeepSpeed keeps the weights in float32 whatever --precision says
    watch: str = "eval_loss"  # what --early_stopping_patience looks at; smaller is better, of what is called *_match larger
    keep_last: bool = False  # the best model is kept without early stopping too, and the last one beside it, in last/
    check: Callable[[torch.nn.Module], None] | None = None  # called once, after the first update of a run


def train(args: TrainingArguments, job: Job, ranks: Ranks, trainer: str) -> dict:
    """Train to the last step, from the newest checkpoint if there is one; returns (and writes) the final metrics."""
    bf16 = job.bf16 and wants_bf16(args)
    run = find_run(args, ranks, trainer, len(job.data), job.data.samples_per_row, job.identity, bf16, job.hidden_size)
    if run.results:
        if ranks.main:
            early_stopping.sweep(run.folder, complete=True)
            shutil.rmtree(run.folder / MADE, ignore_errors=True)
            print(f"{run.folder} is complete already: {run.results['steps']} steps")
        return run.results
    with watchdog.watching(run.folder, ranks, args.hang_timeout):
        return _train(args, job, run, ranks, trainer, bf16)


def _train(args: TrainingArguments, job: Job, run: Run, ranks: Ranks, trainer: str, bf16: bool) -> dict:
    asked = stop.listen(run.folder, ranks.main)
    engine, state = _engine(args, job, run, ranks), run.state
    first = NOW.step = state["step"]
    watchdog.outlast(args.hang_timeout)
    heartbeat.mark_forwards(job.model)
    log = RunLog(run.folder, first, run.last, trainer) if ranks.main else None
    profiler = Profiler(args.profile if ranks.main else None, run.folder)
    batches = prefetch(steps(job.data, args.seed, run.split, ranks.rank, ranks.world, state["samples"], run.last - first))
    peak, source = peak_flops(ranks.device, bf16) if job.flops else (math.inf, "")
    if log and source:
        tqdm.write(f"MFU is the share of {peak / 1e12:.3g} TFLOPS per rank ({source})")
    interval, in_a_row, saved, slow = Interval(ranks.device, ranks.world, peak), 0, first, stragglers.NONE
    unchecked = first == 0 and job.check is not None

    for step in range(first, first if state.get("stopped") else run.last):
        profiler.step(step)
        mark("data")
        started, in_collectives = time.perf_counter(), LAST_COLLECTIVE.seconds
        samples, micro = next(batches)
        waited = time.perf_counter() - started
        flops = sum(map(job.flops, (m.inputs for m in micro))) if job.flops else 0.0
        counts = [sum(getattr(m, n) for m in micro) for n in ("targets", "tokens", "ecgs")]
        targets, tokens, ecgs, flops, stopping = sum_over_ranks([*counts, flops, asked()], ranks.device)
        if stopping:
            profiler.close()
            _leave(engine, args, run, state, saved, log, ranks)
        rate = learning_rate(args, step, run.last)
        set_learning_rate(engine, rate)
        taken = take_step(engine, job.loss, micro, max(targets, 1), ranks, job.data, samples, (args.seed, step))
        seconds = time.perf_counter() - started
        interval.add(taken.loss, targets, tokens, ecgs, flops, seconds, waited, LAST_COLLECTIVE.seconds - in_collectives, taken.forward)
        if unchecked and taken.applied and targets:
            job.check(engine.module)
            unchecked = False
        in_a_row = in_a_row + 1 if taken.keys else 0
        done = NOW.step = step + 1
        NOW.armed = True
        state = {**state, "step": done, "samples": state["samples"] + run.config["train_batch_size"] * job.data.samples_per_row,
                 "seconds": state["seconds"] + seconds, "skipped": state["skipped"] + bool(taken.keys), "ranks": ranks.world}  # fmt: skip
        if log:
            log.bar.update()
        if taken.keys:
            _report_skipped(args, done, taken, state["skipped"], in_a_row, log)
        if args.eval_steps and done % args.eval_steps == 0 and done != run.last:
            state |= _validate(args, job, engine, run.folder, state, log, ranks)
        if done % args.logging_steps == 0 or done == run.last or state.get("stopped"):
            table = stragglers.gather(interval.own(), ranks)
            if log:
                log.line(done, interval.values(run.last - done, taken.grad_norm, rate, stragglers.skew(table)))
                log.ranks(done, stragglers.scalars(table))
                slow = stragglers.warn(slow, table, run.folder)
            interval = Interval(ranks.device, ranks.world, peak)
        if done % args.save_steps == 0 or done == run.last or state.get("stopped"):
            saved = _save(engine, args, run.folder, state, log, saved)
        if state.get("stopped"):
            break

    profiler.close()
    return _finish(args, job, engine, log, run.folder, state)


def _engine(args: TrainingArguments, job: Job, run: Run, ranks: Ranks):
    """Collective. The engine, at the state of the run's checkpoint."""
    config = run.config
    if checkpoint.needs_conversion(run.state, ranks, config["zero_optimization"]["stage"]):
        config = {**config, "checkpoint": {"load_universal": True}}
    engine = build_engine(job.model, args, config)
    if run.state["step"]:
        checkpoint.load(engine, run.folder, run.state, ranks)
    return engine


def _report_skipped(args: TrainingArguments, step: int, taken: Taken, total: int, in_a_row: int, log: RunLog | None) -> None:
    """Say which step was not finite and on which samples; raises UserError after --max_skipped in a row."""
    what = f"loss {taken.loss}, gradient norm {taken.grad_norm}" + ("" if taken.applied else ", no weight was changed")
    keys = ", ".join(taken.keys[:SAID]) + (f" and {len(taken.keys) - SAID} more" if len(taken.keys) > SAID else "")
    if log:
        log.line(step, {"skipped_steps": total})
        tqdm.write(f"WARNING: step {step} is not finite: {what}; its samples: {keys}")
    if in_a_row >= args.max_skipped:
        raise UserError(
            f"{in_a_row} steps in a row were not finite, the last one {step} ({what}; samples: {keys});"
            " lower --learning_rate or raise --max_skipped and start from the last checkpoint, or name a new --output_dir"
        )


def _validate(args: TrainingArguments, job: Job, engine, folder: Path, state: dict, log: RunLog | None, ranks: Ranks) -> dict:
    """Collective. What a validation between two steps changes of the state: with early stopping the best one, and whether to stop."""
    metrics = _evaluate(job, engine, log, state["step"])
    if not (args.early_stopping_patience or job.keep_last):
        return {}
    best = early_stopping.better(state.get("best"), metrics, job.watch, state["step"])
    if best["step"] == state["step"] and (problem := _export_best(job, engine, early_stopping.path_of(folder, best), ranks)):
        if log:
            tqdm.write(f"WARNING: the best model so far, of step {state['step']}, could not be written ({problem}); training goes on without it")
        best = state.get("best")
    if not best:
        return {}
    waited = state["step"] - best["step"]
    return {"best": best, "stopped": bool(args.early_stopping_patience) and waited >= args.early_stopping_patience * args.eval_steps}


def _export_best(job: Job, engine, path: Path, ranks: Ranks) -> str | None:
    """Collective. Write the model to `path`; what went wrong on the disk, on every rank: a full one does not end the run."""
    problem = [None]
    mark("export")
    try:
        job.export(engine.module, path)
        if ranks.main:
            share(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(path, ignore_errors=True)
        problem = [first_line(error)]
    dist.broadcast_object_list(problem)  # rank 0 alone writes
    return problem[0]


def _save(engine, args: TrainingArguments, folder: Path, state: dict, log: RunLog | None, saved: int) -> int:
    """Collective. Write a checkpoint; the step of the newest one. A full disk does not end the run: it says so, and goes on from memory."""
    started = time.perf_counter()
    mark("checkpoint")
    problem = checkpoint.save(engine, folder, state, args.save_total_limit, args.keep_every)
    if log and not problem:
        early_stopping.sweep(folder)
        log.line(state["step"], {"save_seconds": time.perf_counter() - started})
    if log and problem:
        tqdm.write(f"WARNING: checkpoint-{state['step']} could not be written ({problem}); training goes on, the newest checkpoint is that of step {saved}")
    return saved if problem else state["step"]


def _leave(engine, args: TrainingArguments, run: Run, state: dict, saved: int, log: RunLog | None, ranks: Ranks) -> None:
    """Collective. Save what is not saved yet, and end with the exit code that asks to be started again."""
    if saved != state["step"] and _save(engine, args, run.folder, state, log, saved) != state["step"]:
        raise UserError(f"--output_dir: asked to stop at step {state['step']}, which could not be saved; the newest checkpoint is that of step {saved}")
    if log:
        stop.answered(run.folder)
        kept = "which is saved; the same command goes on from here" if state["step"] else "so there is nothing to save; the same command begins again"
        tqdm.write(f"stopped on request after step {state['step']} of {run.last}, {kept}")
        log.close()
    raise stop.Requeue


def _finish(args: TrainingArguments, job: Job, engine, log: RunLog | None, folder: Path, state: dict) -> dict:
    """Collective. The last validation, the exported model (with early stopping the best one) and train_results.json, which it returns."""
    final = best = state.get("best")
    if not state.get("stopped"):  # else it was validated when it stopped
        metrics = _evaluate(job, engine, log, state["step"])
        final = early_stopping.better(best, metrics, job.watch, state["step"]) if best else {"step": state["step"], "metrics": metrics}
    results = {**final["metrics"], "steps": state["step"], **{name: state[name] for name in ("samples", "skipped", "identity", "batch")}}
    results["train_seconds"] = state["seconds"]
    if best:
        results["best_step"] = final["step"]
    taken = best and final is best
    mark("export")
    if not taken:
        job.export(engine.module, folder)
    if best and job.keep_last:
        job.export(engine.module, folder / LAST)
    if log:
        share(folder)
        stop.answered(folder)  # too late for it to matter
        if taken:
            early_stopping.take(folder, best)
        write_text(folder / RESULTS, json.dumps(results, indent=2))
        early_stopping.sweep(folder, complete=True)
        shutil.rmtree(folder / MADE, ignore_errors=True)
        log.hparams(as_record(args), {name: value for name, value in final["metrics"].items() if math.isfinite(value)})
        log.close()
    return results


def _evaluate(job: Job, engine, log: RunLog | None, step: int) -> dict:
    """Collective. Metrics, and what the trainer has to show, to the log."""
    mark("validation")
    engine.eval()
    metrics = job.evaluate(engine)
    mark()
    shown = job.show(engine) if job.show else None
    engine.train()
    if log:
        log.line(step, metrics)
        if shown:
            log.show(step, shown)
    return metrics
