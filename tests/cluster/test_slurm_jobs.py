"""The shipped batch scripts on a real SLURM: whatever ends a job before its time, it goes on and ends with the losses of a run that nothing disturbed."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.slurm import HEAD, ROOT, Slurm
from tests.training.conftest import losses

pytestmark = [pytest.mark.slurm, pytest.mark.multinode]
STEPS = 40
RECIPE = """backbone: {backbone}
shards: {corpus}/shards
deepspeed: ds_configs/zero1.json
seq_len: 350
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
max_steps: {steps}
logging_steps: 1
save_steps: 5
max_eval_samples: 2
precision: fp32
"""


def until(true: Callable[[], bool], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def cmdline(process: psutil.Process) -> list[str]:
    """Empty for one that ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def steps(folder: Path) -> int:
    """The newest step in the log of a run that may not have begun."""
    return max(losses(folder), default=0) if (folder / "log.jsonl").is_file() else 0


@pytest.fixture(scope="session")
def recipe(corpus, task_corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "pretrain.yaml"
    path.write_text(RECIPE.format(backbone=task_corpus / "known", corpus=corpus, steps=STEPS))
    return path


@pytest.fixture(scope="session")
def undisturbed(recipe, slurm, tmp_path_factory) -> dict[int, float]:
    """step -> loss of two ranks that the deepspeed launcher starts on this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ["deepspeed", "--num_gpus", "2", "--master_port", "14999", "launchers/pretrain.py", "--recipe", recipe, "--output_dir", folder]
    subprocess.run(words, cwd=ROOT, env=slurm.environment, check=True, capture_output=True, timeout=300)
    return losses(folder)


@pytest.fixture
def run(slurm, recipe, tmp_path):
    return Run(slurm, recipe, tmp_path)


class Run:
    """Jobs of pretrain.sbatch in one run folder."""

    def __init__(self, slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
        self.slurm, self.recipe, self.folder, self.log = slurm, recipe, tmp_path / "run", tmp_path / "batch.out"

    def submit(self, *options, arguments=(), **environment) -> str:
        options = ["--gpus-per-node=0", f"--output={self.log}", *options]
        return self.slurm.submit(*options, "launchers/slurm/pretrain.sbatch", self.recipe, "--output_dir", self.folder, *arguments, **environment)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train; not their launchers."""
        found = [process for node in self.slurm.nodes.names for process in self.slurm.nodes.processes(node)]
        return [process for process in found if str(self.folder) in (words := cmdline(process)) and words[2] == "launchers/pretrain.py"]

    def freeze_after(self, step: int) -> None:
        """Stop its ranks in mid-run, however fast or slow the machine is. SIGCONT wakes them, which SLURM sends with each SIGTERM."""
        until(lambda: steps(self.folder) >= step, f"step {step}")
        self.signal(signal.SIGSTOP)
        assert step <= steps(self.folder) < STEPS

    def signal(self, number: int) -> None:
        for process in self.ranks():
            process.send_signal(number)


def test_preempted_requeued_and_out_of_time_it_ends_with_the_losses_of_an_undisturbed_run(slurm, run, undisturbed, tmp_path):
    """One job, four starts. What preempts it is a user's mistake, which ends with a readable error on its own."""
    job = run.submit("--time=60")
    run.freeze_after(3)
    mistake = Run(slurm, run.recipe, tmp_path / "mistake")
    mistake.log.parent.mkdir()
    other = mistake.submit("--partition=high", arguments=["--seq_len", 100])
    assert slurm.wait(job, "PENDING", "COMPLETED")["JobState"] == "PENDING"  # saved within the grace time, and not over for it
    assert "stopped on request" in (logs := "\n".join(path.read_text() for path in (run.folder / "logs").glob("*-0-n1.log"))), logs
    assert slurm.wait(other, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert re.search(r"error: node n\d failed first: exit code 2.*\nerror: --seq_len 100 ", mistake.log.read_text())

    run.freeze_after(12)
    slurm.call("scontrol", "requeue", job)
    until(lambda: slurm.show(job)["Restarts"] == "2", "a second restart")

    run.freeze_after(22)
    elapsed = [int(part) for part in slurm.show(job)["RunTime"].split(":")]
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed[-2] + 3}")  # less than the 180 s of --signal and more than 120 s from now
    until((run.folder / "STOP").exists, "the signal before the time limit")
    run.signal(signal.SIGCONT)
    slurm.wait(job, "PENDING", "COMPLETED", "TIMEOUT")
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    shown = slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "3"), run.log.read_text()
    assert losses(run.folder) == pytest.approx(undisturbed, rel=1e-6)
    assert len(list((run.folder / "logs").glob(f"{job}-*-n?.log"))) == 8  # one a node and start
    assert run.log.read_text().count("not finished: ") == 2 and "complete: " in run.log.read_text()


