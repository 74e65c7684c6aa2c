"""Checkpoints: `checkpoint-N/` with DeepSpeed's state, and a pointer file `latest` that moves only when a checkpoint is complete."""

import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist

from toolkit.errors import UserError
from toolkit.files import write_text

TAG = "state"  # DeepSpeed's folder within checkpoint-N
STATE = "trainer_state.json"


def save(engine, folder: Path, state: dict, keep: int) -> None:
    """Collective. Write checkpoint-{state['step']}, move the pointer, delete all but the newest `keep`. Frozen weights are left out."""
    path = folder / f"checkpoint-{state['step']}"
    if engine.global_rank == 0 and path.exists():
        shutil.rmtree(path)  # the unfinished one of a killed run
    dist.barrier()
    engine.save_checkpoint(str(path), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    dist.barrier()
    if engine.global_rank == 0:
        write_text(path / STATE, json.dumps(state, indent=2))
        os.sync()  # the pointer must not reach the disk before what it points to
        write_text(folder / "latest", path.name)
        steps = _steps(folder)
        older = [step for step in steps if step <= state["step"]]
        for step in set(steps) - set(older[-keep:]):  # also those beyond this step, which a killed run left unfinished
            shutil.rmtree(folder / f"checkpoint-{step}")
    dist.barrier()


def newest(folder: Path) -> dict | None:
    """The trainer state of the checkpoint that the pointer names, or None. Raises UserError if the pointer leads nowhere."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    path = folder / pointer.read_text().strip() / STATE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"--output_dir: {pointer} points to {path.parent.name}, which is damaged; name an older one in it, or use a new folder") from None


def load(engine, folder: Path, state: dict) -> None:
    """Collective. Put model and optimizer back to what `state` says; the ranks and the ZeRO stage must be those that saved it."""
    path = folder / f"checkpoint-{state['step']}"
    loaded, _ = engine.load_checkpoint(str(path), tag=TAG, load_module_strict=False)  # frozen weights are not in it
    if loaded is None:
        raise UserError(f"--output_dir: {path} does not load; write the name of an older checkpoint into {folder / 'latest'}")


def _steps(folder: Path) -> list[int]:
    return sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)))
