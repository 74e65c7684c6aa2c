"""The place of a rank from what srun says."""

import pytest

from toolkit.training.slurm import first_host, place, port, tasks_per_node

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