def test_unanswered_before_its_time_is_up_and_when_a_node_fails_it_goes_back_into_the_queue(slurm, run, undisturbed):
    job = run.submit("--time=60")
    run.freeze_after(7)  # as in a validation that takes too long
    elapsed = [int(part) for part in slurm.show(job)["RunTime"].split(":")]
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed[-2] + 2}")
    until(lambda: slurm.show(job)["Restarts"] == "1", "the last half minute")
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert "a validation or an export takes longer than the time that is left: job" in run.log.read_text()

    run.freeze_after(17)
    slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")  # until its slurmd says that it lives (ReturnToService)
    shown = slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "2"), run.log.read_text()
    assert losses(run.folder) == pytest.approx(undisturbed, rel=1e-6)


def test_starts_that_save_nothing_come_to_an_end(slurm, run):
    """Asked to stop before the first step, at each start. While there is time left that is no error: a user, or a job of higher priority, may have asked."""
    job = run.submit("--nodes=1", "--time=60")

    def ask_at(start: str) -> None:
        until(lambda: run.log.exists() and f"{start}: pretrain" in run.log.read_text(), start)
        slurm.call("scancel", "--batch", "--signal=USR1", job)

    ask_at("start 0")
    ask_at("start 1")
    until(lambda: slurm.show(job)["Restarts"] == "2", "a second restart")
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=4")  # as with a --time that is hardly more than --signal
    ask_at("start 2")
    ask_at("start 3")
    shown = slurm.wait(job, "FAILED", "COMPLETED")
    assert (shown["ExitCode"], shown["Restarts"]) == ("1:0", "3"), run.log.read_text()
    assert "error: nothing was saved within --time, at two starts in a row" in run.log.read_text()
    assert not (run.folder / "STOP").exists() and steps(run.folder) == 0


def test_what_ends_without_a_result_is_neither_complete_nor_started_for_ever(slurm, run):
    job = run.submit("--nodes=1", arguments=["--help"])
    shown = slurm.wait(job, "FAILED", "COMPLETED", seconds=120)
    assert (shown["ExitCode"], shown["Restarts"]) == ("1:0", "0")
    assert "error: pretrain ended without " in run.log.read_text(), run.log.read_text()


def test_scancel_stays_cancelled_though_the_ranks_save(slurm, run):
    """One node with two ranks."""
    job = run.submit("--nodes=1", RANKS_PER_NODE="2")
    run.freeze_after(3)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED")
    until(lambda: not run.ranks(), "the ranks' end")
    time.sleep(2)  # a requeue would show by now
    assert slurm.show(job)["JobState"] == "CANCELLED" and slurm.show(job)["Restarts"] == "0"
    assert "stopped on request" in next((run.folder / "logs").glob("*.log")).read_text()


