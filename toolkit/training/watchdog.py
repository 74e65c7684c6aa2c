"""Ends a run that hangs: a thread of each rank writes its heartbeat, and watches whether anything moves.

A hang is --hang_timeout seconds in which no rank moved: this one did not (no phase, micro-batch, forward pass or collective), and each other one says the same
of itself, or its heartbeat stands still. So a slow rank that others wait for is none, and neither are heartbeats that a full disk keeps away while this rank
moves. Seconds are counted by each rank while its own thread runs: clocks of nodes may differ, and a job that was suspended as a whole goes on.

Then every rank dumps the stacks of its threads to hang/rank-N.txt, the lowest rank that lives says which one holds the others up, and all end with exit code
86. A rank that cannot is left to the launcher of its node: DeepSpeed's sends SIGTERM, and SIGKILL 30 s later (killed from here, its -9 might be taken for the
exit code of the run). The clock starts with the first completed step of the process: compiling, loading and converting may take what they take, and until then
the process group's own timeout holds.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from toolkit.files import write_text
from toolkit.training import collectives, heartbeat
from toolkit.training.distributed import Ranks
from toolkit.training.heartbeat import NOW
from toolkit.training.stop import HANG, Requeue
from toolkit.training.verdict import verdict

FOLDER = "hang"
EVERY = 5.0  # seconds between two heartbeats of a rank; with over 80 ranks world / 16, so that a shared disk takes at most 16 files a second
LOOK, STILL = 1 / 3, 1 / 2  # of the timeout: without progress for so long a rank looks at the others; an unchanged heartbeat is one that stands still


@contextlib.contextmanager
def watching(folder: Path, ranks: Ranks, timeout: float) -> Iterator[None]:
    """Heartbeats in the run folder while the block runs. timeout: seconds without progress that are a hang; 0: none is."""
    collectives.record()
    NOW.step, NOW.phase, NOW.armed = 0, "start", False
    if ranks.main:
        heartbeat.trim(folder, ranks.world)
    heartbeat.write(folder, heartbeat.beat(ranks.rank, 0.0))
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, ranks, timeout, over), name="watchdog", daemon=True)
    thread.start()
    end = heartbeat.ENDED
    try:
        yield
    except Requeue:
        raise
    except BaseException as error:
        end = f"failed: {type(error).__name__}"
        raise
    finally:
        over.set()
        thread.join()
        NOW.phase = end
        heartbeat.write(folder, heartbeat.beat(ranks.rank, 0.0))
        if end == heartbeat.ENDED:
            dist.barrier()  # else a rank that is moments behind writes that it has ended after all heartbeats were deleted
            if ranks.main:
                heartbeat.clear(folder)


def outlast(timeout: float) -> None:
    """Let collectives wait for longer than the watchdog does: torch gives them up after 30 minutes over gloo, 10 over NCCL, and says no more than that."""
    if timeout:
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=max(1800, timeout + 600)), group)


def _watch(folder: Path, ranks: Ranks, timeout: float, over: threading.Event) -> None:
    period = max(EVERY, ranks.world / 16)
    if timeout:
        period = min(period, timeout / 6)
    moved, quiet, last, others = heartbeat.moved(), 0.0, time.perf_counter(), {}
    while not over.wait(period):
        now, before = time.perf_counter(), moved
        moved = heartbeat.moved()
        # a gap is a suspended process, which could not have moved: of it no more than two periods count
        quiet, last = quiet + min(now - last, 2 * period) if moved == before else 0.0, now
        heartbeat.write(folder, heartbeat.beat(ranks.rank, quiet))
        if not (timeout and NOW.armed):
            continue
        others = _look(folder, ranks, others, quiet) if quiet >= LOOK * timeout else {}
        still = {rank for rank, (_, since) in others.items() if quiet - since >= STILL * timeout}
        silent = still | {rank for rank, (beat, _) in others.items() if beat and beat["quiet_seconds"] >= timeout}
        if quiet >= timeout and len(silent) == ranks.world - 1:
            _end(folder, ranks, timeout, quiet, still, period)


def _look(folder: Path, ranks: Ranks, others: dict, quiet: float) -> dict[int, tuple[dict | None, float]]:
    """For each other rank its heartbeat, and what `quiet` was when this rank first saw that one."""
    found = {}
    for rank in range(ranks.world):
        if rank != ranks.rank:
            beat = heartbeat.read(folder, rank)
            found[rank] = others[rank] if rank in others and others[rank][0] == beat else (beat, quiet)
    return found


def _end(folder: Path, ranks: Ranks, timeout: float, quiet: float, still: set[int], period: float) -> None:
    """Does not return. still: the ranks whose heartbeats stand still, which cannot dump their stacks."""

    def tell(hang: str) -> None:
        heartbeat.write(folder, heartbeat.beat(ranks.rank, quiet, hang))

    def said(rank: int, *what: str) -> bool:
        return (heartbeat.read(folder, rank) or {}).get("hang") in what

    try:
        _dump(folder, ranks)
        tell("stacks")
        living = [rank for rank in range(ranks.world) if rank not in still]
        for rank in still:  # what it wrote in an earlier hang
            (folder / FOLDER / f"rank-{rank}.txt").unlink(missing_ok=True)
        _wait(lambda: all(said(rank, "stacks", "told") for rank in living), 3 * period + 2)
        beats = {rank: heartbeat.read(folder, rank) for rank in range(ranks.world)}
        first = min([ranks.rank, *(rank for rank in living if (beats[rank] or {}).get("hang"))])
        if ranks.rank == first:
            text = verdict(beats, still, ranks.rank, timeout, folder / FOLDER)
            print(text, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                write_text(folder / FOLDER / "verdict.txt", text + "\n")
            tell("told")
        else:
            _wait(lambda: said(first, "told"), 3 * period + 2)
    finally:
        os._exit(HANG)


def _dump(folder: Path, ranks: Ranks) -> None:
    """The stacks of all threads of this process, to hang/rank-N.txt; where the disk does not take it, to stderr."""
    head = f"rank {ranks.rank}, pid {os.getpid()}, step {NOW.step}, {NOW.phase}"
    try:
        path = folder / FOLDER / f"rank-{ranks.rank}.txt"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w") as file:
            print(head, file=file, flush=True)
            faulthandler.dump_traceback(file)
    except OSError:
        print(head, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr.fileno())


def _wait(there: Callable[[], bool], seconds: float) -> None:
    until = time.perf_counter() + seconds
    while not there() and time.perf_counter() < until:
        time.sleep(min(1.0, seconds / 20))
