"""Two nodes on one machine, and a real SLURM on them. They skip, and say why, where they cannot be made."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.nodes import Nodes
from tests.cluster.nodes import missing as missing_for_nodes
from tests.cluster.slurm import Slurm
from tests.cluster.slurm import missing as missing_for_slurm
from tests.training.conftest import corpus, task_corpus  # noqa: F401  fixtures

os.environ["PATH"] += ":/usr/sbin:/sbin"  # ip, munged and slurmctld are there; a shell of `su` without `-` has no such PATH


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """Head and nodes n1, n2 as network namespaces (tests/cluster/nodes.py); mark tests that use it with `multinode`.

    nodes.run("n1", ["hostname"]).stdout, nodes.popen("n2", [...], env=...), nodes.command("n1", [...]) for an argv of one's own; nodes.address["n1"];
    files are shared, as on a cluster's network disk. /etc/ssh of each lets root in: start `/usr/sbin/sshd -D -e` there for ssh or pdsh.
    """
    if problem := missing_for_nodes():
        pytest.skip(problem)
    made = Nodes()
    yield made
    made.close()


@pytest.fixture(scope="session")
def slurm(nodes) -> Iterator[Slurm]:
    """A SLURM of two nodes with 2 cores each and no GPU (tests/cluster/slurm.py), partitions low and high; mark tests that use it with `slurm`."""
    if problem := missing_for_slurm():
        pytest.skip(problem)
    made = Slurm(nodes)
    yield made
    made.close()