def test_a_killed_rank_ends_the_job_on_all_nodes(slurm, run):
    job = run.submit()
    run.freeze_after(3)
    victim = next(process for process in run.ranks() if process.pid in {one.pid for one in slurm.nodes.processes("n2")})
    victim.kill()
    run.signal(signal.SIGCONT)
    shown = slurm.wait(job, "FAILED", "COMPLETED", seconds=120)
    said = run.log.read_text()
    assert shown["JobState"] == "FAILED" and shown["Restarts"] == "0"
    assert re.search(r"error: node n2 failed first: a rank killed by signal 9 ", said) and "-n2.log says:" in said, said
    until(lambda: not run.ranks(), "the ranks' end", 30)


def test_srun_alone(slurm, run, undisturbed):
    """Ranks from SLURM_*: no launcher, no batch script. Asked to stop it ends with 85, though the first rank to leave makes srun send SIGTERM to the other."""
    command = ["srun", "-N", 2, "-n", 2, "--cpus-per-task=1", "--kill-on-bad-exit=1", sys.executable, "launchers/pretrain.py", "--recipe", run.recipe]
    command += ["--output_dir", run.folder]
    with open(run.log, "w") as log:
        first = slurm.nodes.popen(HEAD, command, env=slurm.environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        until(lambda: steps(run.folder) >= 3 or first.poll() is not None, "step 3")
        (run.folder / "STOP").touch()
        assert first.wait(120) == 85, run.log.read_text()
    assert steps(run.folder) < STEPS
    slurm.call(*command)
    assert losses(run.folder) == pytest.approx(undisturbed, rel=1e-6)


def script(slurm, tmp_path, text: str, *options) -> str:
    """Submit a batch script that goes on from common.sh."""
    (tmp_path / "own.sbatch").write_text(f"#!/usr/bin/env bash\nsource launchers/slurm/common.sh r.yaml\n{text}\n")
    return slurm.submit("--requeue", "--open-mode=append", f"--output={tmp_path}/own.out", *options, tmp_path / "own.sbatch")


def test_requeued_though_the_controller_is_away_for_a_while(slurm, tmp_path):
    text = f'if [ "${{SLURM_RESTART_COUNT:-0}}" -eq 1 ]; then exit 0; fi\nuntil [ -e {tmp_path}/go ]; do sleep 0.1; done\nrequeue "a test"'
    job = script(slurm, tmp_path, text)
    slurm.wait(job, "RUNNING")
    slurm.stop_controller()
    try:
        (tmp_path / "go").touch()
        until(lambda: "error: " in (tmp_path / "own.out").read_text(), "the first attempt")  # scontrol's
    finally:
        slurm.start_controller()
    shown = slurm.wait(job, "COMPLETED", "FAILED")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "own.out").read_text()
    assert f"a test: job {job} goes back into the queue" in (tmp_path / "own.out").read_text()


def test_tasks_get_what_the_script_exports_whatever_sbatch_exports(slurm, tmp_path):
    job = script(slurm, tmp_path, """srun bash -c 'echo "$RANKS_PER_NODE $PATH"'""", f"--export=SLURM_CONF={slurm.folder}/slurm.conf,RANKS_PER_NODE=3")
    slurm.wait(job, "COMPLETED")
    assert (tmp_path / "own.out").read_text().startswith(f"3 {ROOT}/.venv/bin:")


def test_from_elsewhere_or_without_a_recipe_it_says_so(slurm, tmp_path):
    jobs = {}
    for name, options, words in (("elsewhere", [f"--chdir={tmp_path}"], ["r.yaml"]), ("bare", [], []), ("unknown", [], ["no.yaml"])):
        jobs[name] = slurm.submit("--gpus-per-node=0", "--nodes=1", f"--output={tmp_path}/{name}.out", *options, "launchers/slurm/pretrain.sbatch", *words)
    for name, message in (
        ("elsewhere", "error: submit it from the project's root"),
        ("bare", "error: name a recipe"),
        ("unknown", "error: --recipe: no.yaml cannot"),
    ):
        assert slurm.wait(jobs[name], "FAILED", "COMPLETED", seconds=60)["ExitCode"] == "2:0"
        assert message in (tmp_path / f"{name}.out").read_text()
