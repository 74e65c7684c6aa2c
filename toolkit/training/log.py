"""What a run shows: log.jsonl, TensorBoard and the progress bar, all on rank 0 alone."""

import contextlib
import json
import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary
from tqdm import tqdm

from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.shown import Shown
from toolkit.training import stragglers
from toolkit.training.events import EventFile

PRINTED = {  # of numbers with another name: name and value
    "loss": lambda v: f"loss {v:.4g}",
    "grad_norm": lambda v: f"grad_norm {v:.3g}",
    "learning_rate": lambda v: f"lr {v:.1e}",
    "memory_gb": lambda v: f"mem {v:.1f} GB",
    "ecgs_per_second": lambda v: f"{v:.1f} ECG/s",
    "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
    "tflops": lambda v: f"{v:.3g} TFLOPS",
    "mfu": lambda v: f"MFU {100 * v:.1f} %",
    "data_wait": lambda v: f"data wait {100 * v:.1f} %",
    "skew": lambda v: f"skew {v:.2f}",
    "seconds_left": lambda v: f"{timedelta(seconds=round(v))} left",
    "step_seconds": None,  # in the log alone
}

# of the tab Custom Scalars: a chart of all ranks' curves together, for each of their numbers
LAYOUT = {"ranks": {name: ["Multiline", [f"ranks/{name}/.*"]] for name in stragglers.NAMES}}


class RunLog:
    """One line in log.jsonl, the same keys in TensorBoard, and a bar. After a resume both curves go on without a second branch.

    Raises UserError naming --output_dir, here and in all methods, where the disk does not take it.
    """

    def __init__(self, folder: Path, first_step: int, last_step: int, description: str):
        self.path, self.first_step, self.last_step, self.step = folder / "log.jsonl", first_step, last_step, first_step
        self._known: set[str] = set()
        with _writing(folder):
            if self.path.exists():  # drop what a killed run logged beyond its last checkpoint: those steps come again
                lines = [line for line in self.path.read_text().splitlines() if _step(line) is not None and _step(line) <= first_step]
                self._known.update(*[json.loads(line) for line in lines if _step(line) == first_step])
                write_text(self.path, "".join(line + "\n" for line in lines))
            self.events = EventFile(folder / "tensorboard", first_step)
            self.events.add(summary.custom_scalars(LAYOUT), first_step)
        self.bar = tqdm(total=last_step, initial=first_step, desc=description, unit="step", dynamic_ncols=True, disable=None)  # no bar in a log file

    def line(self, step: int, values: dict[str, float | None]) -> None:
        """Log numbers at a step, in the order given.

        None (a gradient norm that DeepSpeed does not compute) and what is not finite are null in log.jsonl, which is JSON, and not in TensorBoard.
        What was logged at the step of the checkpoint that the run goes on from is not logged again.
        """
        self.step = step
        numbers = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        if step > self.first_step or not values.keys() <= self._known:
            with _writing(self.path), open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **numbers}) + "\n")
        self._add(step, [summary.scalar(name, value) for name, value in numbers.items() if value is not None])
        tqdm.write(printed(step, self.last_step, values))

    def ranks(self, step: int, values: dict[str, float]) -> None:
        """Numbers of single ranks, to TensorBoard alone."""
        self._add(step, [summary.scalar(name, value) for name, value in values.items()])

    def show(self, step: int, shown: Shown) -> None:
        """Texts, images and histograms, to TensorBoard."""
        texts = [summary.text(name, text) for name, text in shown.texts.items()]
        images = [summary.image(name, image, dataformats="HWC") for name, image in shown.images.items()]
        self._add(step, texts + images + [histogram(name, counts) for name, counts in shown.histograms.items()])

    def hparams(self, arguments: dict, metrics: dict) -> None:
        """At the end of a run: its arguments and final numbers (as final/NAME) for TensorBoard's HParams."""
        final = {f"final/{name}": float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        plain = {
            name: value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
            for name, value in arguments.items()
            if value is not None
        }
        self._add(self.step, [*summary.hparams(plain, final), *[summary.scalar(name, value) for name, value in final.items()]])

    def close(self) -> None:
        self.bar.close()
        with _writing(self.events.path):
            self.events.close()

    def _add(self, step: int, summaries: list[Summary]) -> None:
        with _writing(self.events.path):
            for one in summaries:
                self.events.add(one, step)
            self.events.flush()


def printed(step: int, last_step: int, values: dict[str, float | None]) -> str:
    """The line that people read."""
    parts = [f"step {step}/{last_step}"]
    for name, value in values.items():
        how = PRINTED.get(name, lambda v, name=name: f"{name} {v:.4g}")
        if value is not None and how:
            parts.append(how(value))
    return " | ".join(parts)


def histogram(name: str, counts: np.ndarray) -> Summary:
    """A TensorBoard histogram from counts [n] of the values 0 to n - 1, with a bucket each."""
    values, n = np.arange(len(counts)), counts.sum()
    used = np.flatnonzero(counts) if n else values[:1]
    moments = [float((counts * values**power).sum()) for power in (1, 2)]
    return summary.histogram_raw(name, used[0] - 0.5, used[-1] + 0.5, int(n), *moments, (values + 0.5).tolist(), counts.tolist())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output_dir: cannot write {path}: {error.strerror}; mend that, then the same command goes on from the last checkpoint") from error


def _step(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the half line of a killed run
        return None
