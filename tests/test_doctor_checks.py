"""Single checks of the doctor: disks, locks, ports, run folders, and what it concludes from what the ranks measured."""

import fcntl
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from toolkit.doctor import files, links, machine, ranks, software
from toolkit.doctor.disk import check_disk, existing, file_system
from toolkit.doctor.finding import ERROR, OK, WARNING, Finding, checked, of_user_error, report_of, table
from toolkit.doctor.shared_folder import hold, look, said_of_folder
from toolkit.errors import UserError
from toolkit.spans import spans

ROOT = Path(__file__).resolve().parents[1]
DISK = "import sys; from toolkit.doctor.disk import check_disk; print(*check_disk('--output_dir', sys.argv[1], '--output_dir'), sep='\\n')"


def statuses(findings) -> list[str]:
    return [finding.status for finding in findings]


def test_disk_measures_and_leaves_nothing(tmp_path):
    (found,) = check_disk("--output_dir", tmp_path / "not" / "yet", "--output_dir")
    assert "MB/s" in found.text and "GB free" in found.text and not list(tmp_path.iterdir())
    assert existing(tmp_path / "not" / "yet") == tmp_path
    assert file_system("/proc/self") == "proc"


@pytest.mark.parametrize("fault, said", [("size=64k", "is full"), ("size=64k,ro", "cannot be written (Read-only file system)")])
def test_a_disk_that_takes_no_more(tmp_path, fault, said):
    try:  # what the test needs by itself: a doctor that fails is no reason to skip
        subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", tmp_path], check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no mounts here: {(getattr(problem, 'stderr', None) or str(problem)).strip()[-200:]}")
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o "$1" none "$2" && shift && exec "$0" -c "$2" "$1"']
    done = subprocess.run([*mount, sys.executable, fault, tmp_path, DISK], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert f"{tmp_path} (tmpfs) {said}" in done.stdout and "status='error'" in done.stdout and "name another folder: --output_dir" in done.stdout


def test_locks_of_builds(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert statuses(software.check_ops()) == [OK]
    lock = tmp_path / "py311 cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (young,) = software.check_ops()
    assert young.status == WARNING and "wait 5 minutes" in young.mend
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 1000,) * 2)
    with open(lock):  # as a builder has it: torch.utils.file_baton
        (built,) = software.check_ops()
    assert built.status == WARNING and f"by process {os.getpid()}" in built.text
    (stale,) = software.check_ops()
    assert stale.status == ERROR and shlex.split(stale.mend) == ["rm", "-r", str(lock.parent)]
    monkeypatch.setattr(software, "file_system", lambda path: "nfs4")  # its builder may be another node's
    (shared,) = software.check_ops()
    assert shared.status == WARNING and "another node" in shared.text and shared.mend.startswith("pgrep")
    shutil.rmtree(shlex.split(stale.mend)[2])
    assert statuses(software.check_ops()) == [OK]


