"""The plan against the real engine of DeepSpeed on 1, 2 and 4 ranks: memory of a rank, bytes of its collectives, and the speed beside one rank's.

    python benchmarks/scaling.py                                            # tiny: about five minutes on two cores
    python benchmarks/scaling.py --backbone smollm2 --seq_len 650 --steps 2 # a quarter of an hour, 20 GB of memory
    python benchmarks/scaling.py --worlds 1 2 --stages 2 --steps 1          # does it run?
    python benchmarks/scaling.py --json scaling.json

Memory: the most that torch's allocator holds at a time in a step whose moments are there already, counted by its own events (torch.profiler), from before the
model was made. What gloo, Python and the libraries hold is not in it, and no GPU is. Bytes: what the functions of torch.distributed are given in a step.
Speed: tokens per second of all ranks, a thread each, each with the same batch at any number of ranks; communication is the share of a step that is spent in
collectives when each is waited for at once, waiting for slower ranks included. More ranks than cores cannot be faster: read it as what communication costs.
`reduce_bucket_size` is a million, not the presets' 500 million, which would be all of what there is to measure. Weights are random, tokens are drawn.
"""

import argparse
import contextlib
import inspect
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder has a sharding.py and a tokenizer.py too
os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from benchmarks.turns import ROOT, machine
from toolkit import plan, scaling
from toolkit.lm.checkpointing import checkpoint_layers
from toolkit.lm.model import PackedLM
from toolkit.lm.shapes import shape_of
from toolkit.lm.trainable import choose_trainable
from toolkit.shards.order import MicroBatch
from toolkit.shards.packing import pack
from toolkit.tasks.prompts import forecast_group
from toolkit.tokenizer.tokenizer import ECGTokenizer
from toolkit.training import ds_config
from toolkit.training.arguments import parse
from toolkit.training.distributed import bf16_is_fast, start
from toolkit.training.engine import build_engine, set_learning_rate, take_step

SMALL = {"reduce_bucket_size": 10**6}
COLLECTIVES = {  # function -> what the plan calls it, and which of its arguments is the whole buffer
    "all_reduce": ("all-reduce", "tensor"),
    "reduce_scatter_tensor": ("reduce-scatter", "input"),
    "all_gather_into_tensor": ("all-gather", "output_tensor"),
}
WARM_UP, MEASURED = 1, 2  # steps: the first makes the moments, the second completes ZeRO-3's trace of what is used when


class Watch:
    """Stands in for the functions of torch.distributed: counts what they are given; while `waits` is set, each is waited for and timed."""

    def __init__(self):
        self.bytes, self.seconds, self.waits = Counter(), 0.0, True
        for name, (kind, buffer) in COLLECTIVES.items():
            setattr(dist, name, self.watched(getattr(dist, name), kind, buffer))

    def watched(self, real, kind: str, buffer: str):
        signature = inspect.signature(real)

        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            self.bytes[kind] += given[buffer].nbytes
            if not self.waits:
                return real(*args, **kwargs)
            tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
            held, started = [t._use_count() for t in tensors], time.perf_counter()
            work = real(*args, **kwargs)
            if work is not None:
                work.wait()
                work = Done()
            self.seconds += time.perf_counter() - started
            # gloo's thread may let go of a tensor last, and the profiler does not see what that frees
            until = time.perf_counter() + 5
            while [t._use_count() for t in tensors] != held and time.perf_counter() < until:
                time.sleep(0.0002)
            return work

        return call


class Done:
    """The handle of a collective that is over."""

    def wait(self, *_, **__) -> bool:
        return True


def rank(args: plan.PlanArguments, ecgs_per_row: int, steps: int) -> dict:
    """Train on this rank; what was measured on it."""
    watch, ranks = Watch(), start()
    bf16 = args.precision == "bf16"
    base, tokenizer, vocabulary = shape_of(args.backbone, plan.CODES, args.gain_tokens)
    config = ds_config.resolve(args.deepspeed, args, ranks.world, bf16, base.config.hidden_size)
    rng, ecgs = np.random.default_rng(ranks.rank), ecgs_per_row * args.per_device_train_batch_size

    def row() -> MicroBatch:
        codes = rng.integers(0, plan.CODES, (ecgs, 1, ECGTokenizer.tokens_per_ecg)).astype(np.uint16)
        packed = pack([forecast_group(tokenizer, vocabulary, one, np.ones((1, 12))) for one in codes])
        return MicroBatch(packed, len(packed.targets), len(packed.input_ids), len(codes))

    def step(number: int) -> int:
        micro = [row() for _ in range(args.gradient_accumulation_steps)]
        watch.bytes, watch.seconds = Counter(), 0.0
        take_step(engine, lambda engine, row: engine(row), micro, sum(m.targets for m in micro) * ranks.world, ranks, None, [], (0, number))
        return sum(m.tokens for m in micro)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profile:
        torch.manual_seed(0)
        lm = choose_trainable(AutoModelForCausalLM.from_config(base.config, dtype=torch.float32), vocabulary, args.train)
        checkpoint_layers(lm, args.gradient_checkpointing)
        head_rows = vocabulary.code_rows if args.head == "ecg" else None
        engine = build_engine(PackedLM(lm, head_rows=head_rows), args, config)
        set_learning_rate(engine, 1e-4)
        for number in range(WARM_UP + MEASURED):
            if number == WARM_UP:
                begins = time.time_ns()
            step(number)
    counted, seconds = dict(watch.bytes), {True: [], False: []}
    shares = []
    for watch.waits in (True, False) if steps else ():
        for number in range(steps):
            dist.barrier()
            started = time.perf_counter()
            tokens = step(number)
            seconds[watch.waits].append(time.perf_counter() - started)
            shares += [watch.seconds / seconds[True][-1]] if watch.waits else []
    return {
        "peak": peak(profile, begins), "bytes": counted,
        "tokens_per_s": ranks.world * tokens / median(seconds[False]) if steps else None, "communication": median(shares) if steps else None,
    }  # fmt: skip


