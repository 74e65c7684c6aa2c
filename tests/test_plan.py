"""The plan against figures worked out by hand, the published sizes of models, and what the launchers really make."""

import copy
import json
import math

import numpy as np
import pytest

from launchers.pretrain import PretrainArguments
from toolkit import plan
from toolkit.errors import UserError
from toolkit.lm.flops import row_flops
from toolkit.lm.shapes import PUBLISHED, shape_of
from toolkit.lm.trainable import choose_trainable
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.data import ForecastData
from toolkit.training.arguments import parse

# numbers of parameters as the models' files on the hub have
SIZES = {
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824, "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688, "Qwen2.5-7B": 7_615_616_512,
    "SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "SmolLM2-1.7B": 1_711_376_384,
}  # fmt: skip
LLAMA = ["--backbone", "meta-llama/Llama-3.2-3B", "--ecgs", "800000"]


def planned(*argv: str) -> dict:
    return plan.make_plan(parse(plan.PlanArguments, "", [*argv]))


def test_shapes_have_the_published_number_of_parameters():
    assert set(SIZES) | {"tiny"} == set(PUBLISHED)
    for name, size in SIZES.items():
        kind, shape, tokens = PUBLISHED[name]
        base, _, vocabulary = shape_of(f"someone/{name}-Instruct", 1296, False)
        added = base.config.vocab_size - shape[5]  # rows that were not in the embedding (and head) before
        assert sum(p.numel() for p in base.parameters()) == size + added * shape[0] * (1 if shape[6] else 2)
        assert base.config.vocab_size % 64 == 0 and vocabulary.first == tokens + 2 and base.config.vocab_size >= tokens + 1298
        assert all(p.is_meta for p in base.parameters())


def test_the_tiny_backbone_is_the_real_one(tiny):
    """But for its text vocabulary, of which the fixture has less."""
    model, tokenizer, _ = tiny
    base, bare, _ = shape_of("tiny", 1296, True)
    rows = lambda m: m.config.vocab_size * m.config.hidden_size
    assert sum(p.numel() for p in base.parameters()) - rows(base) == sum(p.numel() for p in model.parameters()) - rows(model)
    assert (bare.bos_token_id is None) == (tokenizer.bos_token_id is None)


