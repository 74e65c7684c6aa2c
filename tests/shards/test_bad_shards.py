"""--on_bad_shard on two ranks of two nodes, each with a copy of the shards of its own and damage of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.shards.writer import write_index, write_split
from toolkit.training.shards import open_shards

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = [(f"s_{i:04d}", np.full((1, 5), i, np.uint16), {"n": i}) for i in range(40)]
RANK = """
import json, sys
from types import SimpleNamespace
from toolkit.errors import UserError
from toolkit.training.distributed import launcher
from toolkit.training.shards import open_shards

def main():
    args = SimpleNamespace(shards=sys.argv[1], on_bad_shard="skip", bad_shard_budget=0.19, shard_cache="cache", shard_cache_gb=1.0)
    try:
        open_shards(args, ["train", "valid"], "tokens")
    except UserError as error:
        print("over:", error)
    args.bad_shard_budget = 0.2
    (train, valid), skipped = open_shards(args, ["train", "valid"], "tokens")
    print(json.dumps({"skipped": skipped, "train": [train.meta(i)["n"] for i in range(len(train))], "valid": len(valid)}))

launcher(main)()
"""


@pytest.fixture
def copies(tmp_path):
    """The same 10 shards of train (and one of valid) on two nodes: shard 3 is missing on the first, a bit of shard 7 is wrong on the second."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    nodes[0].mkdir()
    splits = {"train": write_split(nodes[0], "train", SAMPLES, 4), "valid": write_split(nodes[0], "valid", SAMPLES[:3], 4)}
    write_index(nodes[0], splits, kind="tokens", codes=1296)
    shutil.copytree(nodes[0], nodes[1])
    (nodes[0] / "train-000003.tar").unlink()
    data = bytearray((nodes[1] / "train-000007.tar").read_bytes())
    data[-1] ^= 1  # in the padding at the end: nobody reads it, but the file is not the one that was made
    (nodes[1] / "train-000007.tar").write_bytes(data)
    return nodes


def test_ranks_agree_on_the_shards_that_are_left_out_and_on_the_budget(copies):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank, node in enumerate(copies):
        env = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        ranks.append(subprocess.Popen([sys.executable, "-c", RANK, str(node)], cwd=ROOT, env={**os.environ, **{k: str(v) for k, v in env.items()}},
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))  # fmt: skip
    (first, err, code), (second, *_) = [(*rank.communicate(timeout=120), rank.returncode) for rank in ranks]
    assert code == 0, err
    lost = "2 of 10 shards of train are bad, 8 samples or 20 %: train-000003.tar, train-000007.tar"
    left = [i for i in range(40) if i // 4 not in (3, 7)]
    expected = {"skipped": {"train": ["train-000003.tar", "train-000007.tar"], "valid": []}, "train": left, "valid": 3}
    for out in (first, second):
        lines = out.splitlines()
        assert json.loads(lines[-1]) == expected
        over = next(line for line in lines if line.startswith("over:"))
        assert over.startswith(f"over: --shards: {lost}; mend them") and over.endswith("or raise --bad_shard_budget, now 0.19")
    assert f"{lost}; training without them" in first.splitlines() and "training without" not in second


def test_error_is_the_default_and_sees_sizes_alone(copies):
    args = [SimpleNamespace(shards=str(node), on_bad_shard="error", shard_cache="cache", shard_cache_gb=1.0) for node in copies]
    with pytest.raises(UserError, match="node0/train-000003.tar is missing; copy it again, or delete it"):
        open_shards(args[0], ["train"], "tokens")
    (train,), skipped = open_shards(args[1], ["train"], "tokens")
    assert len(train) == 40 and skipped == {"train": []}
