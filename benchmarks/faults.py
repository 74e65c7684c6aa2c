"""The faults of benchmarks/soak.py: when they strike, what they do to a run that the deepspeed launcher started, and how it may end of them."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "HEARTSPEED_SOAK"  # in the environment of everything that the soak starts
COMPLETE, MISTAKE, SAVED, HANG = 0, 2, 85, 86
KILLED = 256 - signal.SIGKILL  # the deepspeed launcher leaves with -9 of its rank, of which a shell sees the low byte
TERMINATED = 256 - signal.SIGTERM
RUNNING = None  # "exit code" of a launch that lived through its fault

# when: while the ranks start, between two steps at random, while a checkpoint is written, in a validation. Whatever has not struck before the last step
# strikes in the end of the run: last validation, export, results.
ANY_TIME = ("start", "training", "saving", "validation")
AFTER_START = ("training", "saving", "validation")


@dataclass(frozen=True)
class Fault:
    """One draw. `share`, from 0 to 1: how far into its time it strikes, and how long it lasts."""

    kind: str
    moment: str
    share: float
    rank: int


@dataclass
class Launch:
    """A `deepspeed` command that was started on `folder`; `value` is what its processes have as MARK."""

    process: subprocess.Popen
    folder: Path
    log: Path
    value: str
    seen: os.stat_result | None  # log.jsonl before it
    started: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def deck(seed: int, kinds: list[str]) -> Iterator[Fault]:
    """Faults without end: each lap has every kind once, in an order of its own, and each kind goes through its moments before one comes again."""
    draw = random.Random(seed)
    moments = {kind: itertools.cycle(draw.sample(FAULTS[kind].moments, len(FAULTS[kind].moments))) for kind in kinds}
    while True:
        for kind in draw.sample(kinds, len(kinds)):
            yield Fault(kind, next(moments[kind]), draw.random(), draw.randrange(2))


# -------------------------------------------------------------------------------------------------------------------------- what is seen from outside


def last_step(folder: Path) -> int:
    """The newest step whose loss is in log.jsonl; 0 if there is none."""
    step = 0
    with contextlib.suppress(OSError), open(folder / "log.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
                said = json.loads(line)
                step = said["step"] if "loss" in said else step
    return step


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints whose last file is there."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.parent.name) for path in folder.glob("checkpoint-*/trainer_state.json"))
    return sorted(int(name[1]) for name in names if name)


def being_written(folder: Path) -> set[int]:
    """Inodes of checkpoints without their last file: one that a killed run left is another than the one written in its place."""
    found = set()
    for path in folder.glob("checkpoint-*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            if not (path / "trainer_state.json").exists():
                found.add(path.stat().st_ino)
    return found


def living(value: str) -> list[psutil.Process]:
    """Processes that were started with MARK=value and have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == value:
                found.append(process)
    return found


def ranks(launch: Launch) -> list[psutil.Process]:
    """The trainers of a launch in order of rank, of those that were started: grandchildren of the `deepspeed` command."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(launch.process.pid).children():
            found += child.children()
    said = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            if "RANK" in (environment := process.environ()):
                said.append((int(environment["RANK"]), process))
    return [process for _, process in sorted(said, key=lambda one: one[0])]


# ------------------------------------------------------------------------------------------------------------------------------------ when they strike


@dataclass(frozen=True)
class Pace:
    """Of the undisturbed run, in seconds: from the command to the first step, a step, a validation; its steps, and those between two validations."""

    start: float
    step: float
    validation: float
    steps: int
    eval_steps: int

    @property
    def latest(self) -> float:
        """Seconds after a launch's first step until a fault strikes, at most: a sixth of the run, so that a short one sees several."""
        return min(20.0, self.steps * self.step / 6)


