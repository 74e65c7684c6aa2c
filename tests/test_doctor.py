"""The doctor against real faults, each named with its mend; and between two ranks of the deepspeed launcher."""

import fcntl
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from toolkit.doctor import ranks, software
from toolkit.doctor.finding import ERROR, OK, WARNING, table, warning
from toolkit.lm.backbone import save_stamp
from toolkit.shards.writer import write_index, write_split
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig
from toolkit.training.distributed import RANK_VARIABLES

ROOT = Path(__file__).resolve().parents[1]
SECRETS = ("patient_4711", "record_0815")


def doctor(*words, limit_files=None, **environment) -> tuple[int, dict, str]:
    """(exit code, the JSON report or {}, stderr) of `python -m toolkit.doctor --json`."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    env = {**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}

    def limit():
        if limit_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    command = [sys.executable, "-m", "toolkit.doctor", "--json", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def of(report: dict, check: str) -> list[dict]:
    return [finding for finding in report["findings"] if finding["check"] == check]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Folder with tokenizers `mine` and `other`, token shards `shards` of mine, and a model folder `model` that knows its tokens."""
    out = tmp_path_factory.mktemp("doctor")
    tokenizer = ECGTokenizer(TokenizerConfig())
    tokenizer.save_pretrained(out / "mine")
    ECGTokenizer(TokenizerConfig()).save_pretrained(out / "other")
    (out / "shards").mkdir()
    rng = np.random.default_rng(0)
    meta = {"patient": SECRETS[0], "record_id": SECRETS[1], "gains": [[0.1] * 12]}
    samples = {
        name: [(f"{name}_{i:02d}", rng.integers(0, 1296, (1, 313)).astype(np.uint16), meta) for i in range(n)] for name, n in (("train", 12), ("valid", 3))
    }
    splits = {name: write_split(out / "shards", name, some, 5) for name, some in samples.items()}
    tokenizer.save_pretrained(out / "shards" / "tokenizer")
    write_index(out / "shards", splits, kind="tokens", codes=1296, levels=[6] * 4, tokens_per_ecg=313, tokenizer=tokenizer.fingerprint())
    (out / "model").mkdir()
    (out / "model" / "config.json").write_text("{}")
    save_stamp(out / "model", json.loads((out / "shards" / "index.json").read_text()), knows_text=True)
    tokenizer.save_pretrained(out / "model" / "ecg_tokenizer")
    return out


