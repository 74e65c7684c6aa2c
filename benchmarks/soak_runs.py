"""The runs of benchmarks/soak.py: launches of the deepspeed launcher, watched from outside, and the faults that strike them."""

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults import (
    COMPLETE,
    FAULTS,
    MARK,
    MISTAKE,
    RUNNING,
    Fault,
    Launch,
    Pace,
    bad_shard,
    full_disk,
    last_step,
    living,
    moment_of,
    whole_checkpoints,
)
from benchmarks.soak_checks import LIMITED, wall_times
from benchmarks.turns import RANKS, ROOT, words_of

LIMIT = 240.0  # seconds within which a launch must have ended of its fault; the launcher alone gives ranks 30 to end
HANG_TIMEOUT = 20  # seconds; a step takes half a one, twice that where other programs run
SAVE_STEPS, EVAL_STEPS = 10, 25


@dataclass
class Scene:
    """What all launches of a soak share. `struck`: the faults so far, as soak.json has them; `problems`: what must not be."""

    out: Path
    shards: Path
    disk: Path | None
    steps: int
    value: str  # of MARK in the environment of all that is started
    began: float = field(default_factory=time.monotonic)
    struck: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    launches: int = 0

    def say(self, text: str) -> None:
        seconds = round(time.monotonic() - self.began)
        print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}", flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.say(f"PROBLEM: {text}")


