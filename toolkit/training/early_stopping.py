"""Early stopping: the best validation so far; its model waits in `.best-N/` beside the checkpoints until training ends.

The folder is named by its step, and goes only when no checkpoint speaks of it any more: a run that is killed and resumed finds its best model,
also from an older checkpoint.
"""

import contextlib
import json
import math
import re
import shutil
from pathlib import Path

from toolkit.training.checkpoint import STATE


def better(best: dict | None, metrics: dict, watch: str, step: int) -> dict:
    """{"step", "metrics"}: this validation if its metrics[watch] is below that of `best` (of an exact match above; of two equal ones the lower loss
    decides), else `best`. What is no number is never better.
    """

    def score(metrics: dict) -> tuple[float, float]:
        sign, loss = (-1, metrics["eval_loss"]) if watch.endswith("_match") else (1, 0.0)
        value = sign * metrics[watch]
        return math.inf if math.isnan(value) else value, math.inf if math.isnan(loss) else loss

    return best if best is not None and score(metrics) >= score(best["metrics"]) else {"step": step, "metrics": metrics}


def path_of(folder: Path, best: dict) -> Path:
    return folder / f".best-{best['step']}"


def sweep(folder: Path, complete: bool = False) -> None:
    """Delete the models that no checkpoint speaks of; all if the run is complete."""
    known = []
    for state in () if complete else folder.glob(f"checkpoint-*/{STATE}"):
        with contextlib.suppress(OSError, ValueError):  # a damaged one
            known.append(json.loads(state.read_text()).get("best"))
    kept = {path_of(folder, best) for best in known if best}
    for path in folder.iterdir():
        if re.fullmatch(r"\.best-\d+", path.name) and path not in kept:
            shutil.rmtree(path)


def take(folder: Path, best: dict) -> None:
    """Copy the best model into the run folder."""
    shutil.copytree(path_of(folder, best), folder, dirs_exist_ok=True)
