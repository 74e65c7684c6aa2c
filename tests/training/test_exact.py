"""The same run however it is cut, killed, stopped or resumed: real DeepSpeed on 1, 2 and 4 gloo ranks."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.faults import being_written
from tests.training.conftest import losses

ROWS = 8  # a step
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="session")
def arguments(corpus, exact_configs):
    """arguments(out, world, stage, **more) -> argv of a pretraining run with 8 rows a step, reports included, so that ranks have different targets."""

    def make(out, world=2, stage=2, steps=20, backbone="backbone", **more):
        given = {
            "deepspeed": exact_configs[stage], "backbone": corpus / backbone, "shards": corpus / "shards", "output_dir": out, "max_steps": steps,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": ROWS // 2 // world, "seq_len": 500, "precision": "fp32", "logging_steps": 1,
            "save_steps": 1000, "learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 4, "report_targets": "yes", **more,
        }  # fmt: skip
        return [word for name, value in given.items() for word in (f"--{name}", value)]

    return make


@pytest.fixture(scope="session")
def whole(fork, arguments, tmp_path_factory):
    """whole(stage, world): folder of an uninterrupted run of 20 steps."""
    done = {}

    def get(stage, world):
        if (stage, world) not in done:
            out = tmp_path_factory.mktemp(f"zero{stage}-{world}")
            run = fork(world, arguments(out / "run", world, stage), out / "log")
            assert run.wait() == [0] * world, run.text()[-4000:]
            done[stage, world] = out / "run"
        return done[stage, world]

    return get


def same_weights(one, other, tolerance):
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_do_not_depend_on_ranks_accumulation_or_zero_stage(whole, stage, world):
    reference, other = whole(0, 1), whole(stage, world)
    expected, found = losses(reference), losses(other)
    assert found.keys() == expected.keys() == set(range(1, 21))
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5
    assert expected[20] < 0.95 * expected[1]
    same_weights(reference, other, 1e-5)


def kill_at_random(run, moment: float, folder, writing: bool) -> None:
    """SIGKILL to all ranks after `moment` seconds; with `writing` as soon as a checkpoint is being written after that."""
    left = being_written(folder)
    time.sleep(moment)
    until = time.time() + 20
    while writing and time.time() < until and not being_written(folder) - left and not (folder / "train_results.json").exists():
        time.sleep(0.0005)
    for pid in run.pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize(("stage", "least"), [(2, 20), (3, 4)])
def test_a_run_killed_twenty_times_is_the_run_that_was_not(fork, arguments, tmp_path, stage, least):
    more = dict(stage=stage, steps=40, save_steps=2, eval_steps=15)
    straight, killed, draw = tmp_path / "straight", tmp_path / "killed", random.Random(0)
    run, started = fork(2, arguments(straight, **more), tmp_path / "straight.log"), time.time()
    assert run.wait() == [0, 0], run.text()[-4000:]
    length, kills, written = time.time() - started, 0, 0
    while kills < least:
        run = fork(2, arguments(killed, **more), tmp_path / f"killed-{kills}.log")
        before = being_written(killed)
        kill_at_random(run, draw.uniform(0.3, 0.7) * length, killed, writing=kills % 2 == 0)
        codes = run.wait()
        if codes == [0, 0]:  # it came to its end before
            shutil.rmtree(killed)
            continue
        assert -signal.SIGKILL in codes, run.text()[-4000:]
        kills += 1
        written += bool(being_written(killed) - before)
    run = fork(2, arguments(killed, **more), tmp_path / "last.log")
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert written >= least // 6  # of the kills hit a checkpoint that was being written
    assert losses(killed) == losses(straight)
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    events = EventAccumulator(str(killed / "tensorboard"))
    events.Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == list(losses(straight).items())


LORA = {"train": "lora+norms+embeddings", "objective": "windows", "report_targets": "no", "seq_len": 700}


@pytest.mark.parametrize(
    ("stage", "worlds", "more", "tolerance"),
    [
        (0, (1,), {}, 1e-5), (1, (4,), {}, 1e-5), (2, (1, 4), {}, 1e-5), (3, (1, 4), {}, 1e-5),
        (1, (1,), {"precision": "bf16"}, 5e-4), (3, (1,), LORA, 1e-4),
    ],
    ids=["0", "1", "2", "3", "1 bf16", "3 lora"],
)  # fmt: skip
def test_another_number_of_ranks_goes_on_with_the_same_run(fork, arguments, whole, tmp_path, stage, worlds, more, tolerance):
    half, straight = tmp_path / "half", tmp_path / "straight"
    if more:
        assert fork(2, arguments(straight, 2, stage, **more), tmp_path / "log-2").wait() == [0, 0], (tmp_path / "log-2").read_text()[-4000:]
    else:
        straight = whole(stage, 2)
    run = fork(2, arguments(half, 2, stage, save_steps=10, **more), tmp_path / "log", before=[STOP_AFTER_10])
    assert run.wait() == [85, 85], run.text()[-4000:]
    for world in worlds:
        out = tmp_path / f"on+{world} (ranks)"
        shutil.copytree(half, out)
        run = fork(world, arguments(out, 2, stage, **more), tmp_path / f"log-{world}")  # the same command
        assert run.wait() == [0] * world, run.text()[-4000:]
        assert f"going on with {ROWS} rows a step: 2 per rank and micro-batch, {4 // world} micro-batches, {world} ranks" in run.text()
        expected, found = losses(straight), losses(out)
        assert found.keys() == expected.keys()
        assert max(abs(found[step] - expected[step]) for step in expected) < tolerance
        if not more:
            same_weights(straight, out, tolerance)


# what the tests plant in a rank before it starts
STOP_AFTER_10 = """
import toolkit.training.loop as loop
save = loop._save
def stop_after(engine, args, folder, state, *more):
    if state["step"] == 10:
        (folder / "STOP").touch()
    return save(engine, args, folder, state, *more)
