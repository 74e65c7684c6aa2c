"""What the processes of `engine.ordered_map` do in its tests: apart from them, so that a process starts without torch."""

import os
import signal

from toolkit.errors import UserError


def work(item):
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "fail":
        raise UserError("--x: said by a worker")
    return item * 2
