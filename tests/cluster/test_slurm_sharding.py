"""shard.sbatch: an array that is disturbed makes the bytes of one process. And tasks of it that are submitted again one by one."""

import signal

import pytest
import torch
import yaml
from filelock import FileLock

from sharding import line
from tests.cluster.test_slurm_jobs import cmdline, until
from tests.sharding.test_prepare import record, table
from tests.sharding.test_prepare import signal as random_walk
from tests.sharding.test_shard import sha256
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

pytestmark = [pytest.mark.slurm, pytest.mark.multinode]
RECORDS = 16


def test_an_array_of_which_one_task_is_killed_and_one_requeued_and_preempted(slurm, tmp_path):
    rows = [record(tmp_path / "root", i, random_walk(seed=i)) | {"strat_fold": 1 + i % 10, "report": f"sinus rhythm {i}"} for i in range(1, RECORDS + 1)]
    table(tmp_path / "root", rows)
    torch.manual_seed(0)
    ECGTokenizer(TokenizerConfig()).save_pretrained(tmp_path / "tokenizer")
    recipes = {}
    for name in ("alone", "array"):
        shard = {"source": "ptbxl", "root": "root", "tokenizer": "tokenizer", "out": f"{name}/d"}
        shard = {"workers": 1, "shard_size": 2, **{key: str(tmp_path / value) if key != "source" else value for key, value in shard.items()}}
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump({"shard": shard, "tasks": [{"kind": "reports", "out": str(tmp_path / name / "i")}]}))
    line.main([str(recipes["alone"])])

    def at_work() -> dict[str, object]:
        """Array task -> the process that shards."""
        found = [process for node in slurm.nodes.names for process in slurm.nodes.processes(node)]
        found = [process for process in found if cmdline(process)[1:3] == ["-m", "sharding.line"]]
        return {process.environ()["SLURM_ARRAY_TASK_ID"]: process for process in found}

    options = ["--cpus-per-task=1", "--mem=100M", f"--output={tmp_path}/%a.out"]
    job = slurm.submit("--array=0-1", *options, "launchers/slurm/shard.sbatch", recipes["array"])
    until(lambda: len(at_work()) == 2, "both tasks")
    at_work()["0"].send_signal(signal.SIGSTOP)
    at_work()["1"].kill()
    slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_0")
    assert slurm.wait(f"{job}_1", "FAILED", "COMPLETED")["Restarts"] == "0"
    until(lambda: slurm.show(f"{job}_0")["Restarts"] == "1" and at_work(), "its second start")
    (tmp_path / "other").write_text("#!/bin/sh\n")
    slurm.submit("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/other.out", tmp_path / "other")
    shown = slurm.wait(f"{job}_0", "COMPLETED", "FAILED", "CANCELLED")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "2"), (tmp_path / "0.out").read_text()
    assert "preempted: job" in (tmp_path / "0.out").read_text()
    assert slurm.show(f"{job}_1")["JobState"] == "FAILED" and not (tmp_path / "array/i").exists()

    # both again, as arrays of one each: both are rank 0 of 1, and wait for their turn
    with FileLock(tmp_path / "array/d/.rank-0-of-1.lock"):
        again = {number: slurm.submit(f"--array={number}", *options, "launchers/slurm/shard.sbatch", recipes["array"]) for number in (4, 5)}
        logs = [tmp_path / f"{number}.out" for number in again]
        until(lambda: all(log.exists() and "waits for its end" in log.read_text() for log in logs), "both to wait", 60)
    for number, job in again.items():
        assert slurm.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", (tmp_path / f"{number}.out").read_text()
    for folder in ("d/shards", "i"):
        assert sha256(tmp_path / "array" / folder) == sha256(tmp_path / "alone" / folder)
