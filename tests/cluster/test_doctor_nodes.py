"""The doctor between two nodes: it names the node whose --output_dir is another folder, and an address that only one node can reach."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.training.distributed import RANK_VARIABLES

pytestmark = pytest.mark.multinode

ROOT = Path(__file__).resolve().parents[2]
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'


def start(nodes, rank: int, words: list, **place) -> subprocess.Popen:
    """`python -m toolkit.doctor --json` as rank 0 on n1 or 1 on n2; words: what stands before it."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, **place}
    env |= {name: str(value) for name, value in place.items()}
    command = [*words, sys.executable, "-m", "toolkit.doctor", "--json", "--timeout", 120, "--output_dir", nodes.folder / "run"]
    return nodes.popen(nodes.names[rank], command, cwd="/", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_folder_that_is_not_shared(nodes):
    (nodes.folder / "run").mkdir()
    hidden = ["sh", "-c", HIDE, nodes.folder / "run"]
    both = [start(nodes, 0, [], MASTER_ADDR="n1", MASTER_PORT=29511), start(nodes, 1, hidden, MASTER_ADDR="n1", MASTER_PORT=29511)]
    out, said = zip(*(process.communicate(timeout=400) for process in both))
    assert [process.returncode for process in both] == [1, 1], said  # every node's script sees that something is wrong
    report = json.loads(out[0])
    assert report["hosts"] == {"n1": [0], "n2": [1]} and not out[1]
    found = {finding["check"]: finding for finding in report["findings"] if finding["status"] == "error"}
    assert list(found) == ["shared folder"] and f"{nodes.folder / 'run'} is another folder on n2" in found["shared folder"]["text"]
    assert "n1: 0, n2: 1" in next(finding["text"] for finding in report["findings"] if finding["check"] == "placement")
    assert all(row["right"] and row["bus_gb_s"] > 0 for row in report["measured"]["all_reduce"])
    assert not list((nodes.folder / "run").iterdir())


def test_an_address_that_only_its_own_node_can_reach(nodes):
    process = start(nodes, 0, [], MASTER_ADDR="localhost", MASTER_PORT=29512)
    report = json.loads(process.communicate(timeout=200)[0])
    (found,) = (finding for finding in report["findings"] if finding["check"] == "names" and finding["status"] == "error")
    assert process.returncode == 1 and "127.0.0.1" in found["text"] and f"--master_addr {nodes.address['n1']}" in found["mend"]