def test_a_folder_is_looked_at_and_its_ecg_tokens_are_not_added_again(tiny_with_gains, tmp_path):
    model, tokenizer, vocabulary = tiny_with_gains
    model.save_pretrained(tmp_path / "Llama-3.2-3B")  # the folder goes before the table
    tokenizer.save_pretrained(tmp_path / "Llama-3.2-3B")
    base, _, found = shape_of(str(tmp_path / "Llama-3.2-3B"), 1296, True)
    assert found == vocabulary and base.config.vocab_size == model.config.vocab_size
    assert sum(p.numel() for p in base.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_backbone_that_nobody_knows(tmp_path):
    with pytest.raises(UserError, match="--backbone: .* is no folder with a model, .*Llama-3.2-3B"):
        shape_of(str(tmp_path), 1296, False)


def test_steps_and_tokens_by_hand():
    found = planned(*LLAMA, "--world", "16", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3", "--num_train_epochs", "2.5")
    # start of text, start of the ECG, 313 tokens: 13 in a row of 4,096; rows 16 x 2 x 3
    assert (found["tokens_per_ecg"], found["targets_per_ecg"], found["ecgs_per_row"], found["rows_per_step"]) == (315, 313, 13, 96)
    assert found["ecgs_per_step"] == 1248 and found["steps"] == math.ceil(2_000_000 / 1248) == 1603
    assert found["tokens_in_all"] == 1603 * 1248 * 315
    assert found["epochs"] == pytest.approx(1603 * 1248 / 800_000)
    few = planned(*LLAMA, "--max_steps", "7")
    assert few["steps"] == 7 and few["epochs"] == few["ecgs_in_all"] / few["ecgs"] < 0.01


@pytest.mark.parametrize(
    ("argv", "tokens", "targets"),
    [
        (["--gain_tokens", "true"], 327, 313),
        (["--objective", "windows"], 605 + 5 * 2, 58),
        (["--objective", "windows", "--gain_tokens", "true"], 605 + 5 * 14, 58),
        (["--backbone", "Qwen/Qwen2.5-3B"], 314, 313),  # has no start of text
    ],
)
def test_tokens_of_an_ecg(argv, tokens, targets):
    found = planned(*LLAMA, *argv)
    assert (found["tokens_per_ecg"], found["targets_per_ecg"], found["ecgs_per_row"]) == (tokens, targets, 4096 // tokens)


@pytest.mark.parametrize("objective", ["causal", "windows"])
def test_rows_are_those_of_the_data(tiny, tmp_path, objective):
    """What ForecastData makes of real shards: the same ECGs per row, tokens and FLOPs."""
    model, tokenizer, vocabulary = tiny
    samples = [(f"e{i}", np.full((1, 313), i, np.uint16), {"report": "normal ecg", "gains": [[0.2] * 12]}) for i in range(20)]
    write_index(tmp_path, {"train": write_split(tmp_path, "train", samples, 9)}, kind="tokens", codes=1296)
    shards = Shards.open(tmp_path, "train")
    data = ForecastData(shards, tokenizer, vocabulary, objective=objective, seq_len=2000)
    batch = data.batch([(0, i) for i in range(data.samples_per_row)])
    row = plan.ecg_row(objective, tokenizer, vocabulary)
    assert data.samples_per_row == 2000 // len(row.input_ids) == batch.ecgs
    assert batch.tokens == batch.ecgs * len(row.input_ids) and batch.targets == batch.ecgs * len(row.targets)
    assert row_flops(model)(batch.inputs) == batch.ecgs * row_flops(model)(row)
    found = planned("--backbone", "tiny", "--shards", str(tmp_path), "--objective", objective, "--seq_len", "2000")
    assert (found["ecgs"], found["ecgs_per_row"]) == (len(shards), data.samples_per_row)


def test_time_by_hand():
    """Llama-3.2-3B: FLOPs of a token near the 6 N of the rule of thumb, and time from them."""
    found = planned(*LLAMA, "--world", "16", "--mfu", "0.5")
    assert found["step_flops"] / found["tokens_per_step"] == pytest.approx(6 * found["parameters"], rel=0.02)
    assert found["step_seconds"] == pytest.approx(found["step_flops"] / (16 * 989e12 * 0.5))
    assert found["gpu_hours"] == pytest.approx(found["steps"] * found["step_seconds"] * 16 / 3600)


def test_memory_by_hand():
    """ZeRO-2 in bf16 on 16 ranks: 2 bytes a weight, 4/16 for gradients, 12/16 for the optimizer, two buckets of 500 M bf16 numbers."""
    found = planned(*LLAMA, "--world", "16", "--precision", "bf16")
    n = found["parameters"]
    assert n == 3_212_749_824 + (129_600 - 128_256) * 3072 == found["trained"]
    two = found["presets"]["zero2"]
    assert [two[part] for part in ("weights", "gradients", "optimizer", "buffers", "host")] == [2 * n, n / 4, 12 * n / 16, 2e9, 0]
    assert two["chosen"] and list(found["presets"]) == list(plan.NAMES)
    assert (found["checkpoint"], found["export"]) == (12 * n, 2 * n)
    zero0 = str(plan.PRESETS / "zero0.json")
    assert planned(*LLAMA, "--precision", "bf16", "--deepspeed", zero0)["checkpoint"] == 14 * n
    assert planned(*LLAMA, "--precision", "fp32", "--deepspeed", zero0)["checkpoint"] == 12 * n
    every = found["activations"]
    assert every["full"] < every["every_2"] < every["none"]


def test_what_is_trained():
    new = planned(*LLAMA, "--train", "new_rows")
    assert new["trained"] == 129_600 * 3072 and new["parameters"] == 3_216_878_592
    lora = planned(*LLAMA, "--train", "lora+norms+embeddings")
    adapters = lora["parameters"] - new["parameters"]
    assert adapters == 28 * 64 * (2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192))  # q o, k v, gate up down
    assert adapters == 97_255_424  # of the release
    assert lora["trained"] == adapters + 129_600 * 3072 + 57 * 3072


def test_trained_parameters_of_a_real_model(tiny):
    model, _, vocabulary = tiny
    for how in ("new_rows", "lora+norms+embeddings"):
        real = choose_trainable(copy.deepcopy(model), vocabulary, how)
        rows = model.config.vocab_size * model.config.hidden_size
        found = planned("--backbone", "tiny", "--train", how, "--ecgs", "9")
        assert found["trained"] - found["vocabulary"] * 256 == sum(p.numel() for p in real.parameters() if p.requires_grad) - rows


def test_a_head_of_ecg_tokens_needs_less():
    full, ecg = (planned(*LLAMA, "--head", head) for head in ("full", "ecg"))
    assert full["step_flops"] - ecg["step_flops"] == 3 * 2 * (129_600 - 1296) * 3072 * 13 * 313
    assert ecg["loss"] < full["loss"] / 50


def test_a_preset_that_a_run_would_refuse_is_said_and_as_the_chosen_one_refused(capsys):
    argv = [*LLAMA, "--gradient_accumulation_steps", "2"]
    assert "bf16" in planned(*argv)["presets"]["zero0"]["refused"]
    with pytest.raises(SystemExit) as caught:
        plan.main([*argv, "--deepspeed", "ds_configs/zero0.json"])
    assert caught.value.code == 2 and "use ds_configs/zero1.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--world", "0"], "--world and --ecgs must be at least 1"),
        (["--mfu", "40"], "--mfu must be a share"),
        (["--gpu", "v100", "--precision", "bf16"], "--gpu v100 has no bf16"),
        (["--seq_len", "300"], "--seq_len 300 is too short"),
        (["--gradient_checkpointing", "half"], "is none of none, full, every_N"),
        (["--shards", "nowhere"], "--shards"),
        (["--deepspeed", "nowhere.json"], "--deepspeed"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        plan.main([*LLAMA, *argv])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: ") and message in said


def test_every_recipe_for_pretraining_is_planned(capsys):
    for path in sorted(plan.PRESETS.parent.glob("recipes/*-pretrain.yaml")):
        plan.main(["--recipe", str(path), "--world", "2", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["world"] == 2 and found["ecgs"] == plan.MIMIC
        plan.main(["--recipe", str(path), "--world", "2"])
        said = capsys.readouterr().out
        assert f"{found['steps']:,} steps" in said and f"{found['gpu_hours']:,.1f} GPU-hours" in said and max(map(len, said.splitlines())) < 200


def test_what_does_not_fit_is_marked(capsys):
    plan.main([*LLAMA, "--world", "1", "--gpu", "rtx4090"])
    lines = {line[2:].split()[0]: line for line in capsys.readouterr().out.splitlines() if line[2:].startswith("zero")}
    assert lines["zero2"].count("!") == 3 and lines["zero3_offload"].count("!") == 0 and lines["zero2"].startswith("*")


def test_the_plan_takes_all_that_the_launcher_takes():
    assert issubclass(plan.PlanArguments, PretrainArguments)