def start(scene: Scene, folder: Path) -> Launch:
    """The same command each time, but for the port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = {
        "deepspeed": ROOT / "ds_configs" / "zero2.json", "backbone": "tiny", "shards": scene.shards, "output_dir": folder, "max_steps": scene.steps,
        "seq_len": 400, "precision": "fp32", "logging_steps": 1, "save_steps": SAVE_STEPS, "save_total_limit": LIMITED, "eval_steps": EVAL_STEPS,
        "max_eval_samples": 16, "hang_timeout": HANG_TIMEOUT,
    }  # fmt: skip
    environment = {**os.environ, MARK: scene.value, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", RANKS, "--master_port", port, "launchers/pretrain.py", *words_of(arguments)]
    scene.launches += 1
    log = scene.out / "logs" / f"{scene.launches:03d}.txt"
    log.parent.mkdir(exist_ok=True)
    seen = (folder / "log.jsonl").stat() if (folder / "log.jsonl").exists() else None
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    return Launch(process, folder, log, scene.value, seen)


def stop_all(value: str) -> None:
    """End everything that was started with MARK=value."""
    for process in living(value):
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(living(value), timeout=10)


def waiter(launch: Launch, watch: Callable[[], None]) -> Callable[..., bool]:
    """wait(condition, seconds, pause): until it holds (True), or the seconds are over or the launch has ended (False). `watch` is called all the time."""

    def wait(condition: Callable[[], bool], seconds: float = LIMIT, pause: float = 0.02) -> bool:
        end = time.monotonic() + seconds
        while launch.process.poll() is None and time.monotonic() < end:
            watch()
            if condition():
                return True
            time.sleep(pause)
        return False

    return wait


def undisturbed(scene: Scene) -> Pace:
    """The run that nothing strikes, in out/undisturbed. Raises RuntimeError with the end of its output if it does not complete."""
    launch, began = start(scene, scene.out / "undisturbed"), time.time()
    if launch.process.wait():
        raise RuntimeError(f"the undisturbed run failed with exit code {launch.process.returncode}:\n{launch.text()[-4000:]}")
    times = wall_times(launch.folder)
    each = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
    step = statistics.median(each.values())
    validations = [seconds - step for at, seconds in each.items() if at % EVAL_STEPS == 0]
    return Pace(times[1] - began, step, max(0.0, statistics.median(validations)), scene.steps, EVAL_STEPS)


def disturbed(scene: Scene, folder: Path, pace: Pace, faults: Iterator[Fault], until: float) -> None:
    """A run under faults, started again until it is complete; after time.monotonic() `until` nothing strikes any more."""
    pending: list[dict] = []  # faults whose run is not yet further than their launch came

    def watch() -> None:
        if pending and time.monotonic() - watch.last > 0.2:
            watch.last, step = time.monotonic(), last_step(folder)
            for event in [event for event in pending if step > event["reached"]]:
                event["further_after"] = round(time.monotonic() - event["clock"], 1)
                pending.remove(event)

    watch.last = 0.0
    newest, idle = 0, 0
    while True:
        struck = len(scene.struck)
        fault = next(faults, None) if time.monotonic() < until else None
        if fault and fault.kind == "bad shard":
            with bad_shard(scene.shards, fault.share) as path:
                launch = start(scene, folder)
                strike(scene, launch, fault, pace, waiter(launch, watch), pending)
                if launch.process.returncode == MISTAKE and path.name not in launch.text():
                    scene.problem(f"{launch.log.name}: the damaged shard {path.name} is not named")
        else:
            launch = start(scene, folder)
            wait = waiter(launch, watch)
            while launch.process.poll() is None:
                if not fault:
                    wait(lambda: False, LIMIT + 20 * scene.steps * pace.step)
                    if launch.process.poll() is None:
                        scene.problem(f"{launch.log.name}: nothing struck it and it does not end")
                        stop_all(scene.value)
                        launch.process.wait()
                else:
                    strike(scene, launch, fault, pace, wait, pending)
                    fault = next(faults, None) if time.monotonic() < until and launch.process.poll() is None else None
        after_launch(scene, launch)
        whole = max(whole_checkpoints(folder), default=0)
        if whole < newest:
            scene.problem(f"{launch.log.name}: checkpoint-{newest} was there before, now checkpoint-{whole} is the newest")
        newest = max(newest, whole)
        if (folder / "train_results.json").exists() and launch.process.returncode == COMPLETE:
            for event in pending:
                event["further_after"] = round(time.monotonic() - event["clock"], 1)
            return
        idle = 0 if len(scene.struck) > struck else idle + 1
        if idle == 3:
            raise RuntimeError(f"three launches in a row, which nothing struck, did not complete:\n{launch.text()[-4000:]}")


def strike(scene: Scene, launch: Launch, fault: Fault, pace: Pace, wait: Callable[..., bool], pending: list[dict]) -> None:
    """One fault, from its moment until the launch has ended of it or has lived through it."""
    kind = FAULTS[fault.kind]
    moment = moment_of(fault, launch, pace, wait) if kind.strike or fault.kind == "full disk" else "start"
    if launch.process.poll() is not None and fault.kind != "bad shard":
        return  # ended before: the fault did not strike
    event = {"launch": scene.launches, "kind": fault.kind, "moment": moment, "step": last_step(launch.folder), "clock": time.monotonic()}
    if fault.kind == "full disk":
        with full_disk(scene.disk) as fill:
            wait(fill, 5 + 15 * fault.share, pause=0.05)
        freed = last_step(launch.folder)
        wait(lambda: last_step(launch.folder) > freed)
    else:
        if kind.strike:
            kind.strike(launch, fault)
        if wait(lambda: False) or launch.process.poll() is None:
            stop_all(scene.value)
            launch.process.wait()
            scene.problem(f"{launch.log.name}: {fault.kind} ({moment}): the job did not end within {LIMIT:.0f} seconds")
    event["code"], event["reached"] = launch.process.poll(), last_step(launch.folder)
    event["ended_after"] = None if event["code"] is RUNNING else round(time.monotonic() - event["clock"], 1)
    scene.struck.append(event)
    if event["code"] is RUNNING:
        event["further_after"] = round(time.monotonic() - event["clock"], 1)
    else:
        pending.append(event)
    allowed = kind.codes + (kind.early if moment == "start" else ())
    if event["code"] == COMPLETE and (launch.folder / "train_results.json").exists():  # it had nothing left to do
        allowed += (COMPLETE,)
    if event["code"] not in allowed:
        scene.problem(f"{launch.log.name}: {fault.kind} ({moment}) ended with exit code {event['code']}, not {' or '.join(map(str, allowed))}")
    said = "goes on" if event["code"] is RUNNING else f"exit code {event['code']} after {event['ended_after']:.0f} s"
    scene.say(f"launch {scene.launches}: {fault.kind} ({moment}), step {event['step']} of {scene.steps}: {said}")


def after_launch(scene: Scene, launch: Launch) -> None:
    """Nothing of a launch may live on."""
    end = time.monotonic() + 5
    while (left := living(scene.value)) and time.monotonic() < end:
        time.sleep(0.1)
    if left:
        names = ", ".join(f"{process.pid} ({process.status()})" for process in left if process.is_running())
        scene.problem(f"{launch.log.name}: processes live on after it: {names}")
        stop_all(scene.value)
    with contextlib.suppress(ChildProcessError):  # orphans come to the first process of a name space
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
