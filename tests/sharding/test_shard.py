"""The engine: bytes depend on data and configuration alone, whatever the workers, ranks, crashes and disks."""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from sharding import archive, engine, prepare, shard
from sharding.manifest import read_manifest
from tests.sharding.pool_work import work
from tests.sharding.test_prepare import record, table
from tests.sharding.test_prepare import signal as random_walk
from toolkit.ecg.quality import read_checked
from toolkit.errors import UserError
from toolkit.shards.reader import Shards, read_index
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

REPO = Path(__file__).parents[2]
RECORDS = 30


@pytest.fixture(scope="module", autouse=True)
def threads():
    """One worker encodes in this process, with one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with root (30 records, folds 1 to 10), tokenizer, manifest, and shards of four ECGs made by one worker of one rank."""
    out = tmp_path_factory.mktemp("made")
    rows = [record(out / "root", i, random_walk(seed=i)) | {"strat_fold": 1 + i % 10, "report": f"Überleitung ✓ {i}", "site": i} for i in range(1, RECORDS + 1)]
    table(out / "root", rows)
    torch.manual_seed(0)
    ECGTokenizer(TokenizerConfig()).save_pretrained(out / "tokenizer")
    prepare.main(["ptbxl", "--root", str(out / "root"), "--out", str(out / "manifest"), "--workers", "1"])
    shard.main(arguments(out, out / "shards"))
    return out


def arguments(made, out, *more, size=4, workers=1):
    words = ["--manifest", made / "manifest", "--tokenizer", made / "tokenizer", "--out", out, "--shard_size", size, "--workers", workers, *more]
    return [str(word) for word in words]


def sha256(folder):
    """Of every file; of index.json without the way from there to the manifest, which differs between folders."""
    content = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    if "index.json" in content:
        content["index.json"] = re.sub(rb'"manifest": "[^"]*"', b"", content["index.json"])
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def test_every_ecg_is_encoded_once_in_its_split(made):
    frame, tokenizer = read_manifest(made / "manifest").set_index("key"), ECGTokenizer.from_pretrained(made / "tokenizer")
    seen = []
    for split, count in (("train", 24), ("valid", 3), ("test", 3)):
        shards = Shards.open(made / "shards", split)
        assert len(shards) == count
        for i in range(count):
            key, meta = shards.key(i), shards.meta(i)
            row = frame.loc[key]
            ecg = read_checked(row["path"])[0]
            (scale,) = meta.pop("gains")
            np.testing.assert_allclose(scale, ecg.astype(np.float64).std(1), rtol=5e-4)  # four significant digits
            assert meta == {name: row[name] for name in shard.META} and meta["split"] == split and "✓" in meta["report"]
            assert meta["site"] == str(int(key[-5:])) and meta["labels"] == ["NORM", "SR"]
            np.testing.assert_array_equal(shards.ids(i)[0], tokenizer.encode(ecg))
            seen.append(key)
    assert sorted(seen) == sorted(frame.index) and len(seen) == RECORDS
    assert [s["samples"] for s in read_index(made / "shards")["splits"]["train"]["shards"]] == [4] * 6
    assert not any("7700" in path.read_bytes().decode("latin1") for path in (made / "shards").rglob("*.tar"))  # patient numbers are 770000 + i


def test_workers_do_not_change_a_byte(made, tmp_path, capsys):
    shard.main(arguments(made, tmp_path / "s", workers=2))
    assert sha256(tmp_path / "s") == sha256(made / "shards")
    capsys.readouterr()
    shard.main(arguments(made, tmp_path / "s", workers=2))
    assert "complete already: 30 ECGs" in capsys.readouterr().out


