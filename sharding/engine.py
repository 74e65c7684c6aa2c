"""What `prepare` and `shard` share: work cut into parts, over the cores of a machine and the ranks of a cluster.

A part (a shard, or some thousand records to check) belongs to one rank and ends with a completion file in OUT/parts/, which is written last. A
rerun skips what is complete, whatever the number of workers and ranks is now. Which rank finds the last part complete merges; two that
find it at once write the same bytes, and so do two that work on one part, as a job resubmitted beside the others of its array may.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from toolkit.errors import UserError
from toolkit.files import sweep, write_text

PARTS = "parts"
WITHOUT_TERMINAL = 60  # seconds between lines of progress in a log file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    rank, world = place()
    parser.add_argument(
        "--workers", type=int, default=cores, help="processes on this machine, one thread each (default: its cores, %(default)s); the bytes are the same"
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=rank,
        help="number of this machine among --world_size that share the work (default: of SLURM's step and array, or RANK, else 0)",
    )
    parser.add_argument(
        "--world_size",
        type=int,
        default=world,
        help="machines that run this command on the same --out (default: of SLURM's step and array, or WORLD_SIZE, else 1)",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew, in place of what --out holds")


def place() -> tuple[int, int]:
    """Rank and world size of this process, of its SLURM step and job array, or of RANK and WORLD_SIZE; alone it is 0 of 1.

    In an array each of its jobs holds as many ranks as its step has tasks. A job resubmitted as `--array=3` is an array of one, so it does all that
    is left. Raises UserError for an array with gaps, such as --array=3,5.
    """
    env = os.environ.get
    # Within srun the step's tasks, which may be fewer than the job's. A batch script has SLURM_PROCID too, but no step: it runs alone.
    step = env("SLURM_PROCID") and (env("SLURM_STEP_ID") or not env("SLURM_JOB_ID"))
    rank, world = (env("SLURM_PROCID"), env("SLURM_STEP_NUM_TASKS") or env("SLURM_NTASKS") or 1) if step else (0, 1)
    if not env("SLURM_ARRAY_TASK_ID"):
        return (int(rank), int(world)) if step else (int(env("RANK") or 0), int(env("WORLD_SIZE") or 1))
    task, first, last, apart, jobs = (int(env(f"SLURM_ARRAY_TASK_{name}")) for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))
    if jobs > 1 and (last - first) != apart * (jobs - 1):
        raise UserError(f"--array: its {jobs} numbers from {first} to {last} have gaps; --array=0-{jobs - 1} shares what is left among as many jobs")
    index = (task - first) // apart if jobs > 1 else 0
    return index * int(world) + int(rank), jobs * int(world)


def check_arguments(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise UserError("--workers: must be at least 1")
    if args.world_size < 1:
        raise UserError("--world_size: must be at least 1")
    if not 0 <= args.rank < args.world_size:
        raise UserError(
            f"--rank {args.rank}: must be 0 to {args.world_size - 1}, one less than --world_size (both are taken from SLURM or RANK and WORLD_SIZE if set)"
        )
    if args.overwrite and args.world_size > 1:
        raise UserError("--overwrite: one rank would delete what another has begun; delete --out before you start several ranks")


@contextlib.contextmanager
def claim(out: Path, arguments: dict, files: tuple[str, ...], args: argparse.Namespace) -> Iterator[Path]:
    """The folder of completion files in `out`, for work with these `arguments`; `files` are the patterns of what `out` may hold.

    Holds a lock for this rank as long as the block runs. Raises `UserError` naming --out if it cannot be written, holds something else, work
    begun with other arguments, or the same rank at work.
    """
    parts = out / PARTS
    said = parts / "arguments.json"
    lock = FileLock(parts / f"rank-{args.rank}-of-{args.world_size}.lock")  # freed by the system if this process is killed
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file: name a new folder")
        begun = said.exists()  # written first: without it nothing here is ours but an empty folder of a run killed in its first moment
        names = [path.name for path in sorted(out.glob("*")) if not any(path.match(pattern) for pattern in (*files, PARTS, ".*.partial") * begun)]
        if names and names != [PARTS]:
            raise UserError(f"--out {out} holds {names[0]}, which this program did not write: name a new folder")
        parts.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        if args.world_size == 1:
            for folder in (out, *(path for path in out.iterdir() if path.is_dir())):
                sweep(folder, "")
        before = _read(said)
        differs = [name for name in arguments if before.get(name) != arguments[name]] if begun and not args.overwrite else []
        if differs:
            was = f", {before[differs[0]]!r} and not {arguments[differs[0]]!r}" if differs[0] in before else ""
            lock.release()
            raise UserError(f"--out {out} was made with another {differs[0]}{was}: name a new folder or add --overwrite")
        if args.overwrite:
            for path in (*out.iterdir(), *parts.iterdir()):
                if path != parts and path.suffix != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if args.overwrite or not begun:
            write_text(said, json.dumps(arguments, indent=1) + "\n")
    except Timeout:  # two processes of the same rank would delete each other's unfinished files
        which = f"rank {args.rank} of {args.world_size} of this command" if args.world_size > 1 else "this command"
        raise UserError(f"--out {out}: {which} is at work there already: wait for it, or give each process its own --rank of one --world_size") from None
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        yield parts
    finally:
        lock.release()


def guarded(out: Path, write: Callable, *args):
    """Call write(*args); a full disk or a folder that cannot be written becomes a `UserError` naming --out."""
    try:
        return write(*args)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; mend that and run the same command again, it goes on from here") from error


def save(path: Path, text: str, out: Path) -> None:
    """Write a completion file."""
    guarded(out, write_text, path, text)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError):
        return {}


def share(parts: list, rank: int, world_size: int) -> list:
    """The parts of one rank. Every w-th and not a stretch: the last parts of a split are short."""
    return parts[rank::world_size]


def ordered_map(work: Callable, items: Iterable, workers: int, start: Callable | None = None, arguments: tuple = ()) -> Iterator:
    """`map(work, items)` over processes: results in the order of the items, only a few items ahead of what is consumed.

    start(*arguments) is called once in every process. One worker is this process itself.
    """
    if workers == 1:
        if start:
            start(*arguments)
        yield from map(work, items)
        return
    pending = deque()
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, spawn, _start_worker, (start, arguments)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError("--workers: a worker process was killed, most likely for lack of memory: run the same command with fewer") from None
        finally:
            for future in pending:
                future.cancel()


def _start_worker(start: Callable | None, arguments: tuple) -> None:
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    # A pool's worker does not notice that its parent was killed: it would wait for work for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()
    if start:
        start(*arguments)


def progress(total: int, done: int, desc: str) -> tqdm:
    """A bar with ECG/s and the time left; in a log file, a line a minute."""
    terminal = sys.stderr.isatty()
    pace = {} if terminal else {"mininterval": WITHOUT_TERMINAL, "maxinterval": WITHOUT_TERMINAL, "delay": WITHOUT_TERMINAL, "ascii": True}
    return tqdm(total=total, initial=done, desc=desc, unit=" ECGs", smoothing=0.05, **pace)