def test_ports(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        (taken,) = machine.check_ports(0, 2)
        assert taken.status == ERROR and f"process {os.getpid()}" in taken.text
        assert not list(machine.check_ports(1, 2))  # the port is rank 0's, perhaps on another node
        monkeypatch.setattr(machine, "PORT", server.getsockname()[1])
        monkeypatch.delenv("MASTER_PORT")
        (usual,) = machine.check_ports(0, 1)
        assert usual.status == WARNING and int(usual.mend.split()[-1]) != server.getsockname()[1]
    assert statuses(machine.check_ports(0, 1)) == [OK]
    monkeypatch.setenv("MASTER_PORT", "many")
    assert statuses(machine.check_ports(0, 1)) == [ERROR]


def test_names(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert next(machine.check_names(False)).status == ERROR
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert not [finding for finding in machine.check_names(False) if finding.status == ERROR]
    assert "other nodes cannot reach" in next(machine.check_names(True)).text  # one node's 127.0.0.1 is another's own


def test_run_folders(tmp_path):
    def write(step: int, size: int):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.pt").write_bytes(b"x" * size)
        (folder / "trainer_state.json").write_text(json.dumps({"files": {"state.pt": [100, 1]}}))
        (tmp_path / "latest").write_text(folder.name)

    assert "a run starts at step 0" in next(files.check_run_folder(tmp_path)).text
    write(20, 100)
    FileLock(tmp_path / ".lock").acquire().lock.release()  # of a run that has ended
    write(100, 100)
    (found,) = files.check_run_folder(tmp_path)
    assert found.status == OK and "2 whole checkpoints" in found.text and found.text.endswith("checkpoint-100")
    write(120, 99)
    (found,) = files.check_run_folder(tmp_path)
    assert found.status == WARNING and "damaged" in found.text and found.mend.endswith("checkpoint-100")
    for step in (20, 100):
        (tmp_path / f"checkpoint-{step}" / "state.pt").unlink()
    assert statuses(files.check_run_folder(tmp_path)) == [ERROR]
    (tmp_path / "train_results.json").write_text("{}")
    assert "complete" in next(files.check_run_folder(tmp_path)).text


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        (found,) = files.check_run_folder(str(path))
        assert found.status == ERROR and found.text == f"--output_dir {path} cannot be made: {tmp_path / 'file'} is a file"


def test_a_lock_is_told_from_another_doctors_look_at_it(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    with FileLock(run / ".lock"):
        locked, _ = files.check_run_folder(str(run))
    assert locked.status == ERROR and f"touch '{run / 'STOP'}'" in locked.mend
    with open(run / ".lock", "rb") as another:  # the doctor of another node
        fcntl.flock(another, fcntl.LOCK_SH)
        assert statuses(files.check_run_folder(str(run))) == [OK]


def test_a_hang_counts_until_its_stacks_are_removed_or_the_run_is_complete(tmp_path):
    run = tmp_path / "my run"
    (run / "hang").mkdir(parents=True)
    (run / "hang" / "rank-0.txt").touch()
    hung, _ = files.check_run_folder(str(run))
    assert hung.status == WARNING and hung.mend.endswith(f"rm -r '{run / 'hang'}'")
    (run / "train_results.json").write_text("{}")
    assert statuses(files.check_run_folder(str(run))) == [OK]


def test_ds_configs(tmp_path):
    for preset in sorted((ROOT / "ds_configs").glob("*.json")):
        assert statuses(checked("ds_config", files.check_ds_config, str(preset), 4)) == [OK]
    mine = tmp_path / "mine.json"
    for given, status in (
        ({"train_batch_size": 32}, OK),
        ({"train_batch_size": 30}, ERROR),
        ({"train_micro_batch_size_per_gpu": 2}, OK),
        ({"optimizer": {}}, ERROR),
    ):
        mine.write_text(json.dumps({**given, "zero_optimization": {"stage": 1}}))
        assert statuses(checked("ds_config", files.check_ds_config, str(mine), 4)) == [status], given


def test_ranks_that_differ_and_gpus_that_are_shared():
    versions = {"python": "3.11", "torch": "2.13"}
    of = {rank: {"host": f"n{rank // 2}", "gpu": f"u{rank % 2}", "device": "cuda", "versions": versions} for rank in range(4)}
    assert statuses(ranks.compare(of)) == [OK, OK]
    other = of | {3: {**of[3], "gpu": "u0", "versions": {"python": "3.11", "torch": "2.12"}}}
    version, gpu = ranks.compare(other)
    assert version.status == ERROR and version.text == "torch is 2.12, on rank 0 2.13 [rank 3]"
    assert gpu.status == ERROR and gpu.text == "ranks 2-3 have the same GPU of n1"
    (_, uneven) = ranks.compare({rank: of[rank] for rank in range(3)})
    assert uneven.status == WARNING and "n0: 0-1, n1: 2" in uneven.text


def test_slow_ranks_and_pairs():
    hosts = {"a": [0, 1], "b": [2, 3]}

    def said(rate) -> list[Finding]:
        every = [(a, b) for a in range(4) for b in range(a + 1, 4)]
        return list(links.said_of_pairs([{"ranks": list(pair), "latency_s": 1e-5, "gb_s": rate(*pair)} for pair in every], hosts))

    assert statuses(said(lambda a, b: 100 if (a, b) in ((0, 1), (2, 3)) else 10)) == [OK]  # between nodes is another kind
    (slow,) = said(lambda a, b: 100 if b - a == 1 and a != 1 else 1 if 3 in (a, b) else 10)
    assert slow.status == WARNING and slow.text.startswith("rank 3 (b) is slow with all others between nodes: 1 GB/s") and "take b out" in slow.mend
    (pair,) = said(lambda a, b: 100 if b - a == 1 and a != 1 else 1 if (a, b) == (0, 3) else 10)
    assert pair.text.startswith("ranks 0 (a) and 3 (b) between nodes: 1 GB/s")


def test_in_a_ring_a_slow_rank_is_told_from_a_slow_way():
    """32 ranks on four nodes, each looked at with the next."""
    hosts = {f"n{node}": list(range(8 * node, 8 * node + 8)) for node in range(4)}
    ring = links.pairs_of(32)
    assert [sum(rank in pair for pair in ring) for rank in range(32)] == [2] * 32 and len(links.pairs_of(16)) == 120

    def said(slow) -> list[str]:
        rates = {(a, b): (50 if a // 8 == b // 8 else 10) / (10 if slow(a, b) else 1) for a, b in ring}
        return [finding.text.split(":")[0] for finding in links.said_of_pairs([{"ranks": [*p], "latency_s": 1e-5, "gb_s": r} for p, r in rates.items()], hosts)]

    assert said(lambda a, b: False) == ["32 pairs"]
    assert said(lambda a, b: 11 in (a, b)) == ["rank 11 (n1) is slow with all others within a node"]
    assert said(lambda a, b: (a, b) == (12, 13)) == ["ranks 12 (n1) and 13 (n1) within a node"]
    assert said(lambda a, b: (a, b) == (7, 8)) == ["ranks 7 (n0) and 8 (n1) between nodes"]
    assert said(lambda a, b: (a, b) == (31, 0)) == ["ranks 31 (n3) and 0 (n0) between nodes"]


def test_pairs_keep_to_their_share_of_the_time(tmp_path):
    """Two ranks that take 0.2 s a trip: 20 and 4 trips would be 4.8 s."""
    code = """
import sys, time, torch, torch.distributed as dist
from toolkit.doctor import links
from toolkit.training.distributed import Ranks
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
send, trips = dist.send, []
def slow(tensor, other):
    trips.append(tensor.nbytes)
    time.sleep(0.1)
    send(tensor, other)
dist.send = slow
for seconds in (2.0, 0.01, 1e9):
    trips.clear()
    if seconds > 1e6:
        dist.send = lambda tensor, other: (trips.append(tensor.nbytes), send(tensor, other))
    found = links.pairs(Ranks(rank, 2, torch.device("cpu")), seconds)
    print("took", len(found), trips.count(4), trips.count(1 << 22), flush=True)
"""
    start = lambda rank: subprocess.Popen([sys.executable, "-c", code, str(rank), tmp_path / "store"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    both = [start(0), start(1)]
    said = [[list(map(int, line.split()[1:])) for line in process.communicate(timeout=200)[0].splitlines() if line.startswith("took")] for process in both]
    assert [row[0] for row in said[0]] == [1, 1, 1] and [row[0] for row in said[1]] == [0, 0, 0]
    assert [row[1:] for row in said[0]] == [row[1:] for row in said[1]]  # both end with the same trip
    (small, large), least, most = (row[1:] for row in said[0])
    assert 2 <= small <= 5 and 2 <= large <= 4 and least == [2, 2] and most == [20, 4]


def test_clocks_and_sums():
    # the other clock is 5 s ahead; ways of 1 and 3 ms, then one of 1 ms each: the quicker trip counts
    trips = [(100.0, 105.001, 100.004), (200.0, 205.001, 200.002)]
    ahead, within = links.offset(trips)
    assert ahead == pytest.approx(5) and within == pytest.approx(0.001)
    hosts = {"a": [0], "b": [1], "c": [2]}
    for seconds, status in ((0.5, OK), (-2.0, WARNING), (400.0, ERROR)):
        (found,) = ranks.said_of_clocks([{"rank": 1, "ahead_s": 0.1, "within_s": 1e-4}, {"rank": 2, "ahead_s": seconds, "within_s": 1e-4}], hosts)
        assert found.status == status and "rank 2 (c)" in found.text
    assert [links.bus_share(world) for world in (2, 4, 8)] == [1, 1.5, 1.75]
    row = {"bytes": 65536, "bus_gb_s": 1.0, "right": True}
    assert statuses(ranks.said_of_all_reduce([row], "gloo")) == [OK]
    assert statuses(ranks.said_of_all_reduce([row, {**row, "right": False}], "gloo")) == [ERROR]


def test_a_folder_that_nodes_share(tmp_path):
    (tmp_path / "other").mkdir()
    with hold(tmp_path) as name:
        code = f"import json; from pathlib import Path; from toolkit.doctor.shared_folder import look; print(json.dumps(look(Path({str(tmp_path / name)!r}))))"
        seen = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        blind = look(tmp_path / "other" / name)
    assert seen == {"seen": True, "kept_out": True} and not blind["seen"] and not (tmp_path / name).exists()
    assert statuses(said_of_folder(tmp_path, {"b": seen})) == [OK]
    (lost,) = said_of_folder(tmp_path, {"b": seen, "c": blind})
    assert lost.status == ERROR and "another folder on c" in lost.text
    assert statuses(said_of_folder(tmp_path, {"b": {"seen": True, "kept_out": False}})) == [ERROR]


def test_the_report(tmp_path):
    def broken():
        raise RuntimeError("no such thing\nand more")

    (found,) = checked("memory", broken)
    assert found.status == WARNING and found.text == "could not be checked: RuntimeError: no such thing"
    assert of_user_error("disk", UserError("it is full; free some")) == Finding("disk", ERROR, "it is full", "free some")
    assert of_user_error("disk", UserError("name another folder")) == Finding("disk", ERROR, "name another folder", "correct what it names")
    assert spans([5, 0, 1, 2]) == "0-2, 5"
    good, bad = Finding("disk", OK, "fast"), Finding("versions", ERROR, "torch is gone", "pip install torch")
    report = report_of({0: [good], 1: [good, bad]}, {"a": [0, 1]}, {"shards": "no --shards"}, {}, 2)
    assert report["status"] == ERROR and [finding["check"] for finding in report["findings"]] == ["versions", "disk"]
    assert [finding["ranks"] for finding in report["findings"]] == [[1], [0, 1]]
    lines = table(report).splitlines()
    assert "ERROR" in lines[2] and lines[2].endswith("torch is gone [rank 1]") and lines[3].strip() == "-> pip install torch"
    assert lines[4].endswith("fast") and lines[-2:] == ["not checked: shards (no --shards)", "1 error, 0 warnings"]
