"""Instruction tuning: the same run however it is cut, killed, stopped or resumed; its adapter is the engine's; the best and the last one are kept."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.conftest import losses
from tests.training.test_variants import STOP_AT_3

STEPS, ECGS = 12, 4  # of a run, and in a step
# all that draws: a part of the questions of an ECG, dropout; with validations between, of which the best is kept
DRAWN = {"tasks_per_ecg": 2, "lora_dropout": 0.1, "eval_steps": 3, "save_steps": 5, "max_eval_answers": 4, "max_eval_samples": 6}
# an untrained model does not end its answers: few tokens, since ZeRO-3 gathers every weight for each
SHORT = "import toolkit.training.tuning as tuning; tuning.SHOWN = tuning.WATCHED = 4"
# after the run: the logits of an ECG, a pair and a piece of text from the engine itself, on all ranks, since under ZeRO-3 each forward gathers
KEEP_LOGITS = """
import torch
import toolkit.training.loop as loop
finish = loop._finish
def keep(args, job, engine, log, folder, state):
    results = finish(args, job, engine, log, folder, state)
    engine.eval()
    row = job.data.batch([(0, 0), (0, 3), (0, job.data.firsts[-1])]).inputs
    with torch.no_grad():
        logits = engine(row, logits=True).float()
    if log:
        kept = {"ids": torch.from_numpy(row.input_ids), "at": torch.from_numpy(row.predict_at), "layout": row.layout, "logits": logits}
        torch.save(kept, folder / "logits.pt")
    return results
loop._finish = keep
"""
# exact match as if the model were best in the middle; the losses and the types are the true ones. What each validation saw of LoRA is kept
PLANNED = """
import sys
import torch
import toolkit.training.loop as loop
evaluate = loop._evaluate
def planned(job, engine, log, step):
    true = job.evaluate
    job.evaluate = lambda engine: true(engine) | {"eval_exact_match": PLAN[step]}
    found = evaluate(job, engine, log, step)
    job.evaluate = true
    if engine.zero_optimization_stage() < 3 and log:
        out = sys.argv[sys.argv.index("--output_dir") + 1]
        torch.save([p.detach().clone() for name, p in engine.module.named_parameters() if "lora_B" in name], f"{out}/seen-{step}.pt")
    return found
loop._evaluate = planned
"""
BEST_AT_9 = PLANNED.replace("PLAN", "{3: 0.2, 6: 0.6, 9: 0.6, 12: 0.4}")
STUCK = """
import torch
add = instruct.add_lora
def add_stuck(*given):
    lm = add(*given)
    next(p for name, p in lm.named_parameters() if "layers.1" in name and "lora_B" in name).register_hook(torch.zeros_like)
    return lm
