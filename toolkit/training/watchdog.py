"""Ends a run that hangs: a thread of each rank writes its heartbeat, and watches whether anything moves.

A hang is --hang_timeout seconds in which no rank moved: this one did not (no phase, micro-batch, forward pass or collective), and each other one says the same
of itself, or its heartbeat stands still. So a slow rank that others wait for is none, and neither are heartbeats that a full disk keeps away while this rank
moves. Seconds are counted by each rank while its own thread runs: clocks of nodes may differ, and a job that was suspended as a whole goes on.

The lowest rank that lives looks at all others and calls a hang; a rank above it reads its heartbeat alone, and takes over where that stands still. Then every
rank dumps the stacks of its threads to hang/rank-N.txt, the one that called says which rank holds the others up, and all end with exit code 86. A rank that
cannot is left to the launcher of its node: DeepSpeed's sends SIGTERM, and SIGKILL 30 s later (killed from here, its -9 might be taken for the exit code of the
run). The clock starts with the first completed step of the process: compiling, loading and converting may take what they take, and until then the process
group's own timeout holds. It runs until all ranks have met at the end.
"""

import contextlib
import faulthandler
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.training import collectives, heartbeat
from toolkit.training.distributed import Ranks
from toolkit.training.heartbeat import NOW, mark
from toolkit.training.stop import HANG, Requeue
from toolkit.training.verdict import verdict

FOLDER = "hang"
EVERY = 5.0  # seconds between two heartbeats of a rank; with over 80 ranks world / 16: 16 files a second to a shared disk, unless the timeout is short
LOOK, STILL = 1 / 3, 1 / 2  # of the timeout: without progress for so long a rank looks at others; an unchanged heartbeat is one that stands still
LIVES = 60.0  # seconds, at least 3 heartbeats and at most STILL: a lower rank whose heartbeat is not older is left to call a hang (NFS may show it so late)
MONTH = 30 * 86400


@contextlib.contextmanager
def watching(folder: Path, ranks: Ranks, timeout: float) -> Iterator[None]:
    """Heartbeats in the run folder while the block runs, and until all ranks have met behind it. timeout: seconds without progress that are a hang; 0: none is.

    Collective. Raises UserError where another rank fails in its last writes.
    """
    outlast(timeout)
    collectives.record()
    NOW.step, NOW.phase, NOW.armed = 0, "start", False
    if ranks.main:
        heartbeat.trim(folder, ranks.world)
    heartbeat.remove(folder, ranks.rank)  # else, where a full disk keeps the new one away, one that tells of an earlier hang might end this run
    heartbeat.write(folder, heartbeat.beat(ranks.rank, 0.0))
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, ranks, timeout, over), name="watchdog", daemon=True)
    thread.start()
    requeue = failed = None
    try:
        try:
            yield
        except Requeue as asked:  # saved, so it ends like a run that is through
            requeue = asked
        _meet(ranks)
    except BaseException as error:
        failed = f"failed: {type(error).__name__}"
        raise
    finally:
        over.set()
        thread.join()
        if failed:  # the others may still wait for this rank: their watchdogs shall know
            NOW.phase = failed
            heartbeat.write(folder, heartbeat.beat(ranks.rank, 0.0))
        else:
            heartbeat.leave(folder, ranks.rank)
    if requeue:
        raise requeue


def _meet(ranks: Ranks) -> None:
    """Collective. Wait for all others: rank 0 may hang or fail in its last writes, and a rank that has left would not see it."""
    mark("end")
    NOW.armed = True
    try:
        dist.barrier()
    except RuntimeError as error:
        if ranks.main:
            time.sleep(3)  # as the other ranks do: a launcher passes on the exit code that it sees first
        raise UserError("another rank failed at the end of the run; its own error is above, or in the log of its node, and has the mend") from error


