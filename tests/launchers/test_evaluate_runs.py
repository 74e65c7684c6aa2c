"""Evaluation on 1, 2 and 3 ranks, killed and gone on with, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launchers.conftest import EVALUATE, ROOT, deepspeed, run
from toolkit.errors import UserError
from toolkit.evaluation import blind
from toolkit.evaluation.metrics import exact_match
from toolkit.evaluation.table import find, table
from toolkit.shards.reader import Shards

pytestmark = pytest.mark.launch



def read_lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def evaluate(line, out, *more):
    """The words of the evaluation of `line`, but for the folder."""
    return ["launchers/evaluate.py", "--model", line / "instruct", "--shards", line / "tasks", "--split", "test", "--output_dir", out, *EVALUATE, *more]


def same(folder, other):
    for name in ("predictions.jsonl", "metrics.json", "report.html"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_every_task_is_answered_once(line):
    rows = read_lines(line / "evaluate" / "predictions.jsonl")
    shards = Shards.open(line / "tasks", "test")
    metas = [shards.meta(i) for i in range(len(shards))]
    assert [row["id"] for row in rows] == [task["id"] for meta in metas for task in meta["tasks"]]
    assert all(set(row["controls"]) == {"majority", "blind", "shuffled", "flat"} and row["loglik"] <= 0 for row in rows)
    patients = {meta["patients"][0] for meta in metas}
    assert len({row["patient"] for row in rows}) == len(patients)
    metrics = json.loads((line / "evaluate" / "metrics.json").read_text())
    assert metrics["columns"] == ["model", "majority", "blind", "shuffled", "flat"]
    for kind, share in exact_match(rows).items():
        if share is not None:
            row = find(metrics, "exact_match", *(("all", "all") if kind == "overall" else (kind, "question_type")))
            assert row["values"]["model"] == pytest.approx(share)
    train = Shards.open(line / "tasks", "train")
    classes = blind.fit(task for i in range(len(train)) for task in train.meta(i)["tasks"])["classes"]
    assert metrics["table"] == table(rows, classes)["table"] and find(metrics, "invalid")["n"] == find(metrics, "exact_match")["n"]
    written = "".join((line / "evaluate" / name).read_text() for name in ("predictions.jsonl", "metrics.json", "report.html"))
    assert not any(patient in written for meta in metas for patient in meta["patients"])
    cut = sum(row.get("cut", False) for row in rows)
    assert cut and f"{cut} of {len(rows)} answers were cut at --max_new_tokens 8" in " ".join(metrics["notes"])
    assert "not for diagnosis" in written and metrics["run"]["leak check"].startswith("no patient is in")


def test_killed_and_gone_on_with_by_three_ranks_is_what_two_made(line, tmp_path):
    words = list(map(str, evaluate(line, tmp_path)))
    environment = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words_of_env = ["env", *(f"{name}={value}" for name, value in environment.items())]
    process = subprocess.Popen([*words_of_env, sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, deadline = tmp_path / "predictions.jsonl", time.time() + 120
    while not (path.is_file() and path.stat().st_size) and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "metrics.json").exists()
    before = read_lines(path)
    assert 0 < len(before) < len(read_lines(line / "evaluate" / "predictions.jsonl"))
    with open(path, "a") as f:
        f.write('{"sample": 3, "predic')  # the half line of a crash
    done = deepspeed(*words, ranks=3)
    assert done.returncode == 0, done.stdout[-3000:]
    same(tmp_path, line / "evaluate")
    stamp = (tmp_path / "metrics.json").stat().st_mtime_ns
    again = run(sys.executable, *words)
    assert again.returncode == 0 and "complete already" in again.stdout and (tmp_path / "metrics.json").stat().st_mtime_ns == stamp


def test_one_rank_answers_the_same(line, tmp_path):
    done = run(sys.executable, *evaluate(line, tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "Exact match" in done.stdout, done.stdout[-3000:]
    same(tmp_path, line / "evaluate")


def test_constrained_and_noisy(line, tmp_path):
    done = run(sys.executable, *evaluate(line, tmp_path, "--answers", "constrained", "--noise_db", 20, "--controls", "words", "--report_ecgs", 2))
    assert done.returncode == 0, done.stdout[-3000:]
    rows = read_lines(tmp_path / "predictions.jsonl")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["columns"] == ["model", "majority", "blind", "noise 20 dB"] and find(metrics, "invalid")["values"]["model"] == 0
    for row in rows:
        if row["task"] == "ecgqa":
            best, *others = row["likelihoods"].items()
            assert best == (row["prediction"], row["loglik"]) and all(value <= best[1] for _, value in others)


@pytest.fixture
def called(line, tmp_path, monkeypatch):
    """The launcher called in this process with further words."""

    def call(*more, out=tmp_path / "out"):
        import launchers.evaluate

        monkeypatch.setattr(sys, "argv", [str(word) for word in evaluate(line, out, *more)])
        launchers.evaluate.main()

    return call


def test_what_it_refuses(line, tmp_path, called):
    with pytest.raises(UserError, match=r"--train_shards: \d+ of the \d+ patients of split train are in the training shards"):
        called("--split", "train")  # the model remembers what it was trained on
    with pytest.raises(UserError, match="patients of split train are in the training shards"):
        called("--split", "train", "--train_shards", line / "shards")  # what is named does not stand in for what is remembered
    with pytest.raises(UserError, match="--train_shards: .*nowhere has no index.json"):
        called("--train_shards", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--classes: "):
        called("--classes", tmp_path / "nowhere.csv")
    (tmp_path / "few.csv").write_text("template_id,classes\n1,\"['yes', 'no']\"\n")
    with pytest.raises(UserError, match="--classes: no answers for template"):
        called("--answers", "constrained", "--classes", tmp_path / "few.csv")
    with pytest.raises(UserError, match="--noise_db: must be different numbers"):
        called("--noise_db", 10, 10)
    with pytest.raises(UserError, match="--report_ecgs"):
        called("--report_ecgs", -1)
    assert not (tmp_path / "out").exists()
    shutil.copytree(line / "evaluate", tmp_path / "copy")
    with pytest.raises(UserError, match="holds the evaluation with max_new_tokens 8, not 9; name a new folder"):
        called("--max_new_tokens", 9, out=tmp_path / "copy")
    with pytest.raises(UserError, match="holds a training run or a model; name a new folder"):
        called(out=line / "instruct")
    (tmp_path / "copy" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match="evaluation.json is damaged; name a new folder"):
        called(out=tmp_path / "copy")
    (tmp_path / "copy" / "evaluation.json").unlink()
    with pytest.raises(UserError, match="holds an evaluation of an older version"):
        called(out=tmp_path / "copy")


def test_a_dataset_from_its_download_in_one_command(line, tmp_path):
    data = tmp_path / "data"
    assert run(sys.executable, "-m", "toolkit.ecg.synthetic", "--out", data, "--records", 40, "--seed", 9).returncode == 0
    words = [sys.executable, "launchers/transfer.py", "--model", line / "instruct", "--source", "ptbxl", "--root", data / "ptbxl", "--qa", data / "ecgqa",
             "--out", tmp_path / "z", "--num_gpus", 1, *EVALUATE, "--controls", "words", "--on_leak", "warn"]  # fmt: skip
    done = run(*words)
    assert done.returncode == 0, done.stdout[-3000:]
    metrics = json.loads((tmp_path / "z" / "evaluate" / "metrics.json").read_text())
    assert find(metrics, "exact_match")["n"] > 0 and metrics["run"]["majority answers of"].endswith("z/tasks")
    assert any(note.startswith("Leak: ") for note in metrics["notes"])  # synthetic patients have the same numbers
    again = run(*words)
    assert again.returncode == 0 and "evaluate is complete already" in again.stdout, again.stdout[-3000:]