def peak(profile, begins: int) -> int:
    """The most bytes at a time after `begins` (nanoseconds), by the allocator's events.

    What gloo's thread frees, such as its copies of buffers, is no event: a block is taken for freed when another one is given out where it lay.
    """
    nodes, events = [*profile.profiler.kineto_results.experimental_event_tree()], []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == "[memory]":
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    starts: list[int] = []  # of the blocks that are held, sorted
    sizes, held, most = {}, 0, 0
    for at, place, size in sorted(events, key=lambda event: event[0]):
        first = bisect_left(starts, place)
        if size < 0:
            gone = [place] if place in sizes else []
        else:
            first -= first > 0 and starts[first - 1] + sizes[starts[first - 1]] > place
            gone = starts[first : bisect_left(starts, place + size)]
        held -= sum(sizes.pop(block) for block in gone)
        starts[first : first + len(gone)] = [place] if size > 0 else []
        if size > 0:
            sizes[place] = size
            held += size
        most = max(most, held) if at >= begins else held
    return most


def measure(world: int, stage: int, precision: str, accumulation: int, zero: dict, steps: int, argv: list[str]) -> dict:
    """A configuration on `world` forked ranks beside the plan of the same arguments; zero: what the preset's zero_optimization has instead."""
    with tempfile.TemporaryDirectory() as work:
        config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        config["zero_optimization"] |= zero
        path = Path(work) / f"zero{stage}.json"
        path.write_text(json.dumps(config))
        words = ["--deepspeed", str(path), "--precision", precision, "--gradient_accumulation_steps", str(accumulation), "--world", str(world)]
        args = parse(plan.PlanArguments, "", [*words, "--report_targets", "no", "--learning_rate", "1e-4", *argv])
        planned, measures = plan.make_plan(args), plan.measures(args)
        resolved = plan.resolved(args, path, measures, world)
        found = fork(args, world, planned["ecgs_per_row"], steps, Path(work))
    state = planned["presets"][str(path)]
    volumes = scaling.volumes(resolved, measures.uses, measures.trained, accumulation, measures.size)
    return {
        "world": world, "stage": stage, "precision": precision, "accumulation": accumulation,
        "planned": state["peak"][args.gradient_checkpointing], "measured": max(one["peak"] for one in found),
        "planned_bytes": volumes, "counted_bytes": found[0]["bytes"], "tokens_per_s": found[0]["tokens_per_s"],
        "communication": max(one["communication"] for one in found) if steps else None,
    }  # fmt: skip


def fork(args: plan.PlanArguments, world: int, ecgs_per_row: int, steps: int, work: Path) -> list[dict]:
    """`rank` in `world` forked processes, which saves them ten seconds of imports; what each returned."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for number in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            code, log = 1, os.open(work / f"{number}.log", os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(BaseException):
                os.dup2(log, 1)
                os.dup2(log, 2)
                places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in places.items()})
                try:
                    (work / f"{number}.json").write_text(json.dumps(rank(args, ecgs_per_row, steps)))
                    dist.barrier()
                    code = 0
                except BaseException:
                    traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)
    left, failed = set(pids), False
    while left:
        pid, status = os.wait()
        if pid in left and status and not failed:
            failed = True
            for other in left - {pid}:  # they may wait for it in a collective
                os.kill(other, signal.SIGKILL)
        left.discard(pid)
    if failed:
        sys.exit("a rank failed:\n" + "\n".join((work / f"{number}.log").read_text()[-2000:] for number in range(world)))
    return [json.loads((work / f"{number}.json").read_text()) for number in range(world)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="ranks (default: %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp32"], default=["bf16" if bf16_is_fast() else "fp32"], help="default: %(default)s")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1], help="micro-batches per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, twice (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    args, argv = parser.parse_known_args()
    argv = [*(() if "--backbone" in argv else ("--backbone", "tiny")), *(() if "--seq_len" in argv else ("--seq_len", "1650")), *argv]
    print(f"{machine()}; {' '.join(argv)}\n")
    print("precision  ZeRO  micro-batches  ranks     MB planned  measured  ratio   MB of collectives planned  counted   tokens/s  of 1 rank  communication")
    results, alone = [], {}
    for precision, stage, accumulation in ((p, s, a) for p in args.precision for s in args.stages for a in args.accumulation):
        if (precision, stage) == ("bf16", 0) and accumulation > 1:
            continue  # refused by the trainers
        for world in sorted(args.worlds):
            r = measure(world, stage, precision, accumulation, SMALL, args.steps, argv)
            results.append(r)
            planned, counted = (f"{sum(r[what].values()) / 1e6:,.1f}" if world > 1 else "-" for what in ("planned_bytes", "counted_bytes"))
            speed = ""
            if args.steps:
                if world == 1:
                    alone[precision, stage, accumulation] = r["tokens_per_s"]
                one = alone.get((precision, stage, accumulation))
                times = f"{r['tokens_per_s'] / one:.2f}" if one else "-"
                speed = f"{r['tokens_per_s']:>11,.0f}{times:>11}{100 * r['communication']:>13.0f} %"
            memory = f"{r['planned'] / 1e6:>14,.1f}{r['measured'] / 1e6:>10,.1f}{r['planned'] / r['measured']:>7.2f}"
            print(f"{precision:<11}{stage:<6}{accumulation:<15}{world:<6}{memory}{planned:>28}{counted:>9}{speed}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
