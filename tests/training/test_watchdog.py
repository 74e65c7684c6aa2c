"""Runs that hang for real, in forked ranks: who is named, what is left behind, and that going on from there changes nothing."""

import os
import re
import signal
import time

import pytest

from tests.training.conftest import ROOT, losses
from toolkit.errors import UserError
from toolkit.training import heartbeat
from toolkit.training.arguments import TrainingArguments
from toolkit.training.verdict import suspects, verdict

STEPS = 8
AT_STEP = """
import os, signal, time
import toolkit.training.loop as loop
take, calls = loop.take_step, [0]
def fault():
    FAULT
def faulty(*given):
    calls[0] += 1
    if os.environ["RANK"] == "RANK_NO" and calls[0] == STEP_NO:
        fault()
    return take(*given)
loop.take_step = faulty
"""
SLOW = """
import os, time
import toolkit.lm.model as model
forward = model.PackedLM.forward
def slow(self, row, logits=False):
    if self.training and os.environ["RANK"] == "1":
        time.sleep(SECONDS)
    return forward(self, row, logits)
model.PackedLM.forward = slow
"""
ASLEEP_IN_DATA = """
import os, time
import toolkit.tasks.data as data
batch, calls = data.ForecastData.batch, [0]
def asleep_over_its_data(self, samples):
    calls[0] += 1
    while os.environ["RANK"] == "1" and calls[0] > 8:
        time.sleep(1)
    return batch(self, samples)
data.ForecastData.batch = asleep_over_its_data
"""
AT_END = """
import os, signal, time
import toolkit.training.loop as loop
def fault(*given):
    FAULT
loop.RunLog.hparams = fault
"""
SLOW_EXPORT = """
import os, time
import toolkit.training.loop as loop
finish = loop._finish
def slow(args, job, *given):
    export = job.export
    def exported(module, folder):
        export(module, folder)
        for _ in range(12 * (os.environ["RANK"] == "0")):
            (folder / "part").write_bytes(bytes(1_200_000))
            time.sleep(0.5)
    job.export = exported
    return finish(args, job, *given)
loop._finish = slow
"""
PATIENCE = """
import toolkit.training.loop as loop
from torch.distributed import distributed_c10d as c10d
import torch
build, forwards = loop.build_engine, loop.heartbeat.mark_forwards
def days():
    return sorted({group._get_backend(torch.device("cpu")).options._timeout.days for group in c10d._world.pg_map})
def told(*given):
    print("before the engine", days(), flush=True)
    return build(*given)
def said(model):
    print("after it", days(), flush=True)
    forwards(model)
loop.build_engine, loop.heartbeat.mark_forwards = told, said
"""
READS = """
import os
import toolkit.training.heartbeat as heartbeat
read = heartbeat.read
def told(folder, rank):
    print(os.environ["RANK"], "reads", rank, flush=True)
    return read(folder, rank)
heartbeat.read = told
"""


def at_step(rank: int, step: int, fault: str) -> str:
    """A hook: this rank does this in the `step`-th step of its process (from 1), before it computes."""
    return AT_STEP.replace("RANK_NO", str(rank)).replace("STEP_NO", str(step)).replace("FAULT", fault)


@pytest.fixture
def arguments(corpus, tmp_path):
    def make(**more):
        given = {
            "deepspeed": ROOT / "ds_configs" / "zero1.json", "backbone": corpus / "backbone", "shards": corpus / "shards", "output_dir": tmp_path / "run",
            "max_steps": STEPS, "precision": "fp32", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "seq_len": 400, "logging_steps": 1,
            "save_steps": 2, "learning_rate": 1e-3, "max_eval_samples": 4, **more,
        }  # fmt: skip
        return [word for flag, value in given.items() for word in (f"--{flag}", value)]

    return make