def outlast(timeout: float) -> None:
    """Let collectives wait for longer than the watchdog does (without one for 30 days): DeepSpeed's groups give them up after 10 minutes, over gloo and NCCL,
    those that torch makes by itself after 30 and 10, and say no more than that. To be called again when there are new groups."""
    seconds = min(max(3600, timeout + 600), MONTH) if timeout else MONTH
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _watch(folder: Path, ranks: Ranks, timeout: float, over: threading.Event) -> None:
    period = max(EVERY, ranks.world / 16)
    if timeout:
        period = min(period, timeout / 6)
    lives = min(max(LIVES, 3 * period), STILL * timeout)
    moved, quiet, last, others = heartbeat.moved(), 0.0, time.perf_counter(), {}
    while not over.wait(period):
        now, before = time.perf_counter(), moved
        moved = heartbeat.moved()
        # a gap is a suspended process, which could not have moved: of it no more than two periods count
        quiet, last = quiet + min(now - last, 2 * period) if moved == before else 0.0, now
        heartbeat.write(folder, heartbeat.beat(ranks.rank, quiet))
        if not (timeout and NOW.armed):
            continue
        others, first = _look(folder, ranks, others, quiet, lives) if quiet >= LOOK * timeout else ({}, False)
        still = {rank for rank, (_, since) in others.items() if quiet - since >= STILL * timeout}
        silent = still | {rank for rank, (beat, _) in others.items() if beat and beat["quiet_seconds"] >= timeout}
        calls = [rank for rank, (beat, _) in others.items() if beat and beat["hang"]]
        if calls or (first and quiet >= timeout and len(silent) == ranks.world - 1):
            _end(folder, ranks, timeout, quiet, others, still, calls, period)


def _look(folder: Path, ranks: Ranks, others: dict, quiet: float, lives: float) -> tuple[dict[int, tuple[dict | None, float]], bool]:
    """For other ranks their heartbeats and what `quiet` was when this rank first saw that one; and whether this is the first rank that watches.

    Of lower ranks up to the first that watches; of all where none does: were all to read all, 512 ranks would read 262,144 files a period.
    """
    found = {}
    for rank in range(ranks.world):
        if rank != ranks.rank:
            beat = heartbeat.read(folder, rank)
            found[rank] = others[rank] if rank in others and others[rank][0] == beat else (beat, quiet)
            if rank < ranks.rank and beat and beat["armed"] and quiet - found[rank][1] < lives:
                return found, False
    return found, True


def _end(folder: Path, ranks: Ranks, timeout: float, quiet: float, others: dict, still: set[int], calls: list[int], period: float) -> None:
    """Does not return. others: what `_look` gave. still: the ranks whose heartbeats stand still, which cannot dump their stacks. calls: those that say it is a
    hang; of none, this rank is the one that calls it."""

    def tell(hang: str) -> None:
        heartbeat.write(folder, heartbeat.beat(ranks.rank, quiet, hang))

    def said(rank: int, *what: str) -> bool:
        return (heartbeat.read(folder, rank) or {}).get("hang") in what

    def dumped() -> bool:
        waiting.difference_update([rank for rank in waiting if said(rank, "stacks", "told")])
        return not waiting

    try:
        if not calls:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of an earlier hang
        _dump(folder, ranks)
        tell("stacks")
        if calls:
            _wait(lambda: said(calls[0], "told"), 6 * period + 4)
        else:
            waiting = set(others) - still
            _wait(dumped, 3 * period + 2)
            beats = {rank: heartbeat.read(folder, rank) or beat for rank, (beat, _) in others.items()} | {ranks.rank: heartbeat.beat(ranks.rank, quiet)}
            text = verdict(dict(sorted(beats.items())), still, timeout, folder / FOLDER)
            print(text, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                write_text(folder / FOLDER / "verdict.txt", text + "\n")
        tell("told")
    except BaseException:
        print(f"HANG: for {timeout:g} s (--hang_timeout) no rank has made progress; who holds the others up could not be said:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
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
