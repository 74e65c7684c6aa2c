"""Communication by formula against figures worked out by hand, and against the bytes and the memory of a real DeepSpeed engine on two ranks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import plan, scaling
from toolkit.training.arguments import parse

ROOT = Path(__file__).resolve().parents[1]
LINKS = scaling.Links(gpus_per_node=8, intra=100.0, inter=40.0)
LLAMA = ["--backbone", "meta-llama/Llama-3.2-3B", "--ecgs", "800000", "--precision", "bf16"]
WHOLE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}  # nothing stays from one use to the next
CASES = [  # stage, precision, micro-batches, what the preset has instead
    (0, "fp32", 1, {}), (0, "bf16", 1, {}), (1, "fp32", 1, {}), (1, "bf16", 2, {}), (2, "fp32", 1, {}), (2, "bf16", 1, {}), (2, "bf16", 2, {}),
    (3, "fp32", 1, {}), (3, "bf16", 2, {}), (3, "bf16", 2, WHOLE),
]  # fmt: skip
MEASURE = """
import json, sys
from benchmarks import scaling
for stage, precision, accumulation, zero in json.loads(sys.argv[1]):
    found = scaling.measure(2, stage, precision, accumulation, {**scaling.SMALL, **zero}, 0, ["--backbone", "tiny", "--seq_len", "1000"])
    print("found", json.dumps(found), flush=True)
