"""What benchmarks/pretrain.py and instruct.py share: shards to train on, ranks to launch, and two training loops that take turns in one process."""

import argparse
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
RANKS, SEED = 2, 0


class Turns:
    """Two training loops in one process take turns: the main thread ("ours") first, "theirs" in a thread of its own.

    A loop calls `over(side, count)` at the end of each of its rounds, with what is counted (tokens, pairs), and gets the seconds of the round written down.
    """

    def __init__(self, rounds: int):
        self.rounds, self.error = rounds, None
        self.counts, self.seconds = {"ours": [], "theirs": []}, {"ours": [], "theirs": []}
        self.go = {"ours": threading.Semaphore(0), "theirs": threading.Semaphore(0)}

    def begin(self) -> None:
        self.started = time.perf_counter()

    def over(self, side: str, count: int) -> None:
        import torch.distributed as dist

        dist.barrier()  # the slower rank decides
        self.seconds[side].append(time.perf_counter() - self.started)
        self.counts[side].append(count)
        self.hand_over(side)

    def hand_over(self, side: str) -> None:
        other = "theirs" if side == "ours" else "ours"
        self.go[other].release()
        self.go[side].acquire()
        if self.error:
            raise self.error
        self.begin()

    def side_thread(self, call: Callable[[], None]) -> None:
        """Start "theirs", which waits for its first turn."""

        def run():
            self.go["theirs"].acquire()
            try:
                self.begin()
                call()
            except BaseException as error:  # raised again in the main thread
                self.error = error
            self.go["ours"].release()

        threading.Thread(target=run, daemon=True).start()

    def counted(self, loss: Callable, count: Callable[[object], int], steps: int) -> Callable:
        """`loss(engine, row)` for the loop of "ours", one call a step: a round is from one call to another, and holds all that the loop does between."""
        seen = [0, 0]  # steps, and what is counted of the round

        def called(engine, row):
            if seen[0] == 0:
                self.begin()
            elif seen[0] % steps == 0 and seen[0] <= (self.rounds + 1) * steps:
                self.over("ours", seen[1])
                seen[1] = 0
            seen[0] += 1
            seen[1] += count(row)
            return loss(engine, row)

        return called

    def rates(self, side: str) -> list[float]:
        """What was counted per second in each round but the first, over all ranks."""
        from toolkit.training.distributed import sum_over_ranks

        counts = sum_over_ranks(self.counts[side], "cpu")
        return [n / s for n, s in zip(counts[1:], self.seconds[side][1:], strict=True)]


def compared(what: str, baseline: str, found: dict) -> dict:
    """The medians of a worker's rates, {"what", "ours", "baseline", "baseline_per_s", "ratio", ...}; found: "ours" and "theirs", a rate each round."""
    each = [a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
    ours, theirs = median(found["ours"]), median(found["theirs"])
    return {"what": what, "ours": ours, "baseline": baseline, "baseline_per_s": theirs, "ratio": ours / theirs, "lowest": min(each), "highest": max(each),
            "step_seconds": found["step_seconds"], "precision": "bf16" if found["bf16"] else "fp32"}  # fmt: skip


HEADER = f"{'':<36}{'ours':>10}{'baseline':>10}   ratio (rounds from, to)"


def line(result: dict) -> str:
    if "ratio" not in result:
        return f"{result['what']:<48}{result['value']:>10,.3f} {result['unit']}"
    spread = f"({result['lowest']:.2f} to {result['highest']:.2f})"
    return f"{result['what']:<36}{result['ours']:>10,.0f}{result['baseline_per_s']:>10,.0f}{result['ratio']:>8.2f}x {spread:<18} of {result['baseline']}"


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start"


def worker_arguments(parser: argparse.ArgumentParser) -> None:
    """What every parser of a benchmark with a worker has beside its own."""
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def words_of(values: dict) -> list[str]:
    """A command line of `--name value`."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def launch(words: list, ranks: int = RANKS) -> None:
    """Run a script on so many ranks through the deepspeed launcher; its output is shown only if it fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks, "--master_port", port, *words]
    done = subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\nfailed with exit code {done.returncode}: {' '.join(map(str, words))}")


def run_module(*words) -> None:
    """`python -m` of the project, without what it prints."""
    subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def synthetic_ecgs(work: Path, records: int) -> Path:
    """A synthetic PTB-XL."""
    run_module("toolkit.ecg.synthetic", "--out", work / "data", "--records", records, "--seed", SEED, "--workers", RANKS)
    return work / "data" / "ptbxl"


def make_shards(work: Path, ptbxl: Path) -> None:
    """A manifest, an untrained tokenizer (ids need not be good to cost what they cost) and token shards."""
    from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

    ECGTokenizer(TokenizerConfig()).save_pretrained(work / "tokenizer")
    run_module("sharding.prepare", "ptbxl", "--root", ptbxl, "--out", work / "manifest")
    run_module("sharding.shard", "--manifest", work / "manifest", "--tokenizer", work / "tokenizer", "--out", work / "shards")
