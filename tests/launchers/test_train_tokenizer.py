"""Training the tokenizer: any ZeRO stage up to 2, any cut of the batch, early stopping, augmentation."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launchers.train_tokenizer import Recordings
from sharding.manifest import read_manifest
from tests.launchers.conftest import deepspeed, run
from tests.launchers.test_line import read_lines
from toolkit.ecg.noise import augment
from toolkit.ecg.quality import read_checked
from toolkit.shards.order import spaced
from toolkit.tokenizer.tokenizer import ECGTokenizer

pytestmark = pytest.mark.launch


def again(line, out, stage: int, *more) -> list:
    """The command that trained the tokenizer of `line` (two ranks, ZeRO 1) at another stage."""
    config = out.parent / f"zero{stage}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return ["launchers/train_tokenizer.py", "--deepspeed", config, "--manifest", line / "manifest", "--output_dir", out, "--max_steps", 3,
            "--per_device_train_batch_size", 2, "--max_eval_samples", 4, "--logging_steps", 1, "--precision", "fp32", *more]  # fmt: skip


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2)])
def test_losses_and_weights_do_not_depend_on_stage_and_ranks(line, tmp_path, stage, ranks):
    out = tmp_path / "again"
    if ranks == 1:
        done = run(sys.executable, *again(line, out, stage, "--gradient_accumulation_steps", 2))
    else:
        done = deepspeed(*again(line, out, stage), ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:]
    logs = (read_lines(folder / "log.jsonl") for folder in (out, line / "tokenizer"))
    one, two = ([entry[name] for entry in log for name in ("loss", "eval_mse") if name in entry] for log in logs)
    assert len(one) == 4 and one == pytest.approx(two, abs=1e-5)
    weights, others = (load_file(folder / "model.safetensors") for folder in (out, line / "tokenizer"))
    assert all((weights[name] - others[name]).abs().max() < 1e-4 for name in weights)  # Adam divides by tiny second moments


def test_training_that_gets_no_better_stops_and_gives_the_best(line, tmp_path):
    """Learning rate 0: the first validation is never beaten."""
    out = tmp_path / "out"
    words = again(line, out, 0, "--learning_rate", 0, "--eval_steps", 2, "--early_stopping_patience", 2, "--causal", "--levels", 5, 4, "--max_steps", 20,
                  "--precision", "bf16")  # fmt: skip
    done = run(sys.executable, *words)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((out / "train_results.json").read_text())
    assert (results["steps"], results["best_step"]) == (6, 2) and not list(out.glob(".best-*"))
    logged = [entry["eval_mse"] for entry in read_lines(out / "log.jsonl") if "eval_mse" in entry]
    assert len(logged) == 3 and len(set(logged)) == 1
    tokenizer = ECGTokenizer.from_pretrained(out)
    assert tokenizer.config.causal and tokenizer.config.levels == [5, 4]
    rows = read_manifest(line / "manifest")
    rows = rows[rows["split"] == "valid"].sort_values("key")
    ecgs = torch.from_numpy(np.stack([read_checked(*record)[0] for record in zip(rows["path"], rows["start"], rows["array"])]))
    ecgs = ecgs[spaced(len(ecgs), 4)]
    with torch.no_grad():
        assert logged[0] == pytest.approx(tokenizer(ecgs).item(), rel=1e-6) != pytest.approx(tokenizer(ecgs, bf16=True).item(), rel=1e-6)
    done = run(sys.executable, *words)
    assert done.returncode == 0 and "complete already: 6 steps" in done.stdout


CRASH = """
import os, runpy, sys
import toolkit.training.loop as loop
write = loop.write_text
loop.write_text = lambda path, text: os._exit(9) if path.name == "train_results.json" else write(path, text)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_an_early_stopped_run_that_crashed_at_its_end_is_completed(line, tmp_path):
    out = tmp_path / "out"
    words = again(line, out, 0, "--learning_rate", 0, "--eval_steps", 1, "--early_stopping_patience", 1)
    (tmp_path / "out").mkdir()
    (out / "best-1").mkdir()  # a user's
    (out / "best-1" / "notes").write_text("mine")
    done = run(sys.executable, "-c", CRASH.replace("sys.argv[1]", "sys.argv.pop(0) and sys.argv[0]"), *words)
    assert done.returncode == 9 and not (out / "train_results.json").exists(), done.stdout[-3000:]
    done = run(sys.executable, *words)
    assert done.returncode == 0, done.stdout[-3000:]
    assert json.loads((out / "train_results.json").read_text())["best_step"] == 1 and not list(out.glob(".best-*"))
    assert (out / "best-1" / "notes").read_text() == "mine"
    done = run(sys.executable, *again(line, tmp_path / "other", 0, "--gradient_checkpointing", "true"))
    assert done.returncode == 2 and "--gradient_checkpointing" in done.stdout


def test_augmentation_is_drawn_from_the_place_in_the_order(line):
    rows = read_manifest(line / "manifest").sort_values("key")
    records = list(zip(rows["path"], rows["start"], rows["array"]))
    probabilities = (0.5, 0.5, 0.5)
    data, samples = Recordings([], records, "drop", probabilities, seed=7), [(0, 3), (2, 3), (0, 5)]
    (read, target), (again, _) = data.batch(samples).inputs, data.batch(samples[::-1]).inputs
    assert torch.equal(read, again.flip(0)) and not torch.equal(read[0], read[1]) and torch.equal(target[0], target[1])
    for made, clean, (epoch, i) in zip(read.numpy(), target.numpy(), samples):
        np.testing.assert_array_equal(clean, read_checked(*records[i])[0])
        np.testing.assert_array_equal(made, augment(clean, *probabilities, np.random.default_rng([7, epoch, i])))
    read, target = Recordings([], records, "drop").batch(samples).inputs
    assert torch.equal(read, target)