"""


def scaled(*argv: str) -> dict:
    return plan.make_scaling(parse(plan.PlanArguments, "", [*argv]))


def test_volumes_by_hand():
    """1,000 parameters in bf16, of which 600 are trained, in three micro-batches."""
    uses = [("a", 400), ("b", 600)]
    moved = {stage: scaling.volumes({"stage": stage}, uses, 600, 3, 2) for stage in range(3)}
    assert moved[0] == {"all-reduce": 1200}
    assert moved[1] == {"all-reduce": 1200, "all-gather": 1200}
    assert moved[2] == {"all-reduce": 3600, "all-gather": 1200}
    assert scaling.volumes({"stage": 3}, uses, 600, 3, 2) == {"reduce-scatter": 3600, "all-gather": 6000}  # all fits the distance of 10^9
    assert scaling.volumes({"stage": 3, "stage3_max_reuse_distance": 0}, uses, 600, 3, 2) == {"reduce-scatter": 3600, "all-gather": 12000}


def test_what_zero3_gathers_by_hand():
    uses = [("embedding", 10), ("layer", 5), ("norm", 1), ("embedding", 10)]  # tied: the head is the embedding
    assert scaling.gathered(uses, 10**9) == 16
    # between the two uses of the embedding there are 6 numbers in each direction, between those of the head none, of the norm 20, of the layer 22
    assert scaling.gathered(uses, 0) == 2 * (10 + 5 + 1 + 10)
    assert scaling.gathered(uses, 6) == 10 + 5 + 1 + 10 + 1 + 5 + 10
    assert scaling.gathered(uses, 7) == 10 + 5 + 1 + 1 + 5
    assert scaling.gathered(uses, 21) == 10 + 5 + 1 + 5


def test_a_ring_by_hand():
    two = scaling.cost({"all-reduce": 8e9}, 2, LINKS)
    assert (two.intra, two.inter, two.seconds) == (8e9, 0, 0.08)  # twice half of the buffer, at 100 GB/s
    sixteen = scaling.cost({"reduce-scatter": 16e9, "all-gather": 16e9}, 16, LINKS)
    assert sixteen.intra + sixteen.inter == 30e9 and sixteen.inter == 30e9 / 8  # two of the ring's sixteen links lead to another node
    assert sixteen.seconds == 30 / 40 > 30 * 7 / 8 / 100  # a node sends what a ring carries
    assert scaling.cost({"all-gather": 16e9}, 16, scaling.Links(8, 10.0, 1000.0)).seconds == pytest.approx(15 * 7 / 8 / 10)
    assert scaling.cost({"all-reduce": 1e9}, 1, LINKS) == scaling.Cost(0, 0, 0)
    twelve = scaling.cost({"all-gather": 12e9}, 12, LINKS)  # the second node is half full
    assert twelve.inter == pytest.approx(11e9 * 2 / 12)


def test_efficiency_is_bounded_by_nothing_hidden_and_by_what_can_be():
    assert scaling.efficiency(3, 1, 1) == (0.75, 1)
    assert scaling.efficiency(3, 1, 0) == (0.75, 0.75)
    assert scaling.efficiency(1, 4, 4) == (0.2, 0.25)
    assert scaling.efficiency(2, 3, 2) == (0.4, 2 / 3)
    assert scaling.efficiency(1, 0, 0) == (1, 1)


def test_what_deepspeed_waits_for_is_hidden_behind_nothing():
    reduced, scattered = {"all-reduce": 1, "all-gather": 1}, {"reduce-scatter": 1, "all-gather": 1}
    assert scaling.hideable({"stage": 0, "overlap_comm": True}, {"all-reduce": 1}) == {}
    assert scaling.hideable({"stage": 1}, reduced) == scaling.hideable({"stage": 2, "overlap_comm": False}, reduced) == {}
    assert scaling.hideable({"stage": 2, "overlap_comm": True}, reduced) == {"all-reduce": 1}
    assert scaling.hideable({"stage": 3}, scattered) == scattered
    assert scaling.hideable({"stage": 3, "overlap_comm": False}, scattered) == {"all-gather": 1}
    found = scaled(*LLAMA)["presets"]
    at_64 = {name: next(row for row in found[name]["worlds"] if row["world"] == 64) for name in ("zero0", "zero1", "zero2", "zero3")}
    assert [at_64[name]["efficiency_at_best"] > at_64[name]["efficiency_in_turn"] for name in at_64] == [False, False, True, True]
    assert at_64["zero2"]["efficiency_at_best"] < 1 == at_64["zero3"]["efficiency_at_best"]


def test_a_batch_that_is_fixed_does_not_scale(tmp_path, capsys):
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text()) | {"train_batch_size": 32}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        plan.main([*LLAMA, "--scaling", "--deepspeed", str(tmp_path / "mine.json")])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "mine.json: train_batch_size is 32 on any number of GPUs, while --scaling" in said and 'write "auto"' in said


def test_scaling_of_a_3b_model_by_hand():
    found = scaled(*LLAMA, "--per_device_train_batch_size", "2", "--mfu", "0.5", "--gpus_per_node", "4", "--intra_gbs", "200", "--inter_gbs", "50")
    n = 3_212_749_824 + (129_600 - 128_256) * 3072
    assert list(found["presets"]) == list(plan.NAMES) and found["links"] == {"gpus_per_node": 4, "intra": 200, "inter": 50}
    two = found["presets"]["zero2"]
    assert two["chosen"] and two["collectives"] == {"all-reduce": 2 * n, "all-gather": 2 * n}
    assert [row["world"] for row in two["worlds"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    row = next(row for row in two["worlds"] if row["world"] == 16)
    assert (row["rows"], row["ecgs"]) == (32, 416)
    sent = 3 * 2 * n * 15 / 16
    assert row["inter"] == pytest.approx(sent / 4) and row["seconds"] == pytest.approx(sent / 50e9)
    compute = plan.make_plan(parse(plan.PlanArguments, "", [*LLAMA, "--per_device_train_batch_size", "2", "--mfu", "0.5", "--world", "16"]))["step_seconds"]
    assert found["compute_seconds"] == pytest.approx(compute)
    assert row["efficiency_in_turn"] == pytest.approx(compute / (compute + row["seconds"]))
    gathering = row["seconds"] / 3  # a ring carries an all-reduce twice; the updated weights are waited for
    assert row["efficiency_at_best"] == pytest.approx(compute / (max(compute, 2 * gathering) + gathering))


@pytest.mark.parametrize("backbone", ["meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B"])
def test_memory_is_that_of_the_plan(backbone):
    argv = ["--backbone", backbone, "--ecgs", "9", "--precision", "bf16", "--gradient_checkpointing", "full", "--deepspeed", "ds_configs/zero3.json"]
    found, planned = scaled(*argv), plan.make_plan(parse(plan.PlanArguments, "", [*argv, "--world", "64"]))
    for name, preset in found["presets"].items():
        row = next(row for row in preset["worlds"] if row["world"] == 64)
        assert row["memory"]["peak"] == planned["presets"][name]["peak"]["full"]
    gathered = found["presets"]["zero3"]["collectives"]["all-gather"] / 2
    # Llama-3.1-8B has a head of its own; the 10^9 numbers that ZeRO-3 may keep are the head and some layers
    assert 1.7 * planned["parameters"] < gathered < 2.2 * planned["parameters"]


def test_the_command_prints_every_preset_and_world(capsys):
    argv = ["--recipe", str(ROOT / "recipes/llama3.2-3b-pretrain.yaml"), "--scaling", "--ecgs", "9", "--gradient_accumulation_steps", "2"]
    plan.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    plan.main(argv)
    said = capsys.readouterr().out
    assert "zero2*  all-reduce 12.9 GB, all-gather 6.4 GB" in said and "zero0  refused: ZeRO stage 0 would sum" in said
    numbers = [line.split() for line in said.splitlines() if line[:6].strip().isdigit()]
    assert [int(line[0]) for line in numbers] == [*scaling.WORLDS] * 5 and max(map(len, said.splitlines())) < 170
    assert "refused" in found["presets"]["zero0"] and found["presets"]["zero2"]["worlds"][9]["ecgs"] == 512 * 4 * 13
    assert "!" in said  # one GPU holds no ZeRO-2 of it


@pytest.mark.parametrize("argv", [["--gpus_per_node", "0"], ["--intra_gbs", "0"], ["--inter_gbs", "-1"], ["--intra_gbs", "nan"]])
def test_mistakes_of_links(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        plan.main([*LLAMA, "--scaling", *argv])
    assert caught.value.code == 2 and "--gpus_per_node must be at least 1, --intra_gbs and --inter_gbs above 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured():
    """What benchmarks/scaling.py counts on two ranks, a dictionary for each of CASES."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(CASES)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    found = [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("found ")]
    assert len(found) == len(CASES), run.stderr[-3000:]
    return found


