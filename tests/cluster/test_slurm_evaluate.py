"""evaluate.sbatch: sent back into the queue it goes on with what is left. And the other batch scripts, as far as SLURM looks at them."""

import json
import shutil
import signal

import numpy as np
import pytest
import yaml

from tests.cluster.slurm import ROOT
from tests.cluster.test_slurm_jobs import cmdline, until
from toolkit.lm.backbone import save_stamp
from toolkit.shards.writer import write_index, write_split
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

pytestmark = [pytest.mark.slurm, pytest.mark.multinode]
ECGS = 24


@pytest.fixture
def made(task_corpus, tmp_path):
    """Folder with `reports`, task shards with a report for each of 24 ECGs and their tokenizer, and `model`, which was never trained."""
    (folder := tmp_path / "reports").mkdir()
    tokenizer = ECGTokenizer(TokenizerConfig())
    tokenizer.save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)

    def samples(split, n):
        for i in range(n):
            of_each = {"patients": [f"{split}_{i}"], "gains": [[0.1] * 12], "ages": [50.0], "sexes": ["male"], "record_ids": [f"{split}{i}"]}
            tasks = [{"id": f"report-{split}-{i}", "task": "report", "question_type": "report", "report": "sinus rhythm with beats"}]
            codes = rng.integers(0, 1296, (1, 313)).astype(np.uint16)
            yield f"{split}_{i:03d}", codes, {"source": "made", "split": split, "tasks": tasks, **of_each}

    splits = {split: {**write_split(folder, split, list(samples(split, n)), 16), "tasks": {"report": n}} for split, n in (("train", 8), ("valid", ECGS))}
    write_index(
        folder, splits, kind="tasks", made_from="0" * 16, codes=1296, levels=[6] * 4, tokens_per_ecg=313, shard_size=16, tokenizer=tokenizer.fingerprint()
    )
    shutil.copytree(task_corpus / "known", tmp_path / "model")
    save_stamp(tmp_path / "model", json.loads((folder / "index.json").read_text()), knows_text=True)
    return tmp_path


def test_requeued_it_goes_on_with_what_is_left(slurm, made):
    out, log = made / "out", made / "batch.out"
    paths = {"model": str(made / "model"), "shards": str(made / "reports"), "output_dir": str(out)}
    others = {"split": "valid", "precision": "fp32", "controls": "words", "max_new_tokens": 32, "per_device_eval_batch_size": 1}
    (made / "evaluate.yaml").write_text(yaml.safe_dump(paths | others))
    options = ["--nodes=1", "--gpus-per-node=0", f"--output={log}"]
    job = slurm.submit(*options, "launchers/slurm/evaluate.sbatch", made / "evaluate.yaml")

    def answers() -> int:
        return (out / "predictions.jsonl").read_text().count("\n") if (out / "predictions.jsonl").is_file() else 0

    def freeze_after(count: int) -> None:
        until(lambda: answers() > count or slurm.show(job)["JobState"] == "FAILED", f"answer {count + 1}")
        ranks = [process for node in slurm.nodes.names for process in slurm.nodes.processes(node) if "launchers/evaluate.py" in cmdline(process)[2:3]]
        for process in ranks:
            process.send_signal(signal.SIGSTOP)
        assert count < answers() < ECGS and not (out / "metrics.json").exists(), log.read_text()

    freeze_after(0)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    until(lambda: slurm.show(job)["Restarts"] == "1", "a restart")
    freeze_after(answers())
    (out / "metrics.json").write_text('{"run": {}}')  # of an earlier evaluation
    slurm.call("scancel", "--signal=TERM", job)  # to the step alone, as before a preemption: it leaves with 0 for srun
    shown = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "2"), log.read_text()
    rows = [json.loads(text) for text in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == ECGS


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "launchers/slurm").glob("*.sbatch")))
def test_slurm_takes_it_but_for_the_gpus_that_are_not_here(slurm, name):
    small = [] if name == "shard.sbatch" else ["--gpus-per-node=0"]
    slurm.call("sbatch", "--test-only", "--cpus-per-task=1", "--mem=100M", *small, f"launchers/slurm/{name}", "recipes/ptbxl-line.yaml")
    assert f"#   sbatch launchers/slurm/{name} recipes/" in (ROOT / "launchers/slurm" / name).read_text()  # the command that its first lines show