@pytest.fixture(scope="module")
def undisturbed(fork, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    given = {
        "deepspeed": ROOT / "ds_configs" / "zero1.json", "backbone": corpus / "backbone", "shards": corpus / "shards", "output_dir": out,
        "max_steps": STEPS, "precision": "fp32", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "seq_len": 400, "logging_steps": 1,
        "save_steps": 100, "learning_rate": 1e-3, "max_eval_samples": 4, "hang_timeout": 0,
    }  # fmt: skip
    run = fork(2, [word for flag, value in given.items() for word in (f"--{flag}", value)], out.parent / "log")
    assert run.wait() == [0, 0], run.text()[-4000:]
    return out


def until(there, seconds: float = 60):
    """What `there()` gives, once it gives something; None after `seconds`."""
    end = time.time() + seconds
    while not (found := there()) and time.time() < end:
        time.sleep(0.05)
    return found


def same(out, undisturbed) -> bool:
    return losses(out) == losses(undisturbed) and (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_stopped_rank_is_named_and_the_run_goes_on(fork, arguments, undisturbed, tmp_path):
    out = tmp_path / "run"
    (out / "hang").mkdir(parents=True)
    for name in ("rank-1.txt", "rank-7.txt"):
        (out / "hang" / name).write_text("of an earlier hang")
    run = fork(2, arguments(hang_timeout=3), tmp_path / "log", before=[at_step(1, 6, "time.sleep(1.5); os.kill(os.getpid(), signal.SIGSTOP)")])
    assert until((out / "hang" / "verdict.txt").exists)
    os.kill(run.pids[1], signal.SIGKILL)  # a launcher would
    assert run.wait() == [86, -signal.SIGKILL], run.text()[-4000:]
    said = (out / "hang" / "verdict.txt").read_text()
    assert said in run.text() and run.text().count("HANG: for 3 s") == 1
    assert "rank 1 holds the others up: it is dead, stopped" in said and f"(pid {run.pids[1]}): its process is stopped (state T" in said
    assert "rank 0: step 5, forward/backward, waits in collective" in said and "none of rank 1" in said
    assert "last heard of in step 5, data" in said and "in fault" in said
    stacks = (out / "hang" / "rank-0.txt").read_text()
    assert "Thread 0x" in stacks and "in take_step" in stacks and "distributed_c10d.py" in stacks
    assert sorted(path.name for path in (out / "hang").iterdir()) == ["rank-0.txt", "verdict.txt"]
    assert (out / "latest").read_text() == "checkpoint-4"
    again = fork(2, arguments(hang_timeout=3), tmp_path / "again")
    assert again.wait() == [0, 0], again.text()[-4000:]
    assert same(out, undisturbed)


def test_a_rank_that_waits_for_its_data_for_ever_is_named_and_shows_where(fork, arguments, tmp_path):
    run, out = fork(2, arguments(hang_timeout=3), tmp_path / "log", before=[ASLEEP_IN_DATA]), tmp_path / "run"
    assert run.wait() == [86, 86], run.text()[-4000:]
    assert run.text().count("HANG: for 3 s") == 1 and "rank 1 holds the others up: it has not come to collective" in run.text()
    assert "data, last collective" in run.text() and "in prefetch" in run.text()
    assert "in asleep_over_its_data" in (out / "hang" / "rank-1.txt").read_text()
    assert "in asleep_over_its_data" not in (out / "hang" / "rank-0.txt").read_text()


def test_a_rank_stuck_in_native_code_is_found_by_the_others(fork, arguments, tmp_path):
    # backtracking without end holds the interpreter lock: no thread of that process runs any more
    run = fork(2, arguments(hang_timeout=3), tmp_path / "log", before=[at_step(0, 3, "__import__('re').match('(a+)+b', 'a' * 60)")])
    assert until((tmp_path / "run" / "hang" / "verdict.txt").exists)
    os.kill(run.pids[0], signal.SIGKILL)
    assert run.wait() == [-signal.SIGKILL, 86], run.text()[-4000:]
    assert "rank 0 holds the others up" in run.text() and "is stuck in native code" in run.text()


def test_a_run_of_one_rank_is_watched_too(fork, arguments, tmp_path):
    run = fork(1, arguments(hang_timeout=2), tmp_path / "log", before=[at_step(0, 3, "time.sleep(1000)")])
    assert run.wait() == [86], run.text()[-4000:]
    assert "rank 0 is the only one" in run.text() and "in fault" in run.text()
    assert "in fault" in (tmp_path / "run" / "hang" / "rank-0.txt").read_text()


def test_a_rank_that_is_slow_but_moves_is_none(fork, arguments, tmp_path):
    # at ZeRO stage 1 rank 0 waits at the end of the step, for three micro-batches of 2 s
    run = fork(2, arguments(hang_timeout=4, max_steps=3, gradient_accumulation_steps=3), tmp_path / "log", before=[SLOW.replace("SECONDS", "2")])
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert not (tmp_path / "run" / "hang").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_a_job_that_was_suspended_as_a_whole_goes_on(fork, arguments, tmp_path, world):
    # many short sleeps: one long one would be over as soon as the process wakes
    slow = at_step(0, 4, "[time.sleep(0.01) for _ in range(150)]")
    run, out = fork(world, arguments(hang_timeout=3, max_steps=5, save_steps=100), tmp_path / "log", before=[slow]), tmp_path / "run"
    assert until(lambda: (beat := heartbeat.read(out, 0)) and beat["step"] == 3)
    for what, seconds in ((signal.SIGSTOP, 6), (signal.SIGCONT, 0)):
        for pid in run.pids:
            os.kill(pid, what)
        time.sleep(seconds)
    assert run.wait() == [0] * world, run.text()[-4000:]
    assert sorted(losses(out)) == [1, 2, 3, 4, 5]


def test_heartbeats_say_where_each_rank_is_and_0_switches_the_watchdog_off(fork, arguments, undisturbed, tmp_path):
    out, go = tmp_path / "run", tmp_path / "go"
    (out / "heartbeats").mkdir(parents=True)
    for name in ("rank-7.json", ".rank-7.json.partial", ".rank-1.json.partial"):  # of a run on eight ranks that was killed
        (out / "heartbeats" / name).write_text("{}")
    wait = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    run = fork(2, arguments(hang_timeout=0), tmp_path / "log", before=[PATIENCE, at_step(1, 4, wait)])
    read = lambda rank: heartbeat.read(out, rank)
    first = until(lambda: (found := read(0)) and found["quiet_seconds"] > 4 and found)
    second = until(lambda: (found := read(1)) and found["quiet_seconds"] > 4 and found)
    go.touch()
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert (first["rank"], first["pid"], first["step"], first["collective"]["inside"]) == (0, run.pids[0], 3, True)
    assert (second["rank"], second["pid"], second["step"], second["collective"]["inside"]) == (1, run.pids[1], 3, False)
    assert first["collective"]["number"] == second["collective"]["number"] + 1 and first["collective"]["bytes"] > 0
    assert second["at"].endswith("in fault") and "engine.py" in first["at"] and second["phase"] == "data"
    assert not (out / "heartbeats").exists() and not (out / "hang").exists()
    assert run.text().count("before the engine [30]") == run.text().count("after it [30]") == 2
    assert same(out, undisturbed)


def test_a_rank_that_hangs_at_the_end_is_named(fork, arguments, tmp_path):
    for stop, codes in (("time.sleep(1000)", [86, 86]), ("time.sleep(1.5); os.kill(os.getpid(), signal.SIGSTOP)", [-signal.SIGKILL, 86])):
        out = tmp_path / f"run-{len(stop)}"
        run = fork(2, arguments(hang_timeout=3, max_steps=2, output_dir=out), out.parent / f"{out.name}.log", before=[AT_END.replace("FAULT", stop)])
        assert until((out / "hang" / "verdict.txt").exists)
        if codes[0] < 0:
            os.kill(run.pids[0], signal.SIGKILL)  # a launcher would
        assert run.wait() == codes, run.text()[-4000:]
        said = (out / "hang" / "verdict.txt").read_text()
        assert run.text().count("HANG: for 3 s") == 1 and "rank 0 holds the others up" in said
        assert "in fault" in said and "rank 1: step 2, end, waits in" in said
        assert (out / "hang" / "rank-1.txt").exists()


def test_a_model_that_is_long_in_the_writing_is_no_hang(fork, arguments, undisturbed, tmp_path):
    """6 s of export, 1.2 MB every 0.5 s, without a mark or a collective. Until those were counted every start of such a run ended with 86."""
    run = fork(2, arguments(hang_timeout=3), tmp_path / "log", before=[SLOW_EXPORT])
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert "HANG" not in run.text() and same(tmp_path / "run", undisturbed)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"]  # safetensors by itself: 0o600


def test_a_rank_that_fails_at_the_end_is_no_traceback_of_the_others(fork, arguments, tmp_path):
    fault = "raise loop.UserError('--output_dir: the disk is full')"
    run = fork(2, arguments(max_steps=2), tmp_path / "log", before=[AT_END.replace("FAULT", fault)])
    assert run.wait() == [2, 2], run.text()[-4000:]
    assert "error: --output_dir: the disk is full" in run.text() and "error: another rank failed" in run.text() and "Traceback" not in run.text()


def test_where_the_lowest_ranks_are_dead_the_next_one_calls_and_only_one_does(fork, arguments, tmp_path):
    stopped = at_step(0, 3, "os.kill(os.getpid(), signal.SIGSTOP)")
    run = fork(4, arguments(hang_timeout=4), tmp_path / "log", before=[stopped, stopped.replace('"0"', '"1"'), READS])
    assert until((tmp_path / "run" / "hang" / "verdict.txt").exists)
    for pid in run.pids[:2]:
        os.kill(pid, signal.SIGKILL)
    assert run.wait() == [-signal.SIGKILL] * 2 + [86] * 2, run.text()[-4000:]
    assert run.text().count("HANG: for 4 s") == 1 and "ranks 0-1 hold the others up" in run.text() and "none of ranks 0-1" in run.text()
    assert {(reader, read) for reader, read in re.findall(r"(\d) reads (\d)", run.text()) if reader == "3"} == {("3", "0"), ("3", "1"), ("3", "2")}
    assert ("2", "3") in re.findall(r"(\d) reads (\d)", run.text())
    assert sorted(path.name for path in (tmp_path / "run" / "hang").iterdir()) == ["rank-2.txt", "rank-3.txt", "verdict.txt"]


def test_a_verdict_that_fails_does_not_keep_the_run_from_ending(fork, arguments, tmp_path):
    broken = "import toolkit.training.watchdog as watchdog\nwatchdog.verdict = lambda *given: {}[0]"
    run = fork(2, arguments(hang_timeout=2), tmp_path / "log", before=[ASLEEP_IN_DATA, broken])
    assert run.wait() == [86, 86], run.text()[-4000:]
    assert "HANG: for 2 s" in run.text() and "KeyError: 0" in run.text()


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_a_timeout_that_is_none_is_refused(value):
    with pytest.raises(UserError, match="--hang_timeout must be "):
        TrainingArguments(output_dir="x", deepspeed="y", hang_timeout=float(value))


LONG = """
import toolkit.training.loop as loop
from toolkit.training import heartbeat
answers, loss = instruct.exact_match, instruct.mean_loss
def watched(function):
    def call(*given):
        before, found = heartbeat.moved(), function(*given)
        print(function.__name__, "moved", heartbeat.moved() - before, heartbeat.NOW.phase, flush=True)
        return found
    return call
instruct.exact_match, instruct.mean_loss = watched(answers), watched(loss)
"""


def test_each_forward_of_a_validation_is_progress(fork, task_corpus, tmp_path):
    given = {
        "deepspeed": ROOT / "ds_configs" / "zero1.json", "backbone": task_corpus / "known", "shards": task_corpus / "tasks", "output_dir": tmp_path / "run",
        "max_steps": 1, "precision": "fp32", "per_device_train_batch_size": 1, "max_eval_answers": 2,
    }  # fmt: skip
    words = [word for flag, value in given.items() for word in (f"--{flag}", value)]
    run = fork(1, words, tmp_path / "log", before=[LONG], launcher="instruct")
    assert run.wait() == [0], run.text()[-4000:]
    moved = dict(re.findall(r"(\w+) moved (\d+) validation", run.text()))
    assert int(moved["mean_loss"]) >= 6 and int(moved["exact_match"]) > 40  # a forward for each of 6 ECGs; one for each token of up to 48


COUNT = """
import torch, torch.distributed as dist
import deepspeed
from datetime import timedelta
from toolkit.training import collectives, distributed, heartbeat, watchdog
def main():
    ranks = distributed.start()
    collectives.record()
    collectives.record()
    last, seen = collectives.LAST, []
    def count(name, call, size):
        before = last.number, last.seconds
        call()
        assert (last.name, last.bytes, last.inside) == (name, size, False), (name, size, last)
        assert last.number == before[0] + 1 and last.seconds > before[1], name
    four, eight, both = torch.ones(4), torch.zeros(8), [torch.zeros(4), torch.zeros(4)]
    of_ds = deepspeed.comm
    for module in (dist, of_ds):
        four = torch.full((4,), ranks.rank + 1.0)
        count("all_reduce", lambda: module.all_reduce(four), 16)
        assert four.tolist() == [3] * 4
        count("broadcast", lambda: module.broadcast(four, 0), 16)
        count("all_gather", lambda: module.all_gather(both, four), 32)
        assert both[0].tolist() == both[1].tolist() == [3] * 4
        count("all_gather_into_tensor", lambda: module.all_gather_into_tensor(eight, four), 32)
        assert eight.tolist() == [3] * 8
        count("reduce_scatter_tensor", lambda: module.reduce_scatter_tensor(four, eight), 32)
        assert four.tolist() == [6] * 4
        count("all_to_all_single", lambda: module.all_to_all_single(torch.empty(8), eight), 32)
        count("barrier", lambda: module.barrier(), 0)
        count("all_gather_object", lambda: module.all_gather_object([None, None], {"a": 1}), 0)
        count("broadcast_object_list", lambda: module.broadcast_object_list([1], src=0), 0)
    work = dist.all_reduce(four, async_op=True)
    before, number = last.seconds, last.number
    if ranks.rank == 1:
        import time; time.sleep(0.5)
        late = dist.all_reduce(torch.ones(1), async_op=True)
    else:
        late = dist.all_reduce(torch.ones(1), async_op=True)
    work.wait(); late.wait()
    assert last.number == number + 1 and (ranks.rank == 1 or last.seconds - before > 0.3), last  # rank 0 waited for rank 1
    clone = dist.new_group()
    for timeout, seconds in ((7200, 7800), (60, 3600), (0, 30 * 86400), (1e12, 30 * 86400)):
        watchdog.outlast(timeout)
        for group in (None, clone):
            backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(seconds=seconds), (timeout, backend.options._timeout)
    print("counted", flush=True)
pretrain.main = main
"""


def test_every_collective_is_counted_once_and_gives_what_it_gives(fork, tmp_path):
    run = fork(2, [], tmp_path / "log", before=[COUNT])
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert run.text().count("counted") == 2


def beat(number=5, inside=True, name="all_reduce", size=8, phase="step", **more) -> dict:
    last = {"name": name, "number": number, "bytes": size, "inside": inside, "seconds": 9.0}
    return {"host": "far", "pid": 1, "started": "1", "step": 3, "phase": phase, "collective": last, "at": "a.py:1 in f", **more}


@pytest.mark.parametrize(
    ("beats", "still", "named", "why"),
    [
        ([beat(), beat(), beat(4, False)], set(), [2], "has not come to collective 5"),
        ([beat(5, False), beat(5, False), beat(4, False), beat(4, False)], set(), [2, 3], "has not come to collective 5"),  # NCCL: nobody waits inside
        ([beat(5, False), beat(), beat()], set(), [0], "is not inside of collective 5"),
        ([beat(), beat(), beat(5)], {1}, [1], "dead, stopped"),
        ([beat(), beat(6, False), None], {2}, [2], "dead, stopped"),
        ([beat(), beat(phase="failed: ValueError"), beat()], {1}, [1], "ended with an error"),
        ([beat(4, False, phase="export"), beat(phase="end"), beat(phase="end")], set(), [0], "has not come to collective 5"),
        ([beat(), beat(), None], set(), [2], "dead, stopped"),  # its heartbeat was deleted, or could not be read
        ([beat(), beat(name="broadcast")], set(), [], "different collectives"),
        ([beat(), beat(size=16)], set(), [], "different sizes"),
        ([beat(), beat()], set(), [], "the network"),
        ([beat() | {"collective": None}], set(), [0], "is the only one"),
    ],
)
def test_who_holds_the_others_up(tmp_path, beats, still, named, why):
    beats = dict(enumerate(beats))
    found, said = suspects(beats, still)
    assert found == named and why in said
    text = verdict(beats, still, 30, tmp_path / "hang")
    assert all(f"rank {rank}" in text for rank in named) and "exit code 86; no checkpoint was written yet" in text
    (tmp_path / "latest").touch()
    assert "exit code 86; its newest checkpoint is as it was" in verdict(beats, still, 30, tmp_path / "hang")


def test_many_ranks_are_few_lines(tmp_path):
    beats = {rank: beat() for rank in range(512)} | {7: beat(4, False), 9: beat(4, False), 10: beat(4, False)}
    text = verdict(beats, set(), 30, tmp_path)
    assert "ranks 7, 9-10 hold the others up" in text and "ranks 0-6, 8, 11-511: step 3, step, waits in collective 5" in text
    assert len(text.splitlines()) == 7
