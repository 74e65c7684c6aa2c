"""`sharding.line`: a recipe's sections `shard` and `tasks`, in one process, in an array, and with two processes at one part."""

import fcntl
import json
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from sharding import archive, line, prepare, shard_tasks
from tests.sharding.test_prepare import record, table
from tests.sharding.test_prepare import signal as random_walk
from tests.sharding.test_shard import array, sha256
from toolkit.errors import UserError
from toolkit.files import sweep, whole_file
from toolkit.shards.reader import Shards, read_index
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

RECORDS = 24


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with root (24 records with reports), tokenizer and qa (a question on the first record of each fold)."""
    out = tmp_path_factory.mktemp("line")
    rows = [record(out / "root", i, random_walk(seed=i)) | {"strat_fold": 1 + i % 10, "report": f"sinus rhythm {i}"} for i in range(1, RECORDS + 1)]
    table(out / "root", rows)
    torch.manual_seed(0)
    ECGTokenizer(TokenizerConfig()).save_pretrained(out / "tokenizer")
    return out


def recipe(corpus, out, **shard):
    """A recipe's path, for the corpus to `out`/d and its reports to `out`/i."""
    sections = {
        "shard": {"source": "ptbxl", "root": str(corpus / "root"), "tokenizer": str(corpus / "tokenizer"), "out": str(out / "d"), "shard_size": 4,
                  "workers": 1, "keep_boilerplate": True, **shard},
        "tasks": [{"kind": "reports", "out": str(out / "i")}],
        "pretrain": {"backbone": "tiny"},
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    (out / "line.yaml").write_text(yaml.safe_dump(sections))
    return str(out / "line.yaml")


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """What the programs that the line is made of write, called one by one."""
    out = tmp_path_factory.mktemp("reference")
    archive.main(["ptbxl", "--root", str(corpus / "root"), "--tokenizer", str(corpus / "tokenizer"), "--out", str(out / "d"), "--shard_size", "4",
                  "--workers", "1", "--keep_boilerplate"])  # fmt: skip
    shard_tasks.main(["reports", "--shards", str(out / "d/shards"), "--out", str(out / "i")])
    return out


def test_a_line_is_what_its_programs_write_and_again_is_harmless(corpus, reference, tmp_path):
    path = recipe(corpus, tmp_path)
    for _ in range(2):
        line.main([path])
        assert sha256(tmp_path / "d/shards") == sha256(reference / "d/shards") and sha256(tmp_path / "i") == sha256(reference / "i")
    assert len(Shards.open(tmp_path / "i", "train")) > 10
    with pytest.raises(UserError, match="--out: .*/i was not made from these --shards"):
        line.main([path, "--out", str(tmp_path / "other"), "--shard_size", "8"])  # the command line overrides the recipe
    assert read_index(tmp_path / "other/shards")["shard_size"] == 8


def test_an_array_whose_second_job_was_killed_is_completed_by_that_job_alone(corpus, reference, tmp_path, monkeypatch, capsys):
    path = recipe(corpus, tmp_path)
    monkeypatch.setattr(prepare, "PART", 8)
    prepared = line.shard_arguments(path)
    prepare.main(["ptbxl", "--root", str(corpus / "root"), "--out", str(prepared.out / "manifest"), "--workers", "1", "--keep_boilerplate"])

    def job(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        line.main([path])
        return capsys.readouterr().out

    assert "still with other ranks (of 3)" in job(**array(5, 4, 6, 1, 3)) and "left to the process" in job(**array(6, 4, 6, 1, 3))
    assert not (tmp_path / "d/shards/index.json").exists() and not (tmp_path / "i").exists()
    assert "sinus" not in job(**array(4, 4, 4, 1, 1))  # sbatch --array=4: the one that was killed
    assert sha256(tmp_path / "d/shards") == sha256(reference / "d/shards") and sha256(tmp_path / "i") == sha256(reference / "i")
    with pytest.raises(UserError, match=r"--array: its 2 numbers from 3 to 5 have gaps; --array=0-1 shares"):
        job(**array(3, 3, 5, 1, 2))


def test_two_jobs_that_are_both_an_array_of_one_take_turns(corpus, reference, tmp_path, monkeypatch, capsys):
    path, said = recipe(corpus, tmp_path), ""
    for name, value in array(3, 3, 3, 1, 1).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "d").mkdir()
    second = threading.Thread(target=line.main, args=([path],))
    with FileLock(tmp_path / "d/.rank-0-of-1.lock"):  # of the first
        second.start()
        while "another job does the work of rank 0 of 1; this one waits for its end" not in said:
            assert second.is_alive(), said
            said += capsys.readouterr().out
            time.sleep(0.01)
        assert not (tmp_path / "d/manifest").exists()
    second.join()
    assert sha256(tmp_path / "d/shards") == sha256(reference / "d/shards") and sha256(tmp_path / "i") == sha256(reference / "i")


def test_a_file_that_another_process_writes_is_not_swept(tmp_path):
    """What makes overlapping work safe: a job that does all that is left sweeps the folder in which others still write."""
    (tmp_path / ".train-000000.tar.dead.partial").write_text("of a killed process")
    with whole_file(tmp_path / "train-000000.tar") as file:
        file.write(b"whole")
        for name in ("train-000000.tar", ""):
            sweep(tmp_path, name)
        assert len(list(tmp_path.iterdir())) == 1
    assert (tmp_path / "train-000000.tar").read_bytes() == b"whole"
    with open(tmp_path / "train-000000.tar", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nor does the lock outlive the writing


def _sweep_until(folder: Path, stop) -> None:
    while not stop.is_set():
        sweep(folder, "")


def test_no_file_is_lost_while_another_process_sweeps_its_folder(tmp_path):
    """Between the making of a file and its lock, and between the lock's end and the new name, a sweep once took it: 1 write in some hundred died."""
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    sweeper = spawn.Process(target=_sweep_until, args=(tmp_path, stop))
    sweeper.start()
    try:
        begun = time.monotonic()
        for i in range(1500):
            with whole_file(tmp_path / f"{i % 7}") as file:
                file.write(b"%d" % i)
            if i == 0:  # the sweeper's process takes a while to start
                (tmp_path / ".dead.partial").write_text("")
                while (tmp_path / ".dead.partial").exists():
                    assert time.monotonic() - begun < 60
    finally:
        stop.set()
        sweeper.join()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {f"{i % 7}": b"%d" % i for i in range(1493, 1500)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "ptb"}, r"section shard: source: must be one of .*ptbxl.*, not 'ptb'"),
        ({"rooot": "x"}, r"section shard: there is no argument 'rooot'; there are root, "),
        ({"shard_size": [4]}, r"section shard: shard_size: must be one value, not \[4\]"),
        ({"shard_size": True}, r"section shard: shard_size: must be a value, not True"),
        ({"keep_boilerplate": "yes"}, r"section shard: keep_boilerplate: must be true or false, not 'yes'"),
    ],
)
def test_a_mistake_names_file_section_and_key(corpus, tmp_path, change, message):
    path = recipe(corpus, tmp_path, **change)
    with pytest.raises(UserError, match=message) as caught:
        line.main([path])
    assert str(caught.value).startswith(f"--recipe: {path}")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"kind": "questions"}], "entry 1: kind: must be one of ecgqa, reports, heartllm, not 'questions'"),
        ([{"kind": "reports", "out": "i"}, {"kind": "ecgqa", "quiz": "q"}], "entry 2: there is no argument 'quiz'"),
        ({"kind": "reports"}, r"section tasks must hold a list \("),
    ],
)
def test_a_mistake_in_tasks_shows_before_the_work(corpus, tmp_path, tasks, message):
    path = recipe(corpus, tmp_path)
    sections = yaml.safe_load((tmp_path / "line.yaml").read_text())
    (tmp_path / "line.yaml").write_text(json.dumps({**sections, "tasks": tasks}))
    with pytest.raises(UserError, match=message):
        line.main([path])
    assert not (tmp_path / "d").exists()
