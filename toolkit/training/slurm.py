"""The place of a rank that `srun` started without another launcher:

    srun --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --kill-on-bad-exit=1 python launchers/pretrain.py ...

Without --cpus-per-task each rank gets one core. Without --kill-on-bad-exit=1 the other ranks wait for one that failed until --hang_timeout.
"""

import re
from collections.abc import Mapping


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT from SLURM_*; empty where this is no task of a step of several.

    A batch script and the shell of `salloc` have SLURM_PROCID too, but no step, and are alone. Variables: man srun, "OUTPUT ENVIRONMENT VARIABLES".
    """
    world = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" not in environment or world == "1":
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": world,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]))),
    }


def bound(environment: Mapping[str, str], cores: int) -> bool:
    """Whether the `cores` that this rank may use are its own: srun started it and gave it fewer than all that the step has on the node."""
    started = place(environment).get("WORLD_SIZE") == environment.get("WORLD_SIZE", "")  # or a launcher that srun started
    return started and cores < int(environment["SLURM_CPUS_ON_NODE"])


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node: "2(x3),1" is [2, 2, 2, 1]."""
    return [int(tasks) for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(nodes or 1))]


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: "gpu[03-05,9],login1" is gpu03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def port(job: int, step: int) -> int:
    """15000 to 29999, below the ports that Linux gives to connections (32768-60999). Jobs get different ones unless their numbers differ by a multiple of 1500,
    and so do ten steps of each."""
    return 15000 + job % 1500 * 10 + step % 10
