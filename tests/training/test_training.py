"""The configuration resolver, the schedule, and the exactness of the loop against plain torch."""

import json
import math

import pytest
import torch
import torch.distributed as dist

from toolkit.errors import UserError
from toolkit.training import checkpoint, ds_config
from toolkit.training.arguments import TrainingArguments, parse
from toolkit.training.batches import prefetch
from toolkit.training.distributed import Ranks
from toolkit.training.engine import _seed_dropout, learning_rate
from toolkit.training.resume import batch_split, find_run


def arguments(**changes):
    return TrainingArguments(**{"output_dir": "x", "deepspeed": "y", "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_presets_resolve_without_an_auto_left(name):
    accumulation = 1 if name == "zero0" else 2
    args = arguments(per_device_train_batch_size=3, gradient_accumulation_steps=accumulation)
    config = ds_config.resolve(f"ds_configs/{name}.json", args, 4, True, hidden_size=100)
    assert "auto" not in json.dumps(config)
    assert (config["train_batch_size"], config["gradient_clipping"], config["bf16"]["enabled"]) == (12 * accumulation, 1.0, True)
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4]) and config["data_types"].get("grad_accum_dtype") == (None if name == "zero0" else "fp32")
    sizes = [zero.get(key) for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")]
    assert sizes == ([10000, 9000, 1000] if zero["stage"] == 3 else [None] * 3)


def test_the_split_of_a_step_over_other_ranks():
    """(asked per rank and micro-batch, asked micro-batches) on a run of 24 rows a step, which 2 ranks began as 4 x 3."""
    batch = {"rows": 24, "asked": [4, 3]}
    for world, split in {2: (4, 3), 1: (4, 6), 3: (4, 2), 4: (3, 2), 6: (4, 1), 8: (3, 1), 12: (2, 1), 24: (1, 1)}.items():
        args = arguments(per_device_train_batch_size=4, gradient_accumulation_steps=3)
        assert batch_split(args, world, batch) == split and world * math.prod(split) == 24
    assert batch_split(arguments(per_device_train_batch_size=2, gradient_accumulation_steps=6), 2, batch) == (2, 6)  # other words for the same steps
    with pytest.raises(UserError, match="24 rows, which 5 ranks cannot share"):
        batch_split(arguments(per_device_train_batch_size=4, gradient_accumulation_steps=3), 5, batch)
    with pytest.raises(UserError, match="--per_device_train_batch_size 8 x --gradient_accumulation_steps 3 x 2 ranks are 48 rows"):
        batch_split(arguments(per_device_train_batch_size=8, gradient_accumulation_steps=3), 2, batch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ('{"optimizer": {}}', "remove 'optimizer'"),
        ('{"activation_checkpointing": {}}', "use --gradient_checkpointing"),
        ('{"torch_autocast": {}}', "remove 'torch_autocast'"),
        ('{"train_batch_size": 7}', "train_batch_size is 7, the arguments say 8"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled is True, this run's weights are fp32"),
        ('{"checkpoint": {"load_universal": true}}', "remove 'checkpoint'"),
        ('{"gradient_clip": 1.0}', "'gradient_clip' is unknown to the trainers, did you mean 'gradient_clipping'?"),
        ('{"zero_optimization": {"stage": 4}}', "stage must be one of"),
        ('{"zero_optimization": {"stage": true}}', "stage must be one of"),
        ('{"bf16": {"enabled": "auto", "check_grad_overflow": false}}', "remove bf16.check_grad_overflow"),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', "write offload_optimizer"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "offload_param has no effect at stage 2"),
        ('{"zero_optimization": {"stage": 1, "stage3_prefetch_bucket_size": 9}}', "has no effect at stage 1"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}}', "decides 'zero_optimization.offload_optimizer.device'"),
        ('{"data_types": {"grad_accum_dtyp": "fp32"}}', "remove data_types.grad_accum_dtyp"),
        ('{"zero_optimization": {"stage": 2, "overlap_com": true}}', "zero_optimization.overlap_com: extra inputs are not permitted"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "use cpu"),
        ('{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}', "grad_accum_dtype must be fp32"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', "no argument decides 'zero_optimization.reduce_bucket_size'"),
    ],
)
def test_configurations_that_would_be_ignored_are_refused(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ds_config.resolve(str(tmp_path / "c.json"), arguments(), 1, False)


def test_schedule_warms_up_from_above_zero_and_ends_at_zero():
    args = arguments(warmup_steps=4)
    rates = [learning_rate(args, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([0.5e-3 * (1 + math.cos(math.pi * k / 16)) for k in range(16)])


def test_dropout_differs_by_step_and_micro_batch_and_repeats():
    def draw(*place):
        _seed_dropout(*place)
        return torch.rand(3).tolist()

    assert draw(0, 1, 0) == draw(0, 1, 0)
    assert len({tuple(draw(*p)) for p in [(0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)]}) == 4


def test_an_error_while_batches_are_made_reaches_the_loop():
    def source():
        yield 1
        raise UserError("a shard is damaged")

    batches = prefetch(source())
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


@pytest.fixture
def alone(tmp_path):
    """One rank, in this process."""
    alone_already = dist.is_initialized()  # a launcher's main() that another test called
    if not alone_already:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    if not alone_already:
        dist.destroy_process_group()


def test_a_pointer_that_leads_nowhere_is_named(alone, tmp_path):
    folder = tmp_path / "run"
    assert checkpoint.newest(folder, alone) is None
    folder.mkdir()
    (folder / "latest").write_text("checkpoint-7")
    with pytest.raises(UserError, match="latest points to nothing: no checkpoint is left"):
        checkpoint.newest(folder, alone)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"identity": {"trainer": "pretrain"}}, "holds a run of pretrain, not of instruct"),
        ({"identity": {}}, "of an older version"),
        ({}, "of an older version"),
    ],
)
def test_a_folder_of_another_trainer_is_named(alone, tmp_path, saved, message):
    (tmp_path / "train_results.json").write_text(json.dumps({"steps": 1, "batch": {"rows": 1, "asked": [1, 1]}, **saved}))
    with pytest.raises(UserError, match=f"--output_dir: .* {message}"):
        find_run(arguments(output_dir=str(tmp_path)), alone, "instruct", 10, 1, {}, False, None)
