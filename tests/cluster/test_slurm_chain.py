"""launchers/submit.py on a real SLURM: sharding as an array, then pretraining on two nodes with what it made."""

import re
import sys

import pytest
import torch
import yaml

from tests.sharding.test_prepare import record, table
from tests.sharding.test_prepare import signal as random_walk
from toolkit.shards.reader import read_index
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

pytestmark = [pytest.mark.slurm, pytest.mark.multinode]
RECORDS = 16


@pytest.fixture
def recipe(corpus, tmp_path):
    """A recipe of two stages; its ECGs are there, its tokenizer is an empty folder."""
    rows = [record(tmp_path / "root", i, random_walk(seed=i)) | {"strat_fold": 1 + i % 10, "report": f"sinus rhythm {i}"} for i in range(1, RECORDS + 1)]
    table(tmp_path / "root", rows)
    (tmp_path / "tokenizer").mkdir()
    shard = {"source": "ptbxl", "root": "root", "tokenizer": "tokenizer", "out": "d"}
    shard = {key: value if key == "source" else str(tmp_path / value) for key, value in shard.items()} | {"workers": 1, "shard_size": 2}
    pretrain = {
        "backbone": str(corpus / "backbone"), "shards": str(tmp_path / "d/shards"), "output_dir": str(tmp_path / "p"), "deepspeed": "ds_configs/zero1.json",
        "seq_len": 350, "max_steps": 2, "logging_steps": 1, "max_eval_samples": 1, "precision": "fp32", "report_targets": "no",
    }  # fmt: skip
    (tmp_path / "line.yaml").write_text(yaml.safe_dump({"shard": shard, "pretrain": pretrain}))
    return tmp_path / "line.yaml"


def submit(slurm, recipe) -> list[str]:
    """Numbers of the jobs."""
    further = ["--cpus-per-task=1", "--mem=500M", f"--output={recipe.parent}/%x-%a.out"]
    words = [recipe, "--nodes", 2, "--gpus_per_node", 0, "--shard_jobs", 2, "--", *further]
    said = slurm.call(sys.executable, "launchers/submit.py", *words)
    return re.search(r"scancel ([\d ]+)", said)[1].split()


def test_a_chain_of_sharding_and_pretraining(slurm, recipe, tmp_path):
    torch.manual_seed(0)
    ECGTokenizer(TokenizerConfig()).save_pretrained(tmp_path / "tokenizer")
    shard, pretrain = submit(slurm, recipe)
    shown = slurm.show(pretrain)
    assert (shown["JobState"], shown["Reason"]) == ("PENDING", "Dependency") and shown["JobName"] == "line-pretrain"
    shown = slurm.wait(pretrain, "COMPLETED", "FAILED", "CANCELLED")
    assert shown["JobState"] == "COMPLETED", "".join(path.read_text() for path in tmp_path.glob("*.out"))
    assert [slurm.show(f"{shard}_{task}")["JobState"] for task in range(2)] == ["COMPLETED"] * 2
    assert read_index(tmp_path / "d/shards")["encoded"] == RECORDS
    assert (tmp_path / "p/train_results.json").is_file() and len(list((tmp_path / "p/logs").glob("*-n[12].log"))) == 2


def test_what_stands_after_a_failed_stage_is_cancelled_and_not_left_to_wait(slurm, recipe, tmp_path):
    shard, pretrain = submit(slurm, recipe)
    assert slurm.wait(pretrain, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "CANCELLED"
    assert "error: " in (tmp_path / "line-shard-0.out").read_text() and not (tmp_path / "p").exists()
