"""Stopping a run so that it can go on: SIGTERM, SIGUSR1 or a file STOP in the run folder. All ranks save and leave with exit code 85."""

import signal
from collections.abc import Callable
from pathlib import Path

REQUEUE = 85  # "saved, not finished: start me again"
HANG = 86  # "a hang, which the watchdog ended: start me again, from the newest checkpoint"
FILE = "STOP"


class Requeue(Exception):
    """The run was saved on request before its end."""


def listen(folder: Path, main: bool) -> Callable[[], bool]:
    """A function that says whether this process was asked to stop. The ranks must agree on the answer: a signal may reach one of them alone.

    main: whether this rank looks for the file: one look a step, however many ranks share a disk.
    """
    signals = []
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, lambda number, frame: signals.append(number))
    return lambda: bool(signals) or (main and (folder / FILE).exists())


def answered(folder: Path) -> None:
    """The file has done its work: the next start must not find it."""
    (folder / FILE).unlink(missing_ok=True)