instruct.add_lora = add_stuck
"""
RICH = {"train_rows": "ecg", "train_norms": "true", "gradient_checkpointing": "full"}
VARIANTS = {
    "tied, all rows, zero2": (2, {}),
    "tied, all rows, zero3": (3, {}),
    "untied, ecg rows, norms, recomputed, zero2": (2, {"backbone": "untied", **RICH}),
    "untied, ecg rows, norms, recomputed, zero3": (3, {"backbone": "untied", **RICH}),
    "raw, no rows, paper, zero2": (2, {"backbone": "raw", "train_rows": "none", "prompt": "paper"}),
    "raw, no rows, zero3": (3, {"backbone": "raw", "train_rows": "none", "background": "true"}),
}


@pytest.fixture(scope="session")
def arguments(task_corpus, exact_configs):
    """arguments(out, world, stage, **more) -> argv of a run of 12 steps with 4 ECGs each, on a mixture with text; None leaves an argument out."""

    def make(out, world=2, stage=2, backbone=None, **more):
        given = {
            "deepspeed": exact_configs[stage], "backbone": task_corpus / (backbone or "known"), "shards": task_corpus / "tasks", "output_dir": out,
            "max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": ECGS // world, "precision": "fp32", "logging_steps": 1,
            "save_steps": 1000, "learning_rate": 3e-3, "warmup_steps": 2, "lora_r": 4, "train_rows": "all", "max_eval_answers": 2,
            "tasks": "ecgqa:0.6,report:0.3,text:0.1", "text": task_corpus / "text.txt", **more,
        }  # fmt: skip
        return [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]

    return make


@pytest.fixture(scope="session")
def tune(fork):
    """tune(world, argv, log, *hooks) -> Started."""
    return lambda world, argv, log, *hooks: fork(world, argv, log, before=[SHORT, *hooks], launcher="instruct")


@pytest.fixture(scope="session")
def done(tune, arguments, tmp_path_factory):
    """done(world, stage, *hooks, **more): folder of a run that was not interrupted; of each kind there is one."""
    made = {}

    def get(world, stage, *hooks, **more):
        kind = world, stage, hooks, tuple(more.items())
        if kind not in made:
            out = tmp_path_factory.mktemp("done")
            run = tune(world, arguments(out / "run", world, stage, **more), out / "log", KEEP_LOGITS, *hooks)
            assert run.wait() == [0] * world, run.text()[-4000:]
            made[kind] = out / "run"
        return made[kind]

    return get


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def results(folder):
    return json.loads((folder / "train_results.json").read_text())


def validations(folder) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: {name: value for name, value in line.items() if name.startswith("eval_")} for line in lines if "eval_loss" in line}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_losses_and_adapter_do_not_depend_on_ranks_or_zero_stage(done, stage, world):
    reference, other = done(1, 0), done(world, stage)
    expected, found = losses(reference), losses(other)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5
    one, two = adapter(reference), adapter(other)
    assert one.keys() == two.keys() and all((one[name] - two[name]).abs().max() < 1e-5 for name in one)
    assert expected[STEPS] < 0.9 * expected[1]
    assert all(weight.numel() and weight.any() for weight in two.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_and_stopped_it_is_the_run_that_was_not(tune, arguments, done, tmp_path, stage):
    straight, out = done(2, stage, BEST_AT_9, **DRAWN), tmp_path / "run"
    command = arguments(out, 2, stage, **DRAWN)
    run = tune(2, command, tmp_path / "log-1", STOP_AT_3, BEST_AT_9)
    assert run.wait() == [85, 85], run.text()[-4000:]
    run, until = tune(2, command, tmp_path / "log-2", BEST_AT_9), time.time() + 120
    while time.time() < until and not (out / "checkpoint-10" / "trainer_state.json").exists():  # after the best one
        time.sleep(0.002)
    for pid in run.pids:
        os.kill(pid, signal.SIGKILL)
    assert -signal.SIGKILL in run.wait() and not (out / "train_results.json").exists()
    run = tune(2, command, tmp_path / "log-3", BEST_AT_9)
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert losses(out) == losses(straight)
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name
    assert results(out) | {"train_seconds": 0} == results(straight) | {"train_seconds": 0}


@pytest.mark.parametrize(("stage", "worlds"), [(2, (1, 4)), (3, (4,))])
def test_another_number_of_ranks_goes_on_with_the_same_run(tune, arguments, done, tmp_path, stage, worlds):
    half, straight = tmp_path / "half", done(2, stage)
    run = tune(2, arguments(half, 2, stage), tmp_path / "log", STOP_AT_3)
    assert run.wait() == [85, 85], run.text()[-4000:]
    for world in worlds:
        out = tmp_path / f"on {world}"
        shutil.copytree(half, out)
        run = tune(world, arguments(out, 2, stage), tmp_path / f"log-{world}")  # the same command
        assert run.wait() == [0] * world, run.text()[-4000:]
        expected, found = losses(straight), losses(out)
        assert found.keys() == expected.keys()
        assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5
        one, two = adapter(straight), adapter(out)
        assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_is_three_times_the_bytes_of_the_trained_weights(done, stage, precision):
    # bf16 at stage 0 takes no accumulation
    folder = done(2, stage) if precision == "fp32" else done(2, stage, precision="bf16", max_steps=1, gradient_accumulation_steps=1)
    state = folder / f"checkpoint-{results(folder)['steps']}" / "state"
    trained = 4 * sum(weight.numel() for weight in adapter(folder).values())
    total = sum(path.stat().st_size for path in state.iterdir())
    # weights and two moments in float32, at stage 0 in bf16 those in bf16 as well; and a frozen weight nowhere: the head alone is as large as the rows trained
    assert total < (3.65 if stage == 0 and precision == "bf16" else 3.15) * trained


@pytest.mark.parametrize("name", VARIANTS)
def test_plain_peft_loads_what_the_engine_has(done, task_corpus, name):
    stage, more = VARIANTS[name]
    folder = done(2, stage, **more)
    base = folder / "backbone" if more.get("backbone") == "raw" else task_corpus / more.get("backbone", "known")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model, tokenizer = PeftModel.from_pretrained(plain, folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    said = torch.load(folder / "logits.pt", weights_only=True)
    expected, at = torch.empty_like(said["logits"]), said["at"]
    with torch.no_grad():
        for start, prefix_end, lengths in said["layout"]:
            branch = prefix_end
            for length in lengths or (0,):  # every question by itself after its ECG, as evaluation asks it
                ids = torch.cat([said["ids"][start:prefix_end], said["ids"][branch : branch + length]])
                mine = (at >= (branch if length else start)) & (at < branch + length)
                expected[mine] = model(input_ids=ids[None]).logits[0, at[mine] - branch + prefix_end - start]
                branch += length
    assert (expected - said["logits"]).abs().max() < 1e-4
    with torch.no_grad(), model.disable_adapter():  # and it is not the backbone alone
        assert (model(input_ids=ids[None]).logits[0, -5:] - expected[-5:]).abs().max() > 0.01
    trained = adapter(folder)
    assert all(weight.numel() for weight in trained.values())
    assert any("norm" in key for key in trained) == ("train_norms" in more)
    rows = {tuple(weight.shape) for key, weight in trained.items() if "trainable_tokens" in key}
    first = {"all": len(tokenizer), "ecg": 1298}.get(more.get("train_rows", "all"))
    assert rows == ({(first, 64)} if first else set())


def test_the_best_is_the_result_and_the_last_beside_it(done):
    two, three = (done(2, stage, BEST_AT_9, **DRAWN) for stage in (2, 3))
    seen = validations(two)
    assert seen.keys() == validations(three).keys() == {3, 6, 9, 12}
    kinds = {f"eval_exact_match/{kind}" for kind in ("single-verify", "single-choose", "single-query", "comparison_consecutive-verify")}
    for step, found in seen.items():
        assert kinds <= found.keys() and "eval_exact_match" in found
        assert found == pytest.approx(validations(three)[step], abs=1e-5)
    assert seen[9]["eval_loss"] < seen[6]["eval_loss"]  # what decides between two equal matches
    for folder in (two, three):
        assert results(folder)["best_step"] == 9 and results(folder)["steps"] == 12 and results(folder)["eval_exact_match"] == 0.6
        assert not list(folder.glob(".best-*"))
    for step, folder in ((9, two), (12, two / "last")):
        saved = [weight for key, weight in adapter(folder).items() if "lora_B" in key]
        kept = torch.load(two / f"seen-{step}.pt", weights_only=True)
        assert sorted(float(weight.norm()) for weight in saved) == sorted(float(weight.norm()) for weight in kept)


def test_early_stopping_stops_by_exact_match(done):
    more = {**DRAWN, "early_stopping_patience": 1}
    folder = done(2, 2, PLANNED.replace("PLAN", "{3: 0.6, 6: 0.2}"), **more)
    assert results(folder)["steps"] == 6 and results(folder)["best_step"] == 3 and max(losses(folder)) == 6
    assert any(not torch.equal(weight, adapter(folder / "last")[name]) for name, weight in adapter(folder).items())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_factor_that_does_not_move_ends_the_run(tune, arguments, tmp_path, stage):
    run = tune(2, arguments(tmp_path / "run", 2, stage), tmp_path / "log", STUCK)
    assert all(run.wait()), run.text()[-4000:]
    assert "after the first step 1 of 14 LoRA weights are still zero" in run.text() and "layers.1" in run.text()
    assert not (tmp_path / "run" / "latest").exists()
