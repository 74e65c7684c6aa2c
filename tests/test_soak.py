"""benchmarks/soak.py: its faults strike what they name and undo themselves, its comparison finds each kind of loss, and a short soak holds."""

import errno
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.compat.proto.summary_pb2 import Summary

from benchmarks import faults, soak, soak_checks, soak_runs
from toolkit.errors import UserError
from toolkit.training.events import EventFile

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6


def test_every_lap_has_every_fault_and_every_moment_comes():
    kinds, laps = list(faults.FAULTS), 4
    drawn = list(itertools.islice(faults.deck(0, kinds), laps * len(kinds)))
    assert drawn == list(itertools.islice(faults.deck(0, kinds), laps * len(kinds)))  # the seed decides
    assert drawn != list(itertools.islice(faults.deck(1, kinds), laps * len(kinds)))
    for lap in range(laps):
        assert sorted(fault.kind for fault in drawn[lap * len(kinds) :][: len(kinds)]) == sorted(kinds)
    for kind in kinds:
        assert {fault.moment for fault in drawn if fault.kind == kind} == set(faults.FAULTS[kind].moments)
    assert {fault.rank for fault in drawn} == {0, 1} and all(0 <= fault.share < 1 for fault in drawn)


def test_what_is_seen_of_a_run_folder(tmp_path):
    assert faults.last_step(tmp_path) == 0 and faults.whole_checkpoints(tmp_path) == [] and not faults.being_written(tmp_path)
    lines = [{"step": step, "loss": 1.0, "more": "x" * 100} for step in range(1, 101)] + [{"step": 100, "save_seconds": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
    for step in (90, 100, 110):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (90, 100):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert faults.last_step(tmp_path) == 100
    assert faults.whole_checkpoints(tmp_path) == [90, 100]
    assert faults.being_written(tmp_path) == {(tmp_path / "checkpoint-110").stat().st_ino}


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_bad_shard_is_another_for_a_while(tmp_path, share):
    whole = {name: bytes(range(256)) * (4 + i) for i, name in enumerate(("train-000000.tar", "train-000001.tar", "valid-000000.tar"))}
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    with faults.bad_shard(tmp_path, share) as path:
        assert path.name.startswith("train")
        flipped = [a ^ b for a, b in zip(whole[path.name], path.read_bytes(), strict=True)]
        assert sum(map(bool, flipped)) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


FULL = """
import pathlib, sys
from benchmarks.faults import full_disk
disk = pathlib.Path(sys.argv[1])
with full_disk(disk) as fill:
    for again in (False, True):
        try:
            (disk / "a").write_bytes(bytes(100_000))
        except OSError as error:
            print(error.errno, (disk / "a").stat().st_size)
        (disk / "a").unlink()
        (disk / "old").unlink(missing_ok=True)  # what becomes free is filled too
        fill()
(disk / "a").write_bytes(bytes(100_000))
print(sorted(path.name for path in disk.iterdir()))
"""


@pytest.fixture(scope="module")
def name_spaces():
    command = soak.name_spaces()
    if not command:
        pytest.skip("this system does not let us open name spaces")
    return command


def test_a_full_disk_takes_nothing_until_it_is_free_again(name_spaces, tmp_path):
    script = f"mount -t tmpfs -o size=2m tmpfs {tmp_path} && head -c 500000 /dev/zero > {tmp_path}/old && {sys.executable} -c '{FULL}' {tmp_path}"
    done = subprocess.run([*name_spaces, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{errno.ENOSPC} 0", f"{errno.ENOSPC} 0", "['a']"], done.stderr
    assert not list(tmp_path.iterdir())  # nobody else saw that disk


def test_what_is_started_in_name_spaces_dies_with_them(name_spaces):
    process = subprocess.Popen([*name_spaces, "sh", "-c", "setsid sleep 321 & wait"])
    try:
        until = time.time() + 20
        while time.time() < until and not (below := [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "sleep"]):
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert len(below) == 1 and psutil.wait_procs(below, timeout=20)[1] == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="--out .* holds something that is no soak's"):
        soak.begin(tmp_path)
    soak.begin(tmp_path / "new")
    (tmp_path / "new" / "logs").mkdir()
    soak.begin(tmp_path / "new")  # begun anew
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["soak.json"]


def run_folder(folder: Path) -> Path:
    """A complete run as soak_checks looks at it."""
    (folder / "heartbeats").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, STEPS + 1)))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "train_results.json").write_text(json.dumps({"steps": STEPS, "samples": 12, "skipped": 0, "train_seconds": time.time()}))
    for step in (4, 6):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").touch()
    events = EventFile(folder / "tensorboard", 0)
    for step in range(1, STEPS + 1):
        events.add(Summary(value=[Summary.Value(tag="loss", simple_value=1 / step), Summary.Value(tag="step_seconds", simple_value=time.time())]), step)
    events.close()
    return folder