loop._save = stop_after
"""
FULL_DISK_AT_10 = """
import resource
import toolkit.training.checkpoint as checkpoint
save = checkpoint.save
def full(engine, folder, state, *more):
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    if state["step"] == 10:  # no file may be larger than this, as on a disk with so much left
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, free[1]))
    try:
        return save(engine, folder, state, *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
checkpoint.save = full
"""
NAN = """
import os
import toolkit.lm.model as model
forward, calls = model.PackedLM.forward, [0]
def broken(self, row, logits=False):
    calls[0] += self.training
    loss = forward(self, row, logits)
    return loss * float("nan") if self.training and os.environ["RANK"] == "1" and calls[0] in CALLS else loss
model.PackedLM.forward = broken
"""


def test_asked_to_stop_it_saves_and_leaves_with_85(fork, arguments, whole, tmp_path):
    out, way = tmp_path / "run", iter([signal.SIGTERM, signal.SIGUSR1, "STOP"])
    for _ in range(3):
        run, how = fork(2, arguments(out), tmp_path / "log"), next(way)
        before = len(losses(out)) if (out / "log.jsonl").exists() else 0
        until = time.time() + 60
        while time.time() < until and (not (out / "log.jsonl").exists() or len(losses(out)) < before + 3):
            time.sleep(0.01)
        if how == "STOP":
            (out / "STOP").touch()
        else:
            os.kill(run.pids[1], how)  # one rank alone
        step = len(losses(out))
        assert run.wait() == [85, 85], run.text()[-4000:]
        saved = json.loads((out / (out / "latest").read_text() / "trainer_state.json").read_text())["step"]
        assert saved == len(losses(out)) and saved - step <= 2  # the step under way, and one that began before the signal came
        assert not (out / "STOP").exists() and not (out / "train_results.json").exists()
    assert fork(2, arguments(out), tmp_path / "log").wait() == [0, 0]
    assert losses(out) == losses(whole(2, 2))
    assert (out / "model.safetensors").read_bytes() == (whole(2, 2) / "model.safetensors").read_bytes()


def test_checkpoints_that_are_kept_and_a_damaged_one(fork, arguments, tmp_path, whole):
    out = tmp_path / "run"
    more = dict(save_steps=2, save_total_limit=2, keep_every=8)
    assert fork(2, arguments(out, **more), tmp_path / "log").wait() == [0, 0]
    assert sorted(int(path.name[11:]) for path in out.glob("checkpoint-*")) == [8, 16, 18, 20]
    (out / "train_results.json").unlink()  # as if killed before the end
    newest = sorted((out / "checkpoint-20" / "state").glob("*optim_states.pt"))[1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    (out / "checkpoint-18" / "state" / "mp_rank_00_model_states.pt").unlink()
    run = fork(2, arguments(out, **more), tmp_path / "again")
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert "checkpoint-20 is damaged" in run.text() and "checkpoint-18 is damaged" in run.text() and "going back to checkpoint-16" in run.text()
    assert losses(out) == losses(whole(2, 2))
    assert sorted(path.name for path in out.glob("damaged-*")) == ["damaged-18", "damaged-20"]
    (out / "train_results.json").unlink()
    (out / "latest").unlink()  # lost, not a reason to begin anew
    assert fork(2, arguments(out, **more), tmp_path / "lost").wait() == [0, 0] and "1/20" not in (tmp_path / "lost").read_text()
    (out / "train_results.json").unlink()
    for path in out.glob("checkpoint-*/trainer_state.json"):
        path.write_text("{")
    run = fork(2, arguments(out, **more), tmp_path / "none")
    assert run.wait() == [2, 2] and "no checkpoint is left" in run.text()


PRUNE_FAILS = """
import toolkit.training.checkpoint as checkpoint
def fail(*given):
    raise OSError(39, "Directory not empty")
checkpoint._prune = fail
"""


def test_a_checkpoint_stays_where_the_old_ones_cannot_be_deleted(fork, arguments, tmp_path):
    run = fork(2, arguments(tmp_path / "run", steps=4, save_steps=2, save_total_limit=1), tmp_path / "log", before=[PRUNE_FAILS])
    assert run.wait() == [0, 0] and "Directory not empty" in run.text()
    assert (tmp_path / "run" / "latest").read_text() == "checkpoint-4" and (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").is_file()


def test_two_runs_do_not_train_in_one_folder(fork, arguments, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        run = fork(2, arguments(tmp_path / "run"), tmp_path / "log")
        assert run.wait() == [2, 2] and "another run is training in" in run.text() and "Traceback" not in run.text()


def test_a_backbone_that_became_another_is_noticed(fork, arguments, corpus, tmp_path):
    shutil.copytree(corpus / "backbone", tmp_path / "backbone")
    command = [str(tmp_path / "backbone") if word == corpus / "backbone" else word for word in arguments(tmp_path / "run", save_steps=10)]
    assert fork(2, command, tmp_path / "log", before=[STOP_AFTER_10]).wait() == [85, 85]
    weights = tmp_path / "backbone" / "model.safetensors"
    save_file({name: 3 * weight for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    run = fork(2, command, tmp_path / "again")
    assert run.wait() == [2, 2] and "holds a run with backbone digest" in run.text()


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run(fork, arguments, tmp_path, whole):
    out = tmp_path / "run"
    run = fork(2, arguments(out, save_steps=5, save_total_limit=9), tmp_path / "log", before=[FULL_DISK_AT_10])
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert "checkpoint-10 could not be written" in run.text() and "the newest checkpoint is that of step 5" in run.text()
    assert sorted(int(path.name[11:]) for path in out.glob("checkpoint-*")) == [5, 15, 20]
    assert losses(out) == losses(whole(2, 2))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(fork, arguments, tmp_path, precision, tolerance):
    seen = []
    for stage in STAGES:
        out, alone = tmp_path / f"zero{stage}", stage == 0 and precision == "bf16"  # which takes no accumulation
        split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1} if alone else {}
        plant = NAN.replace("CALLS", "{3}" if alone else "{5, 6}")  # the micro-batches of step 3
        run = fork(2, arguments(out, 2, stage, steps=6, precision=precision, **split), tmp_path / f"log{stage}", before=[plant])
        assert run.wait() == [0, 0], run.text()[-4000:]
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [1]
        assert losses(out)[3] is None
        seen.append([loss for step, loss in losses(out).items() if step != 3])
        warning = next(line for line in run.text().splitlines() if "step 3 is not finite" in line)
        assert "no weight was changed" in warning and warning.count("train_") == 4
        assert json.loads((out / "train_results.json").read_text())["skipped"] == 1
    # neither the weights nor the moments of Adam saw it: our own rule at stage 0 and DeepSpeed's at the others give the same steps after it
    assert all(max(abs(a - b) for a, b in zip(seen[0], other)) < tolerance for other in seen[1:])


def test_too_many_such_steps_end_the_run(fork, arguments, tmp_path):
    run = fork(2, arguments(tmp_path / "run", max_skipped=3), tmp_path / "log", before=[NAN.replace("CALLS", "range(5, 99)")])
    assert run.wait() == [2, 2]
    assert "3 steps in a row were not finite, the last one 5" in run.text() and "train_0" in run.text()
