"""The whole line once, small, on two ranks through the deepspeed launcher; every test of this folder looks at what it left."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A launcher's main() called by a test leaves these behind, and its port is in use.
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

EVALUATE = ["--max_new_tokens", 8, "--per_device_eval_batch_size", 2, "--precision", "fp32"]


def run(*words, timeout=300, **environment) -> subprocess.CompletedProcess:
    """Run a command in the project's root; stdout and stderr together."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    env = {**inherited, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)


def deepspeed(*words, ranks=2) -> subprocess.CompletedProcess:
    """Run a launcher on `ranks` ranks; each call has a port of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return run("deepspeed", "--num_gpus", ranks, "--master_port", port, *words)


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """Folder with data, manifest, tokenizer, shards, tasks, pretrain, instruct and evaluate; a few steps each."""
    out = tmp_path_factory.mktemp("line")
    data, manifest, tokenizer, shards, tasks = (out / name for name in ("data", "manifest", "tokenizer", "shards", "tasks"))
    zero = {stage: ["--deepspeed", f"ds_configs/zero{stage}.json", "--logging_steps", 1] for stage in (1, 2)}

    def check(done: subprocess.CompletedProcess):
        assert done.returncode == 0, done.stdout[-4000:]

    python = [sys.executable, "-m"]
    check(run(*python, "toolkit.ecg.synthetic", "--out", data, "--records", 60, "--seed", 1))
    check(run(*python, "sharding.prepare", "ptbxl", "--root", data / "ptbxl", "--out", manifest))
    check(deepspeed("launchers/train_tokenizer.py", *zero[1], "--manifest", manifest, "--output_dir", tokenizer, "--max_steps", 3,
                    "--per_device_train_batch_size", 2, "--max_eval_samples", 4, "--precision", "fp32"))  # fmt: skip
    check(run(*python, "sharding.shard", "--manifest", manifest, "--tokenizer", tokenizer, "--out", shards, "--shard_size", 20))
    check(run(*python, "sharding.shard_tasks", "ecgqa", "--qa", data / "ecgqa", "--shards", shards, "--out", tasks))
    check(run(*python, "sharding.shard_tasks", "reports", "--shards", shards, "--out", tasks))
    check(deepspeed("launchers/pretrain.py", *zero[2], "--backbone", "tiny", "--shards", shards, "--output_dir", out / "pretrain",
                    "--max_steps", 4, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--precision", "fp32",
                    "--gain_tokens", "true", "--seq_len", 600))  # fmt: skip
    check(deepspeed("launchers/instruct.py", *zero[2], "--backbone", out / "pretrain", "--shards", tasks, "--output_dir", out / "instruct",
                    "--max_steps", 3, "--gradient_checkpointing", "full"))  # fmt: skip
    check(deepspeed("launchers/evaluate.py", "--model", out / "instruct", "--shards", tasks, "--split", "test", "--output_dir", out / "evaluate",
                    *EVALUATE))  # fmt: skip
    return out