def test_two_runs_that_are_the_same(tmp_path):
    one, other = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    (other / "checkpoint-4").rename(other / "checkpoint-5")  # saved on request at another step
    (other / "hang").mkdir()
    assert soak_checks.differences(one, other, STEPS) == []
    assert sorted(soak_checks.wall_times(other)) == list(range(1, STEPS + 1))


def log_line(folder, step, loss):
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def event_twice(folder):
    events = EventFile(folder / "tensorboard", STEPS)
    events.known = set()
    events.add(Summary(value=[Summary.Value(tag="loss", simple_value=1 / STEPS)]), STEPS)
    events.close()


LOSSES = {
    "a step twice": (lambda p: log_line(p, 6, 1 / 6), "does not hold every step once, in order: twice [6], missing []"),
    "a step missing": (lambda p: replace(p / "log.jsonl", '"step": 5', '"step": 7'), "missing [5]"),
    "another loss": (
        lambda p: replace(p / "log.jsonl", "0.25", "0.25000000000000006"),
        "first one at step 4",
    ),
    "other weights": (lambda p: (p / "model.safetensors").write_bytes(b"weightz"), "model.safetensors is not that"),
    "samples twice": (lambda p: replace(p / "train_results.json", "12", "14"), "counts {'steps': 6, 'samples': 14"),
    "an event twice": (event_twice, "TensorBoard has loss twice at steps [6]"),
    "no events": (lambda p: [path.unlink() for path in (p / "tensorboard").iterdir()], "TensorBoard's step_seconds is missing"),
    "STOP": (lambda p: (p / "STOP").touch(), "STOP is left over"),
    "half a file": (lambda p: (p / "checkpoint-6" / ".x.partial").touch(), "checkpoint/.x.partial is left over"),
    "a heartbeat": (lambda p: (p / "heartbeats" / "rank-1.json").touch(), "heartbeats/rank-1.json is left over"),
    "a damaged checkpoint": (lambda p: (p / "checkpoint-4").rename(p / "damaged-4"), "damaged-4 is left over"),
    "three checkpoints": (lambda p: (p / "checkpoint-2").mkdir(), "3 checkpoints are kept, not 2"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_kind_of_loss_is_found(tmp_path, name):
    one, other = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    change, said = LOSSES[name]
    change(other)
    assert any(said in problem for problem in soak_checks.differences(one, other, STEPS)), soak_checks.differences(one, other, STEPS)


def test_the_table_counts():
    events = [{"kind": "kill rank", "moment": "start", "code": 247, "ended_after": 3.0, "further_after": 20.0},
              {"kind": "kill rank", "moment": "end", "code": 247, "ended_after": 5.0, "further_after": 30.0},
              {"kind": "full disk", "moment": "saving", "code": None, "ended_after": None, "further_after": 9.0}]  # fmt: skip
    lines = soak.table({"faults": events}).splitlines()
    assert next(line for line in lines if line.startswith("kill rank")).split() == ["kill", "rank", "2", "247", "4", "(5)", "25", "(30)"]
    assert next(line for line in lines if line.startswith("full disk")).split() == ["full", "disk", "1", "goes", "on", "-", "9", "(9)"]
    assert lines[-1] == "3 faults: 1 in start, 0 in training, 1 in saving, 0 in validation, 1 in end"


def running(path: Path) -> list[str]:
    """Command lines of processes that speak of a path."""
    return [words for process in psutil.process_iter(["cmdline"]) if str(path) in (words := " ".join(process.info["cmdline"] or []))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_of_it(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "benchmarks/soak.py", "--out", tmp_path / "out"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.time() + 60
    while time.time() < until and not (tmp_path / "out" / "corpus" / "manifest").exists():  # the second of its programs is at work
        time.sleep(0.02)
    assert running(tmp_path)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    until = time.time() + 20
    while time.time() < until and running(tmp_path):
        time.sleep(0.05)
    assert not running(tmp_path)


@pytest.mark.launch
def test_a_run_that_two_faults_strike_is_the_run_that_none_did(tmp_path):
    scene = soak_runs.Scene(tmp_path, soak.make_shards(tmp_path / "corpus"), disk=None, steps=30, value=str(tmp_path))
    chosen = [faults.Fault("kill rank", "saving", 0.1, rank=1), faults.Fault("requeue", "start", 0.5, rank=0)]
    try:
        pace = soak_runs.undisturbed(scene)
        soak_runs.disturbed(scene, tmp_path / "run", pace, iter(chosen), until=time.monotonic() + 3600)
    finally:
        soak_runs.stop_all(scene.value)
    assert scene.problems == [] and [event["code"] for event in scene.struck] == [faults.KILLED, faults.SAVED]
    assert all(event["further_after"] > event["ended_after"] > 0 for event in scene.struck)
    assert soak_checks.differences(tmp_path / "undisturbed", tmp_path / "run", scene.steps) == []
    assert not running(tmp_path)
