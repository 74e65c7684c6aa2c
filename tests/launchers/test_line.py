"""What the whole line leaves, and what it says to a user's mistakes."""

import collections
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import sharding.shard
import sharding.shard_tasks
from tests.launchers.conftest import ROOT, deepspeed, run
from toolkit.errors import UserError
from toolkit.shards.reader import Shards

pytestmark = pytest.mark.launch


def read_lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "instruct"])
def test_a_run_folder_holds_what_it_should(line, stage):
    folder, steps = line / stage, {"tokenizer": 3, "pretrain": 4, "instruct": 3}[stage]
    log = [entry for entry in read_lines(folder / "log.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(log[0])
    assert log[-1]["loss"] < log[0]["loss"] and all(math.isfinite(entry["loss"]) for entry in log)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [step for step, _ in logged] == list(range(1, steps + 1))
    assert np.allclose([value for _, value in logged], [entry["loss"] for entry in log])
    assert (stage == "tokenizer") or "samples/text_summary" in events.Tags()["tensors"]
    assert (stage != "pretrain") or ("continued/1" in events.Tags()["images"] and "tokens/predicted" in events.Tags()["histograms"])
    config = json.loads((folder / "ds_config.json").read_text())
    assert "auto" not in json.dumps(config) and config["train_batch_size"] == {"tokenizer": 4, "pretrain": 8, "instruct": 4}[stage]
    assert json.loads((folder / "arguments.json").read_text())["output_dir"] == str(folder)
    assert (folder / "latest").read_text() == f"checkpoint-{steps}"
    assert json.loads((folder / "train_results.json").read_text())["steps"] == steps


def test_pretrained_model_and_adapter_load_with_plain_libraries(line):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(line / "pretrain", dtype=torch.float32), AutoTokenizer.from_pretrained(line / "pretrain")
    assert tokenizer.convert_tokens_to_ids("<|ecg_1295|>") - tokenizer.convert_tokens_to_ids("<|ecg_0000|>") == 1295
    assert tokenizer.convert_tokens_to_ids("<|gain_31|>") - tokenizer.convert_tokens_to_ids("<|gain_00|>") == 31
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # tied stays tied
    weights = load_file(line / "instruct" / "adapter_model.safetensors")
    moved = [name for name, w in weights.items() if "lora_B" in name and w.abs().max() > 0]
    assert len(moved) == 4 * 7  # every LoRA of four layers learnt something
    assert sum(w.numel() for w in weights.values()) < 3.2e6  # no copy of the backbone
    ids = tokenizer("<|ecg_start|><|ecg_0003|>", return_tensors="pt").input_ids
    before = model(input_ids=ids).logits
    tuned = PeftModel.from_pretrained(model, line / "instruct")
    assert not torch.allclose(tuned(input_ids=ids).logits, before)


def test_tasks_follow_their_ecg_and_no_patient_is_in_two_splits(line):
    patients = collections.defaultdict(set)
    for split in ("train", "valid", "test"):
        shards = Shards.open(line / "tasks", split)
        for i in range(len(shards)):
            meta = shards.meta(i)
            assert meta["split"] == split and {task["task"] for task in meta["tasks"]} == {"ecgqa", "report"}
            for patient in meta["patients"]:
                patients[patient].add(split)
    assert len(patients) > 40 and all(len(splits) == 1 for splits in patients.values())


def pretrain_again(line, out, ranks, accumulation, *more):
    """The pretraining of `line` with the same global batch cut for another number of ranks."""
    return deepspeed("launchers/pretrain.py", "--deepspeed", "ds_configs/zero2.json", "--backbone", "tiny", "--shards", line / "shards", "--output_dir", out,
                     "--max_steps", 4, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", accumulation, "--logging_steps", 1,
                     "--precision", "fp32", "--gain_tokens", "true", "--seq_len", 600, *more, ranks=ranks)  # fmt: skip


def test_a_checkpoint_is_as_large_as_the_plan_says(line):
    """12 bytes a trained weight; tests/test_plan.py holds the plan to it."""
    (checkpoint,) = (line / "pretrain").glob("checkpoint-*")
    weights = sum(weight.numel() for weight in load_file(line / "pretrain" / "model.safetensors").values())
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert size == pytest.approx(12 * weights, rel=0.01)


def test_a_finished_run_started_again_changes_nothing(line):
    folder = line / "pretrain"
    before = (folder / "model.safetensors").stat().st_mtime_ns, (folder / "log.jsonl").read_text()
    done = pretrain_again(line, folder, 2, 2)
    assert done.returncode == 0 and "complete already" in done.stdout, done.stdout[-3000:]
    assert ((folder / "model.safetensors").stat().st_mtime_ns, (folder / "log.jsonl").read_text()) == before


def test_the_launcher_passes_on_that_a_run_was_stopped(line, tmp_path):
    (tmp_path / "STOP").touch()
    done = pretrain_again(line, tmp_path, 2, 2)
    assert done.returncode == 85 and "stopped on request after step 0 of 4, so there is nothing to save" in done.stdout, done.stdout[-3000:]
    assert not (tmp_path / "STOP").exists() and not (tmp_path / "train_results.json").exists()


def test_the_loss_does_not_depend_on_how_ranks_cut_the_batch(line, tmp_path):
    """Reports make the ranks' numbers of targets differ, so a mean of rank means would show here."""
    done = pretrain_again(line, tmp_path / "one", 1, 4)
    assert done.returncode == 0, done.stdout[-3000:]
    one, two = ([e["loss"] for e in read_lines(folder / "log.jsonl") if "loss" in e] for folder in (tmp_path / "one", line / "pretrain"))
    assert one == pytest.approx(two, abs=1e-5)
    weights, others = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", line / "pretrain"))
    assert all((weights[name] - others[name]).abs().max() < 1e-4 for name in weights)  # Adam divides by tiny second moments


@pytest.mark.parametrize("stage", ["train_tokenizer", "pretrain", "instruct"])
def test_killed_and_restarted_is_bit_identical(line, tmp_path, stage):
    """SIGKILL after a checkpoint; the same command goes on and ends with the same losses and weights as a run that was never touched."""

    def command(out):
        inputs = {
            "train_tokenizer": ["--manifest", line / "manifest", "--augment_noise", 0.5, "--augment_wander", 0.5, "--augment_lead_dropout", 0.5,
                                "--eval_steps", 1, "--early_stopping_patience", 5, "--max_eval_samples", 2],
            "pretrain": ["--backbone", "tiny", "--shards", line / "shards"],
            "instruct": ["--backbone", line / "pretrain", "--shards", line / "tasks", "--lora_dropout", 0.1],
        }  # fmt: skip
        return [sys.executable, f"launchers/{stage}.py", "--deepspeed", "ds_configs/zero2.json", *map(str, inputs[stage]), "--output_dir", str(out),
                "--max_steps", "8", "--save_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1"]  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(*command(whole))
    assert done.returncode == 0, done.stdout[-3000:]
    process = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (killed / "latest").is_file() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "train_results.json").exists()
    with open(killed / "log.jsonl", "a") as f:
        f.write('{"step": 7, "lo')  # the half line of a crash
    done = run(*command(killed))
    assert done.returncode == 0, done.stdout[-3000:]
    losses = [[(e["step"], e["loss"]) for e in read_lines(folder / "log.jsonl") if "loss" in e] for folder in (whole, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    name = "adapter_model.safetensors" if stage == "instruct" else "model.safetensors"
    one, two = (load_file(folder / name) for folder in (whole, killed))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert len(list(killed.glob("checkpoint-*"))) == 2  # --save_total_limit

    assert not list(killed.glob(".best-*"))
    other = [*command(killed)[:-2], "--weight_decay", "0.5"]
    done = run(*other)
    assert done.returncode == 2 and "weight_decay 0.0, not 0.5" in done.stdout, done.stdout[-3000:]


def test_mistakes_are_one_line_and_exit_2(line, tmp_path):
    done = deepspeed("launchers/pretrain.py", "--deepspeed", "ds_configs/zero2.json", "--backbone", "./no/such/model", "--shards", line / "shards",
                     "--output_dir", tmp_path / "x")  # fmt: skip
    assert done.returncode == 2, done.stdout[-3000:]
    errors = [text for text in done.stdout.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and "--backbone: './no/such/model'" in errors[0] and "Traceback" not in done.stdout
    assert not (tmp_path / "x").exists()


LAUNCHER_MISTAKES = {
    "pretrain": [("--shards", "nowhere", "--shards: nowhere has no index.json"), ("--deepspeed", "nowhere.json", "--deepspeed: nowhere.json cannot be read")],
    "instruct": [("--backbone", "./nowhere", "--backbone: './nowhere' is neither `tiny`"), ("--shards", "shards", "holds tokens, not tasks"),
                 ("--gain_text", "true", "--gain_text: .* has gain tokens")],
    "evaluate": [("--model", "nowhere", "--model: nowhere holds neither"), ("--shards", "shards", "holds tokens, not tasks")],
    "train_tokenizer": [("--manifest", "nowhere", "--manifest nowhere has no"), ("--levels", "1", "--levels: needs 2"),
                        ("--augment_wander", "2", "--augment_wander: must be a probability"), ("--early_stopping_patience", "3", "needs --eval_steps")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "flag", "value", "message"), [(name, *case) for name, cases in LAUNCHER_MISTAKES.items() for case in cases]
)
def test_launchers_name_the_argument(line, tmp_path, monkeypatch, launcher, flag, value, message):
    module = __import__(f"launchers.{launcher}", fromlist=["main"])
    good = {"--deepspeed": "ds_configs/zero2.json", "--output_dir": tmp_path / "out"}
    good |= {
        "pretrain": {"--backbone": "tiny", "--shards": line / "shards"},
        "instruct": {"--backbone": line / "pretrain", "--shards": line / "tasks"},
        "evaluate": {"--model": line / "instruct", "--shards": line / "tasks"},
        "train_tokenizer": {"--manifest": line / "manifest"},
    }[launcher]
    if launcher == "evaluate":
        del good["--deepspeed"]
    good[flag] = line / value if value == "shards" else value
    monkeypatch.setattr(sys, "argv", [launcher, *(str(word) for pair in good.items() for word in pair)])
    with pytest.raises(UserError, match=message):
        module.main()
    assert not (tmp_path / "out").exists()


def test_sharding_names_the_argument_and_leaves_nothing(line, tmp_path):
    def shard(**changes):
        good = {"--manifest": line / "manifest", "--tokenizer": line / "tokenizer", "--out": tmp_path / "s", **changes}
        sharding.shard.main([str(word) for pair in good.items() for word in pair])

    with pytest.raises(UserError, match="--manifest"):
        shard(**{"--manifest": tmp_path})
    with pytest.raises(UserError, match="--tokenizer: .* has no config.json"):
        shard(**{"--tokenizer": tmp_path})
    with pytest.raises(UserError, match="--out .* was made with another shard_size"):
        shard(**{"--out": line / "shards", "--shard_size": 7})
    assert not list(tmp_path.iterdir())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.txt, which this program did not write"):
        sharding.shard.main(["--manifest", str(line / "manifest"), "--tokenizer", str(line / "tokenizer"), "--out", str(tmp_path / "mine"), "--overwrite"])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "mine")

    def tasks(*words):
        sharding.shard_tasks.main(list(map(str, words)))

    with pytest.raises(UserError, match="--qa: no .json files"):
        tasks("ecgqa", "--qa", tmp_path, "--shards", line / "shards", "--out", tmp_path / "t")
    with pytest.raises(UserError, match="--qa: `ecgqa` needs it"):
        tasks("ecgqa", "--shards", line / "shards", "--out", tmp_path / "t")
    with pytest.raises(UserError, match="--qa: reports come from"):
        tasks("reports", "--qa", tmp_path, "--shards", line / "shards", "--out", tmp_path / "t")
    shutil.copytree(line / "shards", tmp_path / "other")
    text = (tmp_path / "other" / "index.json").read_text()
    (tmp_path / "other" / "index.json").write_text(text.replace(Shards.open(line / "shards", "train").index["tokenizer"], "0" * 16))
    with pytest.raises(UserError, match="was not made from these --shards"):
        tasks("reports", "--shards", tmp_path / "other", "--out", line / "tasks")
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(UserError, match="holds tasks, not tokens"):
        tasks("reports", "--shards", line / "tasks", "--out", tmp_path / "t")
    assert not list(tmp_path.iterdir())