@pytest.fixture(scope="session")
def between(made):
    """(exit code, report, all that was printed) of two ranks of the deepspeed launcher."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES} | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module", "toolkit.doctor"]
    words = [*launcher, "--json", "--output_dir", str(made / "run"), "--deepspeed", "ds_configs/zero3.json"]
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    objects = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(objects) == 1, done.stdout[-4000:]
    return done.returncode, json.loads(objects[0]), done.stdout


@pytest.mark.launch
def test_between_two_ranks(between):
    code, report, text = between
    assert code == 0 and report["status"] != ERROR and report["world"] == 2, text[-4000:]
    assert list(report["hosts"].values()) == [[0, 1]] and not [what for what in report["not_checked"] if "all-reduce" in what]
    rows = report["measured"]["all_reduce"]
    assert [row["bytes"] for row in rows] == [1 << 16, 1 << 20, 1 << 24]
    for row in rows:
        assert row["right"] and row["seconds"] > 0 and row["algorithm_gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["bus_gb_s"] == pytest.approx(row["algorithm_gb_s"])  # of two ranks each sends and receives all of it once: 2 (2 - 1) / 2
    (pair,) = report["measured"]["pairs"]
    assert pair["ranks"] == [0, 1] and pair["latency_s"] > 0 and pair["gb_s"] > 0
    (clock,) = report["measured"]["clocks"]
    assert abs(clock["ahead_s"]) <= clock["within_s"] < 1  # it is the same clock
    for check in ("ranks", "placement", "clocks", "all-reduce", "pairs"):
        (found,) = of(report, check)
        assert found["status"] == OK and found["ranks"] == [0, 1]
    assert "ZeRO stage 3" in of(report, "ds_config")[0]["text"]


def test_a_sound_machine_and_a_sound_run(made, tmp_path):
    given = ["--shards", made / "shards", "--tokenizer", made / "mine", "--model", made / "model", "--deepspeed", ROOT / "ds_configs" / "zero2.json"]
    code, report, said = doctor(*given, "--output_dir", made / "run", MASTER_PORT=free_port(), TORCH_EXTENSIONS_DIR=tmp_path, TRITON_CACHE_DIR=tmp_path)
    assert code == 0 and report["status"] in (OK, WARNING), said
    for check in ("versions", "accelerator", "compiled ops", "caches", "ports", "open files", "shards", "tokenizer", "model", "ds_config", "run folder"):
        found = of(report, check)
        assert found and all(finding["status"] == OK for finding in found), found
    assert "train 12 in 3, valid 3 in 1" in of(report, "shards")[0]["text"]
    assert list(report["not_checked"]) == ["clocks, all-reduce, pairs"]
    assert not any(secret in json.dumps(report) + said for secret in SECRETS)
    assert not (made / "run").exists() and not list(made.glob(".doctor*"))  # it leaves nothing


def test_every_fault_is_named_with_its_mend(made, tmp_path):
    """All at once: one does not hide another."""
    extensions = tmp_path / "extensions"
    (extensions / "cpu_adam").mkdir(parents=True)
    (extensions / "cpu_adam" / "lock").touch()
    os.utime(extensions / "cpu_adam" / "lock", (time.time() - 3600,) * 2)
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "shards", damaged)
    (damaged / "index.json").write_text((damaged / "index.json").read_text()[:200])
    bare = tmp_path / "bare"  # as the trainers refuse it
    shutil.copytree(made / "shards", bare, ignore=shutil.ignore_patterns("tokenizer"))
    config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**config, "gradient_cliping": 1.0}))
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    words = ["--shards", made / "shards", damaged, bare, "--tokenizer", made / "other", "--model", made / "other", "--deepspeed", tmp_path / "ds.json"]
    with socket.create_server(("", 0)) as server, open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = server.getsockname()[1]
        code, report, said = doctor(*words, "--output_dir", run, limit_files=300, MASTER_PORT=port, TORCH_EXTENSIONS_DIR=extensions)
    assert code == 1 and report["status"] == ERROR, said
    wanted = {
        "compiled ops": ("killed build, 60 minutes ago", f"rm -r {extensions / 'cpu_adam'}"),
        "ports": (f"MASTER_PORT {port} is taken by process {os.getpid()}", "--master_port"),
        "open files": ("300 files", "ulimit -n"),
        "shards": [(f"{damaged}/index.json is damaged", "copy it again"), (f"{bare}/tokenizer has no config.json", "")],
        "tokenizer": [(f"{folder} holds ids of ECG tokenizer", "python -m sharding.shard --tokenizer") for folder in (made / "shards", bare)],
        "model": (f"--model {made / 'other'} is an ECG tokenizer", "--output_dir of launchers/pretrain.py"),
        "ds_config": ("'gradient_cliping' is unknown to the trainers, did you mean 'gradient_clipping'?", "correct what it names"),
        "run folder": (f"a run is training in {run}", f"touch {run / 'STOP'}"),
    }
    for check, errors in wanted.items():
        errors = errors if isinstance(errors, list) else [errors]
        found = [finding for finding in of(report, check) if finding["status"] == ERROR]
        assert len(found) == len(errors), (check, found)
        for one, (text, mend) in zip(found, errors):
            assert text in one["text"] and mend in one["mend"], (check, found)
    assert any(finding["status"] == WARNING and finding["mend"] == f"rm {run / 'STOP'}" for finding in of(report, "run folder"))
    assert not any(secret in json.dumps(report) + said for secret in SECRETS)
    shown = table(report)
    assert all(finding["mend"] in shown for finding in report["findings"]) and "10 errors" in shown


def test_mistakes_in_arguments_exit_with_2():
    for words in (["--sards", "S"], ["--timeout", "0"], ["--timeout", "inf"], ["--timeout", "nan"]):
        done = subprocess.run([sys.executable, "-m", "toolkit.doctor", *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr and words[0] in done.stderr


def test_half_a_place_is_a_mistake_and_said_in_one_line():
    code, report, said = doctor(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
    assert code == 2 and not report and "error: WORLD_SIZE is 2 and MASTER_ADDR and MASTER_PORT not set" in said and "Traceback" not in said


def test_a_rank_that_does_not_answer_is_named(tmp_path):
    place = {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_SIZE": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    code, report, _ = doctor("--timeout", 2, **place)
    (found,) = of(report, "ranks")
    assert code == 1 and found["status"] == ERROR and found["text"].startswith("rank 1-2 of 3 did not answer")
    assert "all-reduce" in next(reversed(report["not_checked"]))


def test_a_rank_that_hangs_among_the_others_is_named(tmp_path):
    """This test is rank 1: it answers the roll, and joins no collective."""
    port = free_port()
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in place.items()}}
    command = [sys.executable, "-m", "toolkit.doctor", "--json", "--timeout", "20"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        store = dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=120), wait_for_workers=False)
        said = {"host": "elsewhere", "gpu": None, "device": "cpu", "versions": software.versions() | {"torch": "1.0"}}
        ranks.tell(store, "local/1", {"facts": said, "findings": [asdict(warning("disk", "of rank 1", "none"))]})
        report = json.loads(process.communicate(timeout=200)[0])
    assert process.returncode == 1
    (found,) = of(report, "all-reduce")
    assert found["status"] == ERROR and "rank 1 (elsewhere) stands still" in found["text"]
    assert [(finding["text"], finding["ranks"]) for finding in of(report, "disk") if finding["text"] == "of rank 1"] == [("of rank 1", [1])]
    assert any("torch is 1.0, on rank 0 " in finding["text"] and finding["status"] == ERROR for finding in of(report, "ranks"))
