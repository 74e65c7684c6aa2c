"""The log of a run that is killed and resumed, as TensorBoard's own readers see it."""

import json
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from toolkit.errors import UserError
from toolkit.shown import Shown
from toolkit.training.log import RunLog, printed

SIZES = {kind: 0 for kind in ("scalars", "images", "histograms", "tensors")}  # 0: all of them, not a sample


def board(folder) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=SIZES).Reload()


def look(step: int) -> Shown:
    counts = np.bincount([3, 3, 7, 7, 7, step % 10], minlength=10)
    return Shown({"samples": f"text of {step}"}, {"ECG": np.full((4, 6, 3), step, np.uint8)}, {"codes": counts})


def run(folder, first, last, until):
    """Steps up to `until` with a line each and a validation every fourth, and no more: the log is not closed, as after SIGKILL."""
    log = RunLog(folder, first, last, "x")
    for step in range(first + 1, until + 1):
        log.line(step, {"loss": float(step), "grad_norm": None})
        if step % 4 == 0:
            log.line(step, {"eval_loss": step / 2})
            log.show(step, look(step))
    return log


def steps(events) -> list[int]:
    return [event.step for event in events]


def test_a_killed_and_resumed_run_has_one_curve_of_everything(tmp_path):
    run(tmp_path, 0, 20, until=14)
    assert steps(board(tmp_path).Scalars("loss")) == list(range(1, 15))  # nothing waits in memory for a flush
    with open(next((tmp_path / "tensorboard").iterdir()), "ab") as f:
        f.write(b"\x99\0\0")  # half an event
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 15')
    run(tmp_path, 10, 20, until=13)  # its checkpoint was at 10
    log = run(tmp_path, 10, 20, until=20)
    log.close()
    seen = board(tmp_path)
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [(n, n) for n in range(1, 21)]
    assert steps(seen.Scalars("eval_loss")) == steps(seen.Images("ECG")) == steps(seen.Histograms("codes")) == [4, 8, 12, 16, 20]
    texts = seen.Tensors("samples/text_summary")
    assert [event.tensor_proto.string_val[0].decode() for event in texts] == [f"text of {n}" for n in (4, 8, 12, 16, 20)]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert lines[0] == {"step": 1, "loss": 1.0, "grad_norm": None}


def test_the_end_of_a_run_that_was_cut_off_is_not_logged_twice(tmp_path):
    run(tmp_path, 0, 8, until=8).hparams({"seed": 1}, {"eval_loss": 4.0})
    log = RunLog(tmp_path, 8, 8, "x")  # the checkpoint of the last step is there, train_results.json is not
    log.line(8, {"eval_loss": 4.0})
    log.show(8, look(8))
    log.hparams({"seed": 1}, {"eval_loss": 4.0})
    log.close()
    seen = board(tmp_path)
    assert steps(seen.Scalars("eval_loss")) == steps(seen.Images("ECG")) == steps(seen.Tensors("samples/text_summary")) == [4, 8]
    assert steps(seen.Scalars("final/eval_loss")) == [8]
    assert (tmp_path / "log.jsonl").read_text().count("eval_loss") == 2


def test_an_image_and_a_histogram_are_what_was_given(tmp_path):
    log = run(tmp_path, 0, 4, until=4)
    log.close()
    seen = board(tmp_path)
    image, codes = seen.Images("ECG")[0], seen.Histograms("codes")[0].histogram_value
    assert (image.width, image.height) == (6, 4)
    values = [3, 3, 7, 7, 7, 4]
    assert (codes.num, codes.sum, codes.sum_squares) == (6, sum(values), sum(v * v for v in values))
    assert dict(zip(codes.bucket_limit, codes.bucket))[7.5] == 3 and (codes.min, codes.max) == (2.5, 7.5)


def test_arguments_and_results_are_in_the_run_itself(tmp_path):
    log = run(tmp_path, 0, 4, until=4)
    log.hparams({"seed": 42, "lr": 1e-3, "backbone": "tiny", "compile": True, "profile": None, "levels": [6, 6]}, {"eval_loss": 2.5, "identity": {}})
    log.close()
    assert len([p for p in (tmp_path / "tensorboard").rglob("*") if p.is_dir()]) == 0  # no second run
    seen = board(tmp_path)
    start = HParamsPluginData.FromString(seen.SummaryMetadata("_hparams_/session_start_info").plugin_data.content).session_start_info
    found = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert found == {"seed": 42, "lr": 1e-3, "backbone": "tiny", "compile": "True", "levels": "[6, 6]"}
    experiment = HParamsPluginData.FromString(seen.SummaryMetadata("_hparams_/experiment").plugin_data.content).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["final/eval_loss"]
    assert [event.value for event in seen.Scalars("final/eval_loss")] == [2.5]


def test_the_printed_line_says_its_units_in_the_order_given():
    values = {
        "loss": 4.1234, "grad_norm": 0.4123, "learning_rate": 1e-3, "memory_gb": 1.23, "ecgs_per_second": 35.12, "tokens_per_second": 11050.4,
        "tflops": 1.912, "mfu": 0.1234, "data_wait": 0.001, "skew": 1.034, "seconds_left": 8103.2, "step_seconds": 1.6,
    }  # fmt: skip
    assert printed(120, 5000, values) == (
        "step 120/5000 | loss 4.123 | grad_norm 0.412 | lr 1.0e-03 | mem 1.2 GB | 35.1 ECG/s | 11,050 tokens/s | 1.91 TFLOPS | MFU 12.3 % | "
        "data wait 0.1 % | skew 1.03 | 2:15:03 left"
    )
    assert printed(3, 9, {"eval_loss": 2.0, "grad_norm": None}) == "step 3/9 | eval_loss 2"


def test_what_is_not_finite_is_null_and_still_printed(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 2, "x")
    log.line(1, {"loss": None, "grad_norm": float("inf"), "learning_rate": 1e-3})
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 1e-3}
    assert board(tmp_path).Tags()["scalars"] == ["learning_rate"]
    assert "step 1/2 | grad_norm inf | lr 1.0e-03" in capsys.readouterr().out


@contextmanager
def no_file_above(size: int):
    """The kernel refuses to let a file grow beyond `size` bytes, as it does where a quota or a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["line", "show", "start"])
def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, what):
    log = run(tmp_path, 0, 9, until=6)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    writes = {
        "line": lambda: log.line(7, {"loss": 1.0}),
        "show": lambda: log.show(7, Shown(images={"noise": noise})),
        "start": lambda: RunLog(tmp_path, 5, 9, "x"),
    }
    size = (tmp_path / "log.jsonl").stat().st_size
    with pytest.raises(UserError, match=r"--output_dir: cannot write .*: File too large"), no_file_above(20 if what == "start" else size + 5):
        writes[what]()
    log = RunLog(tmp_path, 5, 9, "x")  # there is room again
    log.line(6, {"loss": 60.0})
    log.close()
    assert [event.value for event in board(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 60]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]) == {"step": 6, "loss": 60.0}