FAILS = """
import time, os
from benchmarks import scaling
def rank(*given):
    if os.environ["RANK"] == "0":
        time.sleep(10000)
    raise ValueError("of rank 1")
scaling.rank = rank
scaling.measure(2, 1, "fp32", 1, {}, 0, ["--backbone", "tiny", "--seq_len", "1000"])
"""


@pytest.mark.launch
def test_a_rank_that_fails_ends_the_measurement():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert run.returncode == 1 and "a rank failed" in run.stderr and "ValueError: of rank 1" in run.stderr


@pytest.mark.launch
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:3])))
def test_the_bytes_of_a_real_engine(measured, number):
    """Of each kind within 1 %: the counts of targets, norms and flags are not planned, nor is what is padded."""
    found = measured[number]
    assert set(found["planned_bytes"]) <= set(found["counted_bytes"]) <= set(scaling.PASSES)
    for kind, counted in found["counted_bytes"].items():
        assert found["planned_bytes"].get(kind, 0) == pytest.approx(counted, rel=0.01, abs=1e5), kind


@pytest.mark.launch
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:3])))
def test_the_memory_of_a_real_engine(measured, number):
    """The most that the allocator gave out at a time in a step."""
    assert measured[number]["planned"] == pytest.approx(measured[number]["measured"], rel=0.1)


def test_the_tables_of_the_document_are_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```\npython -m toolkit\.plan ([^\n]*)\n```\n\n```text\n([^`]*)\n```", (ROOT / "docs/scaling.md").read_text())
    assert ["3B" in shown for _, shown in blocks] == [True, False]
    for argv, shown in blocks:
        plan.main(argv.split())
        assert capsys.readouterr().out.rstrip() == shown
