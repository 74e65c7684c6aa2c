"""A rank that is made slow is named; its numbers, by hand and as TensorBoard reads them."""

import json
import re
import socket

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from tests.training.conftest import ROOT, losses
from toolkit.training.log import RunLog
from toolkit.training.stragglers import NONE, scalars, skew, warn

SLOW_MODEL = """
import os, time
import toolkit.lm.model as model
forward = model.PackedLM.forward
def slow(self, row, logits=False):
    if self.training and os.environ["RANK"] == "1":
        time.sleep(0.6)
    return forward(self, row, logits)
model.PackedLM.forward = slow
"""


def rank(compute: float, waited: float = 0.0) -> list[float]:
    return [9.0, compute, waited, 9.0 - compute - waited, 1.5]


def test_skew_is_the_slowest_over_the_median_with_the_wait_for_data():
    assert skew([rank(1.0)]) is None
    assert skew([rank(1.0), rank(1.5)]) == pytest.approx(1.5)
    assert skew([rank(1.0), rank(1.0), rank(1.0, waited=2.0), rank(2.0)]) == pytest.approx(3.0)
    assert skew([rank(0.0), rank(0.0)]) == 0.0


def test_up_to_16_ranks_have_a_curve_each_and_more_of_them_do_not():
    few = scalars([rank(n + 1.0) for n in range(16)])
    assert len(few) == 5 * 16 and few["ranks/compute_seconds/rank_15"] == 16.0 and few["ranks/memory_gb/rank_0"] == 1.5
    many = scalars([rank(1.0, waited=2.0 * (n == 5)) for n in range(16)] + [rank(2.5)])
    assert len(many) == 5 * 3 + 1 and many["ranks/slowest"] == 5
    assert [many[f"ranks/compute_seconds/{how}"] for how in ("min", "median", "max")] == [1.0, 1.0, 2.5]


def test_only_a_rank_that_is_slow_in_three_lines_on_end_is_named_and_once(tmp_path, capsys):
    even, slow, other = [rank(1.0), rank(1.1), rank(1.0)], [rank(1.0), rank(1.3, 0.2), rank(1.0)], [rank(1.0), rank(1.0), rank(2.0)]
    streak = NONE
    for table in (slow, slow, even, slow, slow, other, other):
        streak = warn(streak, table, tmp_path)
    assert "WARNING" not in capsys.readouterr().out
    for _ in range(4):
        streak = warn(streak, other, tmp_path)
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "rank 2 on unknown" in said and "2.00 times" in said and "(2 s computing, 0 s waiting for data)" in said


def test_a_slow_rank_of_a_run_is_named_and_no_loss_changes(fork, corpus, tmp_path):
    def arguments(out):
        given = {
            "deepspeed": ROOT / "ds_configs" / "zero2.json", "backbone": corpus / "backbone", "shards": corpus / "shards", "output_dir": out, "max_steps": 6,
            "precision": "fp32", "per_device_train_batch_size": 1, "seq_len": 400, "logging_steps": 1, "save_steps": 100, "max_eval_samples": 4,
            "learning_rate": 1e-3,
        }  # fmt: skip
        return [word for flag, value in given.items() for word in (f"--{flag}", value)]

    assert fork(2, arguments(tmp_path / "even"), tmp_path / "log").wait() == [0, 0]
    run, out = fork(2, arguments(tmp_path / "slow"), tmp_path / "log-1", before=[SLOW_MODEL]), tmp_path / "slow"
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert losses(out) == losses(tmp_path / "even")
    assert re.search(rf"WARNING: rank 1 on {re.escape(socket.gethostname())} is slow, and all others wait for it", run.text())
    lines = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]
    assert all(line["skew"] > 1.2 for line in lines) and not any("rank_" in name for line in lines for name in line)
    seen = EventAccumulator(str(out / "tensorboard")).Reload()
    values = {name: [[e.value for e in seen.Scalars(f"ranks/{name}/rank_{n}")] for n in (0, 1)] for name in ("compute_seconds", "collective_seconds")}
    assert all(len(of_rank) == 6 for column in values.values() for of_rank in column)
    # rank 1 computes for over 0.6 s, in which rank 0 waits for it
    assert min(values["compute_seconds"][1]) > 0.6 > max(values["compute_seconds"][0][1:])
    assert min(values["collective_seconds"][0]) > 0.5
    step, *parts = [
        [e.value for e in seen.Scalars(f"ranks/{name}/rank_1")] for name in ("step_seconds", "compute_seconds", "data_wait_seconds", "collective_seconds")
    ]
    assert [sum(part) for part in zip(*parts)] == pytest.approx(step, rel=1e-4)


def test_the_tab_of_custom_scalars_draws_all_ranks_in_one_chart(tmp_path):
    log = RunLog(tmp_path, 0, 2, "x")
    log.ranks(1, scalars([rank(1.0), rank(2.0)]))
    log.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (config,) = seen.Tensors("custom_scalars__config__")
    charts = Layout.FromString(config.tensor_proto.string_val[0]).category[0].chart
    for chart in charts:
        (pattern,) = chart.multiline.tag
        found = [tag for tag in seen.Tags()["scalars"] if re.match(pattern, tag)]
        assert found == [f"ranks/{chart.title}/rank_{n}" for n in (0, 1)]
    assert len(charts) == 5
    assert not (tmp_path / "log.jsonl").exists()  # in TensorBoard alone
