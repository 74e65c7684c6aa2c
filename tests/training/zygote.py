"""Launcher runs without their eight seconds of imports: `python -m tests.training.zygote` imports once and forks the ranks of every run.

Each line of stdin is a run, {"launcher", "world", "argv", "log", "before", "environment"}; it answers with the ranks' pids, and when all have ended with
their exit codes (negative: the signal). Like the deepspeed launcher it ends the others when one fails, here after 20 s.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from launchers import instruct, pretrain
from toolkit.training.distributed import launcher

LAUNCHERS = {"pretrain": pretrain, "instruct": instruct}


def rank(order: dict, number: int) -> int:
    """Be rank `number` of a run; returns the exit code."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": order["world"], "LOCAL_SIZE": order["world"], "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in {**places, **order["environment"]}.items()})
    sys.argv = [f"{order['launcher']}.py", *order["argv"]]
    for hook in order["before"]:
        exec(hook, dict(LAUNCHERS))  # a fault that the test plants
    try:
        launcher(LAUNCHERS[order["launcher"]].main)()
    except SystemExit as exit:
        return exit.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(pids: list[int]) -> list[int]:
    """Wait for all; returns their exit codes."""
    codes, killed_at = {}, None
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            killed_at = killed_at or time.time() + 20
            if time.time() > killed_at:
                for pid in set(pids) - set(codes):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def main() -> None:
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        order, pids = json.loads(line), []
        Path(order["log"]).parent.mkdir(parents=True, exist_ok=True)
        for number in range(order["world"]):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = rank(order, number)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(end(pids)), flush=True)


if __name__ == "__main__":
    main()
