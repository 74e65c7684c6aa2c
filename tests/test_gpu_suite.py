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

from benchmarks import gpu_parts, gpu_suite


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
    assert {row["what"] for row in rows} == {"equal lengths", "other lengths", "branches"}
    for row in rows:
        limit = 1e-5 if row["dtype"] == "float32" else 0.05
        assert row["packed, difference"] < limit and row["as trained, off"] < limit and row["by segment, off"] < limit


def test_a_rehearsal_lists_rows_and_failures(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_suite.PARTS, "absent", ("no such part", (), 1))
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--cpu_rehearsal", "--out", str(tmp_path), "--parts", "zero2-every_2", "absent"])
    gpu_suite.main()  # the child knows no part "absent" and fails
    (path,) = tmp_path.glob("*.json")
    parts = json.loads(path.read_text())["parts"]
    assert parts["zero2-every_2"]["rows"][0]["tokens/s"] > 0 and parts["absent"]["error"]
    table = path.with_suffix(".md").read_text()
    assert "ZeRO-2" in table and "Failed" in table and "absent" in table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu():
    assert all(row["worst gradient, relative difference"] < 0.02 for row in gpu_parts.kernels(rehearsal=False) if "not run" not in row)
