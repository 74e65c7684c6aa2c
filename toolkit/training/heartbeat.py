"""Heartbeats: `heartbeats/rank-N.json` in the run folder says where each rank is, every few seconds, as long as its process runs.

The main thread only assigns what it does (`mark`, 0.3 us); a thread of the watchdog writes it (0.4 ms).
"""

import contextlib
import json
import os
import socket
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from toolkit.training import collectives
from toolkit.training.collectives import LAST

FOLDER = "heartbeats"
SAVING = ("checkpoint", "export")  # phases
LIBRARIES = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], collectives.__file__)


@dataclass
class Progress:
    """What the main thread does: optimizer steps done, phase, marks so far; armed: a step was completed since the process began."""

    step: int = 0
    phase: str = "start"
    marks: int = 0
    armed: bool = False


NOW = Progress()


def mark(phase: str | None = None) -> None:
    """The main thread moves: from here on it is in this phase (None: in the same). Phases: start, data, forward/backward, step, validation, checkpoint,
    export, end."""
    NOW.marks += 1
    if phase:
        NOW.phase = phase


def moved() -> int:
    """Changes whenever the main thread moves: by marks, by collectives and, while it saves, by what it writes. (A heartbeat writes 1 MiB in three hours.)"""
    return NOW.marks + LAST.number + (_written() if NOW.phase in SAVING else 0)


def _written() -> int:
    """MiB that this process has written: one rank may export a model for longer than --hang_timeout. 0 where the system does not count them."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counts["wchar"]) + int(counts["write_bytes"]) >> 20
    return 0


def mark_forwards(model) -> None:
    """Make every forward pass of a model, or of a part of it, progress: validation may generate for long."""
    for module in (model, *model.children()):
        module.register_forward_pre_hook(_forward)


def _forward(module, inputs) -> None:
    mark()


def beat(rank: int, quiet: float, hang: str = "") -> dict:
    """What a heartbeat says. quiet: seconds without progress. hang: "", "stacks" once they are dumped, "told" once the verdict is out.

    collective.seconds: since it was entered, or left. at: the main thread's innermost line outside of libraries.
    """
    name, number, size, inside, since = LAST.name, LAST.number, LAST.bytes, LAST.inside, LAST.since
    collective = {"name": name, "number": number, "bytes": size, "inside": inside, "seconds": round(time.perf_counter() - since, 1)} if number else None
    return {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()), "step": NOW.step, "phase": NOW.phase,
            "armed": NOW.armed, "progress": moved(), "quiet_seconds": round(quiet, 1), "collective": collective, "at": _place(), "hang": hang,
            "time": round(time.time(), 3)}  # fmt: skip


def write(folder: Path, what: dict) -> None:
    """Atomically, but not forced to the disk. An error is passed over: a run must not end of it."""
    path = folder / FOLDER / f"rank-{what['rank']}.json"
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(what) + "\n")
        partial.replace(path)


def read(folder: Path, rank: int) -> dict | None:
    """The newest heartbeat of a rank; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / FOLDER / f"rank-{rank}.json").read_text())


def trim(folder: Path, world: int) -> None:
    """Delete the heartbeats of ranks from `world` on: a run on more ranks left them behind."""
    for path in (folder / FOLDER).glob("*rank-*.json*"):
        number = path.name.split(".json")[0].rpartition("-")[2]  # rank-7.json, and .rank-7.json.partial of a rank that was killed as it wrote
        if number.isdigit() and int(number) >= world:
            path.unlink(missing_ok=True)


def remove(folder: Path, rank: int) -> None:
    """Delete the heartbeat of a rank."""
    with contextlib.suppress(OSError):
        for path in (folder / FOLDER / f"rank-{rank}.json", folder / FOLDER / f".rank-{rank}.json.partial"):
            path.unlink(missing_ok=True)


def leave(folder: Path, rank: int) -> None:
    """Delete the heartbeat of a rank at its end, and the folder with the last one. (At its start another rank may be about to write into the folder.)"""
    remove(folder, rank)
    with contextlib.suppress(OSError):  # it holds others
        (folder / FOLDER).rmdir()


def started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks since boot: with the pid it names a process for good. None if it is gone."""
    found = _stat(pid)
    return found[19] if found else None


def process_state(what: dict) -> str | None:
    """Linux's letter for the state of a heartbeat's process: R, S, D, T (stopped), ...; "gone" if it has ended; None if it is on another host."""
    if what["host"] != socket.gethostname():
        return None
    found = _stat(what["pid"])
    return "gone" if not found or found[19] != what["started"] or found[0] in "ZX" else found[0]


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on (proc(5): its third field)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _place() -> str:
    innermost = frame = sys._current_frames().get(threading.main_thread().ident)
    while frame and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""