def test_ranks_do_not_change_a_byte(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "s"
    for rank in (2, 0):
        shard.main(arguments(made, out, "--rank", rank, "--world_size", 3))
        assert "still with other ranks" in capsys.readouterr().out and not (out / "index.json").exists()
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    shard.main(arguments(made, out))
    assert "rank" not in capsys.readouterr().out and sha256(out) == sha256(made / "shards")
    for name in ("SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name)
    shard.main(arguments(made, out))  # another number of ranks finds the same shards complete
    assert "complete already" in capsys.readouterr().out


def test_ranks_share_the_manifest_and_the_archive_waits_for_it(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "PART", 8)
    common = ["--root", str(made / "root"), "--workers", "1", "--world_size", "2"]
    prepare.main(["ptbxl", *common, "--out", str(tmp_path / "d/manifest"), "--rank", "1"])
    assert not (tmp_path / "d/manifest/prepare.json").exists()
    monkeypatch.setattr(archive, "SILENCE", 0.1)
    words = ["ptbxl", *common, "--out", str(tmp_path / "d"), "--tokenizer", str(made / "tokenizer"), "--shard_size", "4"]
    archive.main([*words, "--rank", "0"])
    frame, same = read_manifest(tmp_path / "d/manifest"), read_manifest(made / "manifest")
    assert frame.equals(same)
    archive.main([*words, "--rank", "1"])
    assert {k: v for k, v in sha256(tmp_path / "d/shards").items() if k.endswith(".tar")} == {
        k: v for k, v in sha256(made / "shards").items() if k.endswith(".tar")
    }
    (tmp_path / "d/manifest/prepare.json").unlink()
    (tmp_path / "d/manifest/parts/records-000001.json").unlink()
    archive.main([*words, "--rank", "0"])  # rank 1 never comes
    assert read_manifest(tmp_path / "d/manifest").equals(same) and "rank 0 does what is left" in capsys.readouterr().out


def test_killed_at_random_moments(made, tmp_path):
    """Twenty SIGKILLs of shard and some of prepare: what is visible in between is whole, and the end has the same bytes."""
    command = [sys.executable, "tests/sharding/killed_runs.py", made / "root", made / "tokenizer", tmp_path / "out", "20"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(list(map(str, command)), cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result, reference = json.loads(done.stdout), sha256(made / "shards")
    assert len(result["seen"]) == result["killed"]["shard"] >= 20 and result["killed"]["prepare"] >= 2
    assert all(reference[name] == digest for seen in result["seen"] for name, digest in seen.items())
    assert len({len(seen) for seen in result["seen"]}) > 3  # the moments were different ones
    end = sha256(tmp_path / "out/shards")
    assert {k: v for k, v in end.items() if k != "index.json"} == {k: v for k, v in reference.items() if k != "index.json"}
    assert read_index(tmp_path / "out/shards")["splits"] == read_index(made / "shards")["splits"]
    assert (tmp_path / "out/manifest/manifest.parquet").read_bytes() == (made / "manifest/manifest.parquet").read_bytes()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_workers_end_with_a_killed_parent_and_a_rerun_goes_on(made, tmp_path):
    out, command = tmp_path / "s", [sys.executable, "-m", "sharding.shard"]
    process = subprocess.Popen([*command, *arguments(made, out, workers=2)], cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(out.glob("parts/*.tar.json")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and workers and not (out / "index.json").exists()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if (out / f"parts/{path.name}.json").exists()}
    shard.main(arguments(made, out))
    assert sha256(out) == sha256(made / "shards")
    assert before and all(path.stat().st_mtime_ns == t for path, t in before.items())  # what was complete was not made again


def test_a_damaged_index_is_written_again(made, tmp_path):
    shard.main(arguments(made, tmp_path / "s"))
    (tmp_path / "s/index.json").write_text("{")
    shard.main(arguments(made, tmp_path / "s"))
    assert sha256(tmp_path / "s") == sha256(made / "shards")


def test_two_runs_at_once_do_not_disturb_each_other(made, tmp_path):
    """The second of two runs of the same rank is told, and the first goes on."""
    out = tmp_path / "s"
    with engine.claim(out, {}, shard.FILES, argparse.Namespace(rank=0, world_size=1, overwrite=False)):
        with pytest.raises(UserError, match="--out .*: this command is at work there already"):
            shard.main(arguments(made, out))
    assert [path.name for path in out.iterdir()] == ["parts"]


def test_a_download_that_goes_on_is_looked_at_again(made, tmp_path, capsys):
    root = tmp_path / "root"
    table(root, [record(root, i, random_walk(seed=i)) for i in range(1, 6)])
    absent = root / "records500/00000/00004_hr.dat"
    data = absent.read_bytes()
    absent.unlink()
    words = ["ptbxl", "--root", str(root), "--out", str(tmp_path / "m"), "--workers", "1"]
    for _ in range(2):  # again in vain
        prepare.main(words)
        said = capsys.readouterr().out
        assert "1 records are in the table and not in --root" in said and len(read_manifest(tmp_path / "m")) == 4
    absent.write_bytes(data)
    prepare.main(words)
    assert len(read_manifest(tmp_path / "m")) == 5 and "not in --root" not in capsys.readouterr().out
    prepare.main(words)
    assert "is complete: 5 ECGs" in capsys.readouterr().out


def test_a_fault_of_the_machine_stops_and_leaves_no_mark(made, tmp_path):
    """An outage must not become a defect of the data: nothing is quarantined for it."""
    root = tmp_path / "root"
    table(root, [record(root, i, random_walk(seed=i)) for i in range(1, 4)])
    file = root / "records500/00000/00002_hr.dat"
    data = file.read_bytes()
    file.unlink()
    file.symlink_to(file)  # ELOOP stands for EIO, ESTALE, ...
    words = ["ptbxl", "--root", str(root), "--out", str(tmp_path / "m"), "--workers", "1"]
    with pytest.raises(SystemExit, match="2"):
        prepare.main(words)
    file.unlink()
    file.write_bytes(data)
    prepare.main(words)
    assert len(read_manifest(tmp_path / "m")) == 3


def test_shards_do_not_depend_on_where_the_records_lie(made, tmp_path):
    shutil.copytree(made / "root", tmp_path / "moved")
    prepare.main(["ptbxl", "--root", str(tmp_path / "moved"), "--out", str(tmp_path / "m"), "--workers", "1"])
    words = ["--manifest", tmp_path / "m", "--tokenizer", made / "tokenizer", "--out", tmp_path / "s", "--shard_size", 4, "--workers", 1]
    shard.main(list(map(str, words)))
    assert Shards.open(tmp_path / "s", "train").digest == Shards.open(made / "shards", "train").digest
    before = sha256(tmp_path / "s")
    words[1] = made / "manifest"  # the same content: goes on, and is complete
    shard.main(list(map(str, words)))
    assert sha256(tmp_path / "s") == before


def test_a_deleted_or_shortened_shard_is_made_again(made, tmp_path, capsys):
    shard.main(arguments(made, tmp_path / "s"))
    (tmp_path / "s/train-000002.tar").unlink()
    tar = tmp_path / "s/valid-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    capsys.readouterr()
    shard.main(arguments(made, tmp_path / "s"))
    assert "7 ECGs in 2 shards" in capsys.readouterr().out and sha256(tmp_path / "s") == sha256(made / "shards")


def test_records_that_went_bad_since_prepare_are_quarantined(made, tmp_path):
    root = tmp_path / "root"
    rows = [record(root, i, random_walk(seed=i)) | {"strat_fold": 9 if i == 5 else 1} for i in range(1, 6)]
    table(root, rows)
    prepare.main(["ptbxl", "--root", str(root), "--out", str(tmp_path / "m"), "--workers", "1"])
    for i in (2, 5):
        path = root / f"records500/00000/{i:05d}_hr.dat"
        path.write_bytes(path.read_bytes()[:1000])
    words = ["--manifest", tmp_path / "m", "--tokenizer", made / "tokenizer", "--out", tmp_path / "s", "--shard_size", 2, "--workers", 1]
    with pytest.raises(UserError, match="ptbxl_00002 passed the check of `prepare` and does not now .*--on_bad_record skip"):
        shard.main(list(map(str, words)))
    assert not list((tmp_path / "s").glob("*.tar"))
    shard.main([*map(str, words), "--on_bad_record", "skip"])
    index = read_index(tmp_path / "s")
    assert (index["encoded"], index["quarantined"]) == (3, 2)
    assert [s["samples"] for s in index["splits"]["train"]["shards"]] == [1, 2] and index["splits"]["valid"]["shards"] == []
    lines = [json.loads(line) for line in (tmp_path / "s/quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [("ptbxl_00002", "unreadable"), ("ptbxl_00005", "unreadable")]
    assert str(tmp_path) not in (tmp_path / "s/quarantine.jsonl").read_text()
    assert not (tmp_path / "s/valid-000000.tar").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 192 KiB, and how to make it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_what_was_complete_stays(made, small_disk, capsys):
    out = small_disk / "s"
    with pytest.raises(UserError, match="--out .* cannot be written: No space left on device; mend that and run the same command again"):
        shard.main(arguments(made, out))
    tars = sha256(out)
    assert tars and tars == {name: sha256(made / "shards")[name] for name in tars} and not list(out.glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    shard.main(arguments(made, out))
    assert sha256(out) == sha256(made / "shards")


def test_a_read_only_folder_is_named(made, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="--out .* cannot be written: Read-only file system"):
        shard.main(arguments(made, small_disk / "s"))
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["ptbxl", "--root", str(made / "root"), "--out", str(small_disk / "m")])


def test_mistakes_name_the_argument(made, tmp_path):
    def message(*more, out=made / "shards", **changes):
        with pytest.raises(UserError) as caught:
            shard.main(arguments(made, out, *more, **changes))
        return str(caught.value)

    assert "made with another shard_size, 4 and not 5" in message(size=5)
    assert "--rank 3: must be 0 to 2" in message("--rank", 3, "--world_size", 3)
    assert "--workers" in message(workers=0)
    assert "--overwrite" in message("--overwrite", "--rank", 0, "--world_size", 2)
    assert "--device tpu" in message("--device", "tpu")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds thesis.txt, which this program did not write" in message(out=tmp_path)
    assert "holds thesis.txt" in message("--overwrite", out=tmp_path) and (tmp_path / "thesis.txt").exists()
    assert sha256(made / "shards")  # still there


@pytest.mark.parametrize("workers", [1, 2])
def test_ordered_map_is_map(workers):
    taken = []
    items = (taken.append(i) or i for i in range(50))
    results = engine.ordered_map(work, items, workers)
    assert next(results) == 0 and len(taken) <= 3 * workers  # only a few ahead
    assert list(results) == [2 * i for i in range(1, 50)]
    with pytest.raises(UserError, match="said by a worker"):
        list(engine.ordered_map(work, [1, "fail", 2], workers))


def test_a_killed_worker_is_named():
    with pytest.raises(UserError, match="--workers: a worker process was killed"):
        list(engine.ordered_map(work, [1, "kill", 2], 2))


def test_encoding_in_this_process_gives_the_same_ids(made):
    """What runs where there is a GPU: workers read, this process encodes. Here with the tokenizer on the CPU."""
    frame = read_manifest(made / "manifest")
    work = list(shard.chunks([frame], "drop"))
    tokenizer = ECGTokenizer.from_pretrained(made / "tokenizer")
    shard.start_encoder(str(made / "tokenizer"))
    here, there = (list(results) for results in (shard.encoded_here(map(shard.read, work), tokenizer), map(shard.read_and_encode, work)))
    assert len(here) == len(there) == 1 and set(here[0][3]) == {"read", "wait", "encode"}
    np.testing.assert_array_equal(here[0][0], there[0][0])
    assert here[0][0].shape == (RECORDS, 313) and here[0][1] == there[0][1] and np.shape(here[0][1]) == (RECORDS, 12)


def array(task: int, first: int, last: int, step: int, count: int) -> dict[str, str]:
    """What SLURM sets in a job of an array."""
    numbers = {"ID": task, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
    return {"SLURM_JOB_ID": "7", **{f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, (1, 3)),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script outside srun does all the work
        (array(2, 0, 7, 1, 8), (2, 8)),
        (array(9, 1, 13, 4, 4), (2, 4)),  # --array=1-13:4
        (array(3, 3, 3, 1, 1), (0, 1)),  # --array=3, resubmitted alone
        ({**array(2, 0, 7, 1, 8), "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "3"}, (7, 24)),
        ({**array(2, 0, 7, 1, 8), "SLURM_PROCID": "0", "SLURM_NTASKS": "9", "RANK": "4", "WORLD_SIZE": "5"}, (2, 8)),
    ],
)
def test_ranks_come_from_the_environment(monkeypatch, environment, expected):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    args = parser.parse_args([])
    assert (args.rank, args.world_size) == expected