def moment_of(fault: Fault, launch: Launch, pace: Pace, wait: Callable[..., bool]) -> str:
    """Wait for the fault's moment and say which one it was: "end" if the run came to its last step before.

    wait(condition, seconds) returns whether the condition came true before the launch ended.
    """
    if fault.moment == "start":
        wait(lambda: len(ranks(launch)) == 2)
        wait(lambda: False, fault.share * pace.start)
        return "start"
    wait(lambda: _logs(launch))
    first = last_step(launch.folder)

    def over() -> bool:
        return last_step(launch.folder) >= pace.steps

    wait(lambda: over() or last_step(launch.folder) > first)
    left = being_written(launch.folder)
    wait(over, fault.share * pace.latest)
    if fault.moment == "saving":
        wait(lambda: over() or bool(being_written(launch.folder) - left), pause=0.0005)
    if fault.moment == "validation":
        wait(lambda: over() or last_step(launch.folder) % pace.eval_steps == pace.eval_steps - 1, pause=0.001)
        if not over():
            wait(lambda: False, pace.step + fault.share * pace.validation)
    return "end" if over() else fault.moment


def _logs(launch: Launch) -> bool:
    """Whether the launch has opened log.jsonl, which is then another file than before."""
    with contextlib.suppress(OSError):
        now = (launch.folder / "log.jsonl").stat()
        return launch.seen is None or now.st_ino != launch.seen.st_ino or now.st_ctime_ns != launch.seen.st_ctime_ns
    return False


# ------------------------------------------------------------------------------------------------------------------------------------ what they do


def kill_rank(launch: Launch, fault: Fault) -> None:
    _signal(launch, fault, signal.SIGKILL)


def stop_rank(launch: Launch, fault: Fault) -> None:
    _signal(launch, fault, signal.SIGSTOP)


def sigterm(launch: Launch, fault: Fault) -> None:
    _signal(launch, fault, signal.SIGTERM)


def _signal(launch: Launch, fault: Fault, number: int) -> None:
    with contextlib.suppress(psutil.Error, IndexError):  # it has ended
        ranks(launch)[fault.rank].send_signal(number)


def node_lost(launch: Launch, fault: Fault) -> None:
    """The command, DeepSpeed's launcher below it and all ranks at once."""
    for process in living(launch.value):
        with contextlib.suppress(psutil.Error):
            process.kill()


def requeue(launch: Launch, fault: Fault) -> None:
    launch.folder.mkdir(exist_ok=True)
    (launch.folder / "STOP").touch()


@contextlib.contextmanager
def full_disk(disk: Path) -> Iterator[Callable[[], None]]:
    """The disk is full from here until the block ends; the function that this gives fills what has become free meanwhile."""
    path, block = disk / "filler", bytes(1 << 20)

    def fill() -> None:
        with open(path, "ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(block[:size]):
                        pass

    try:
        fill()
        yield fill
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def bad_shard(shards: Path, share: float) -> Iterator[Path]:
    """One of the train shards has a flipped byte until the block ends. share: which one, and where."""
    paths = sorted(shards.glob("train-*.tar"))
    path = paths[int(share * len(paths)) % len(paths)]
    copy, data = path.with_name("copy"), bytearray(path.read_bytes())
    shutil.copyfile(path, copy)
    data[int(share * len(data))] ^= 0x10
    path.write_bytes(data)
    try:
        yield path
    finally:
        os.replace(copy, path)


@dataclass(frozen=True)
class Kind:
    """strike: None for the two that last a while (`full_disk`, `bad_shard`). codes: how the launch may end; `early`: in its start."""

    moments: tuple[str, ...]
    codes: tuple[int | None, ...]
    strike: Callable[[Launch, Fault], None] | None = None
    early: tuple[int | None, ...] = ()


FAULTS = {
    "kill rank": Kind(ANY_TIME, (KILLED,), kill_rank),
    "stop rank": Kind(AFTER_START, (HANG,), stop_rank),
    "node lost": Kind(ANY_TIME, (-signal.SIGKILL,), node_lost),
    "requeue": Kind(ANY_TIME, (SAVED,), requeue),
    "sigterm": Kind(ANY_TIME, (SAVED,), sigterm, early=(TERMINATED, SAVED)),  # before the trainer listens it is the system's own
    "full disk": Kind(ANY_TIME, (RUNNING, MISTAKE)),
    "bad shard": Kind(("start",), (MISTAKE,)),
}
