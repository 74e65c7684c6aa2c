"""What a run shows: log.jsonl, TensorBoard and the progress bar, all on rank 0 alone."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from toolkit.files import write_text


class RunLog:
    """One line in log.jsonl, the same keys in TensorBoard, and a bar. After a resume both curves go on without a second branch."""

    def __init__(self, folder: Path, first_step: int, last_step: int, description: str):
        self.path = folder / "log.jsonl"
        if self.path.exists():  # drop what a killed run logged beyond its last checkpoint: those steps come again
            lines = [line for line in self.path.read_text().splitlines() if _step(line) is not None and _step(line) <= first_step]
            write_text(self.path, "".join(line + "\n" for line in lines))
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(total=last_step, initial=first_step, desc=description, unit="step", dynamic_ncols=True, disable=None)  # no bar in a log file

    def line(self, step: int, values: dict) -> None:
        """Log numbers at a step; values that are None (a gradient norm that DeepSpeed does not compute) go to log.jsonl alone."""
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self.tensorboard.add_scalar(name, value, step)
        shown = " | ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        tqdm.write(f"step {step} | {shown}")

    def text(self, step: int, samples: str) -> None:
        """Samples of generated text, to TensorBoard."""
        self.tensorboard.add_text("samples", samples, step)

    def close(self) -> None:
        self.bar.close()
        self.tensorboard.close()


def _step(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the half line of a killed run
        return None
