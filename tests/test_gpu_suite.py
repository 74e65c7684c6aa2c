"""benchmarks/gpu_suite.py where there is no GPU: it says so and writes nothing; its rehearsal runs the code on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import baselines, gpu_parts, gpu_suite, gpu_training


def suite(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu_suite.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = suite("--out", tmp_path / "results")
    assert done.returncode == 0 and "no GPU" in done.stdout and not (tmp_path / "results").exists()


def test_a_rehearsal_does_not_write_beside_real_figures():
    done = suite("--cpu_rehearsal")
    assert done.returncode == 2 and "--out" in done.stderr


def test_attention_part_finds_packed_and_alone_equal():
    rows = gpu_parts.attention(rehearsal=True)
    assert {row["what"] for row in rows} == {"equal lengths", "other lengths", "branches", "questions"}
    for row in rows:
        limit = 1e-5 if row["dtype"] == "float32" else 0.05
        assert all(row[f"{way}, off"] < limit for way in ("as trained", "by SDPA", "by segment")) and row["packed, difference"] < limit


def test_a_rehearsal_lists_rows_and_failures(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_suite.PARTS, "absent", ("no such part", (), 1))
    names = ["zero2-every_2", "instruct-full", "hf-instruct-none", "absent"]
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--cpu_rehearsal", "--out", str(tmp_path), "--parts", *names])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the children: threads of their own would stand in the way of other tests
    gpu_suite.main()  # the child knows no part "absent" and fails
    (path,) = tmp_path.glob("*.json")
    parts = json.loads(path.read_text())["parts"]
    assert parts["zero2-every_2"]["rows"][0]["tokens/s"] > 0 and parts["absent"]["error"]
    (shared,), (alone,) = (parts[name]["rows"] for name in ("instruct-full", "hf-instruct-none"))
    assert shared["pairs/s"] > 0 and alone["pairs/s"] > 0 and shared["tokens a step"] < alone["tokens a step"]
    table = path.with_suffix(".md").read_text()
    assert "ZeRO-2" in table and "PEFT" in table and "Failed" in table and "absent" in table


def test_the_pairs_of_a_baseline_are_those_of_the_shared_rows():
    _, words, vocabulary = gpu_parts.shape("tiny")
    for shared, pairs in zip(*gpu_training.question_rows(words, vocabulary, rehearsal=True)):
        one_by_one = [(sample["input_ids"].tolist(), sample["labels"].tolist()) for sample in baselines.padded_samples(shared)]
        assert one_by_one == [(sample["input_ids"].tolist(), sample["labels"].tolist()) for sample in baselines.padded_samples(pairs)]
        assert len(one_by_one) == 3 and sorted(shared.targets) == sorted(pairs.targets) and len(pairs.targets) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu():
    assert all(row["worst gradient, relative difference"] < 0.02 for row in gpu_parts.kernels(rehearsal=False) if "not run" not in row)
