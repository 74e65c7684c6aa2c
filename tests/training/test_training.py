"""The configuration resolver, the schedule, and the exactness of the loop against plain torch."""

import json
import math

import pytest
import torch

from toolkit.errors import UserError
from toolkit.training import checkpoint, ds_config
from toolkit.training.arguments import TrainingArguments, parse
from toolkit.training.loop import _learning_rate, _prefetch, _seed_step


def arguments(**changes):
    return TrainingArguments(**{"output_dir": "x", "deepspeed": "y", "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_presets_resolve_without_an_auto_left(name):
    config = ds_config.resolve(f"ds_configs/{name}.json", arguments(per_device_train_batch_size=3, gradient_accumulation_steps=2), 4, True)
    assert "auto" not in json.dumps(config)
    assert (config["train_batch_size"], config["gradient_clipping"], config["bf16"]["enabled"]) == (24, 1.0, True)
    assert config["zero_optimization"]["stage"] == int(name[-1]) and config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ('{"optimizer": {}}', "remove 'optimizer'"),
        ('{"activation_checkpointing": {}}', "use --gradient_checkpointing"),
        ('{"torch_autocast": {}}', "remove 'torch_autocast'"),
        ('{"train_batch_size": 7}', "train_batch_size is 7, the arguments say 8"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled is True, this run's weights are fp32"),
        ('{"zero_optimization": {"stage": 3}}', "stage 3 is not supported yet"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', "no argument decides 'zero_optimization.reduce_bucket_size'"),
    ],
)
def test_configurations_that_would_be_ignored_are_refused(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ds_config.resolve(str(tmp_path / "c.json"), arguments(), 1, False)


def test_schedule_warms_up_from_above_zero_and_ends_at_zero():
    args = arguments(warmup_steps=4)
    rates = [_learning_rate(args, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([0.5e-3 * (1 + math.cos(math.pi * k / 16)) for k in range(16)])


def test_dropout_differs_by_step_and_rank_and_repeats():
    def draw(*place):
        _seed_step(*place)
        return torch.rand(3).tolist()

    assert draw(0, 1, 0) == draw(0, 1, 0)
    assert len({tuple(draw(*p)) for p in [(0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)]}) == 4


def test_an_error_while_batches_are_made_reaches_the_loop():
    def source():
        yield 1
        raise UserError("a shard is damaged")

    batches = _prefetch(source())
    assert next(batches) == 1
    with pytest.raises(UserError, match="damaged"):
        next(batches)


@pytest.mark.parametrize("bad", [{"per_device_train_batch_size": 0}, {"save_steps": 0}, {"num_train_epochs": 0.0}])
def test_impossible_numbers_name_the_argument(bad):
    with pytest.raises(UserError, match=f"--{next(iter(bad))}"):
        arguments(**bad)


def test_an_unknown_argument_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(TrainingArguments, "", ["--output_dir", "x", "--deepspeed", "y", "--learning_rat", "1"])
    assert exit.value.code == 2 and "--learning_rat" in capsys.readouterr().err


def test_a_pointer_that_leads_nowhere_is_named(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "latest").write_text("checkpoint-7")
    with pytest.raises(UserError, match="points to checkpoint-7, which is damaged"):
        checkpoint.newest(tmp_path)
