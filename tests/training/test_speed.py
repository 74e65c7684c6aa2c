"""The numbers of a log line by hand, and a real trace of a small loop."""

import json
import math
import resource

import pytest
import torch

from toolkit.errors import UserError
from toolkit.training.profile import Profiler, steps_of
from toolkit.training.speed import Interval

CPU = torch.device("cpu")
ORDER = [
    "loss", "grad_norm", "learning_rate", "memory_gb", "ecgs_per_second", "tokens_per_second", "tflops", "mfu", "data_wait", "skew", "seconds_left",
    "step_seconds",
]  # fmt: skip


def test_an_interval_by_hand():
    interval = Interval(CPU, world=2, peak=8e12)
    interval.add(4.0, targets=900, tokens=1000, ecgs=3, flops=4e12, seconds=1.0, waited=0.25, collective=0.5, forward=None)
    interval.add(math.inf, targets=900, tokens=1000, ecgs=3, flops=4e12, seconds=1.0, waited=0.0, collective=0.25, forward=None)
    # one slow step does not tell how long the others will take
    interval.add(5.0, targets=2700, tokens=2000, ecgs=6, flops=8e12, seconds=6.0, waited=0.0, collective=1.5, forward=None)
    step, compute, waited, collective, memory = interval.own()
    assert (step, compute, waited, collective) == pytest.approx((8 / 3, 5.5 / 3, 0.25 / 3, 2.25 / 3)) and step == pytest.approx(compute + waited + collective)
    values = interval.values(steps_left=10, grad_norm=0.5, learning_rate=1e-3, skew=1.5)
    assert list(values) == ORDER
    assert values.pop("memory_gb") == memory == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rel=0.01)
    assert values == {
        "loss": 4.75, "grad_norm": 0.5, "learning_rate": 1e-3, "ecgs_per_second": 1.5, "tokens_per_second": 500.0, "tflops": 1.0, "mfu": 0.125,
        "data_wait": 0.25 / 8, "skew": 1.5, "seconds_left": 10.0, "step_seconds": 1.0,
    }  # fmt: skip


def test_what_is_not_known_is_not_said():
    interval = Interval(CPU, world=1, peak=1e12)
    interval.add(math.nan, targets=9, tokens=10, ecgs=1, flops=0.0, seconds=2.0, waited=0.0, collective=0.5, forward=None)
    values = interval.values(0, None, 1e-3, None)
    assert values["loss"] is None and values["grad_norm"] is None and not {"tflops", "mfu", "skew"} & values.keys()


def test_of_a_gpu_computing_is_its_forward_passes():
    interval = Interval(CPU, world=2, peak=1e12)
    for forward in (0.5, 1.0):
        interval.add(4.0, targets=9, tokens=10, ecgs=1, flops=0.0, seconds=2.0, waited=0.25, collective=0.125, forward=forward)
    assert interval.own()[:4] == [2.0, 0.75, 0.25, 0.125]


def spy_loop(profiler: Profiler, first: int, last: int):
    x = torch.ones(8, 8)
    for n in range(first, last):
        profiler.step(n)
        x = torch.mm(x, x).softmax(-1)
    profiler.close()


@pytest.mark.parametrize(("spec", "last", "traced"), [("3:5", 9, [3, 4]), ("7:20", 9, [7, 8])])
def test_a_trace_holds_the_steps_asked_for_and_what_ran_in_them(tmp_path, spec, last, traced):
    spy_loop(Profiler(spec, tmp_path), 0, last)
    events = [event for event in json.loads((tmp_path / "profile" / "trace-rank0.json").read_text())["traceEvents"] if event.get("ph") == "X"]
    marks = sorted((event for event in events if event["name"].startswith("step ")), key=lambda event: event["ts"])
    assert [mark["name"] for mark in marks] == [f"step {n}" for n in traced]
    products = [event for event in events if event["name"] == "aten::mm"]
    assert len(products) == len(traced)
    for mark, product in zip(marks, sorted(products, key=lambda event: event["ts"])):
        assert mark["ts"] <= product["ts"] and product["ts"] + product["dur"] <= mark["ts"] + mark["dur"]


@pytest.mark.parametrize("spec", [None, "0:2"])
def test_without_a_step_to_trace_there_is_no_trace(tmp_path, spec):
    spy_loop(Profiler(spec, tmp_path), 2, 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", ["", "10", "15:10", "5:5", "-1:3", "a:b", "1:2:3"])
def test_what_is_no_range_of_steps_is_named(spec):
    with pytest.raises(UserError, match="--profile: "):
        steps_of(spec)


def test_a_trace_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "profile").write_text("no folder")
    with pytest.raises(UserError, match="--output_dir: cannot write"):
        spy_loop(Profiler("0:1", tmp_path), 0, 2)
