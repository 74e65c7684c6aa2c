"""Early stopping: the best validation so far; its model waits in `best-N/` beside the checkpoints until training ends.

The folder is named by its step, and goes only when a checkpoint knows of a better one: a run that is killed and resumed finds what its
checkpoint speaks of.
"""

import math
import re
import shutil
from pathlib import Path


def better(best: dict | None, metrics: dict, watch: str, step: int) -> dict:
    """{"step", "metrics"}: this validation if its metrics[watch] is below that of `best`, else `best`. What is no number is never better."""

    def score(metrics: dict) -> float:
        return math.inf if math.isnan(metrics[watch]) else metrics[watch]

    return best if best is not None and score(metrics) >= score(best["metrics"]) else {"step": step, "metrics": metrics}


def path_of(folder: Path, best: dict) -> Path:
    return folder / f"best-{best['step']}"


def sweep(folder: Path, best: dict | None) -> None:
    """Delete all models but that of `best` (None: all)."""
    for path in folder.iterdir():
        if re.fullmatch(r"best-\d+", path.name) and (best is None or path != path_of(folder, best)):
            shutil.rmtree(path)


def take(folder: Path, best: dict) -> None:
    """Copy the best model into the run folder."""
    shutil.copytree(path_of(folder, best), folder, dirs_exist_ok=True)
