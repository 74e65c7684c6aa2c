"""Checkpoints: `checkpoint-N/` with DeepSpeed's state, and a pointer file `latest` that moves only when a checkpoint is complete.

trainer_state.json is written last and holds size and CRC-32 of every file, so that a damaged checkpoint is found before it is loaded; the run then goes
on from the one before. A checkpoint of another number of ranks is converted to DeepSpeed's universal format first.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.training.distributed import RANK_VARIABLES, Ranks

TAG = "state"  # DeepSpeed's folder within checkpoint-N
UNIVERSAL = "universal"
STATE = "trainer_state.json"


class Files(TorchCheckpointEngine):
    """DeepSpeed's writer of files, which remembers what this rank wrote, and an error instead of raising it: the other ranks wait in barriers."""

    def __init__(self, config_params=None):
        super().__init__(config_params)
        self.written: dict[Path, list[int]] = {}
        self.error: Exception | None = None

    def save(self, state_dict, path: str):
        try:
            super().save(state_dict, path)
            for name, how in ((path, os.O_RDONLY), (os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)):  # contents, then name
                handle = os.open(name, how)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            self.written[Path(path)] = _fingerprint(Path(path))
        except (OSError, RuntimeError) as error:  # torch's writer says "unexpected pos" as a RuntimeError when the disk is full
            self.error = error


def watch_files(engine) -> None:
    """To be called once, before the first `save`."""
    engine.checkpoint_engine = Files(engine._config)
    engine._copy_recovery_script = lambda path: None  # DeepSpeed copies a script beside each checkpoint; on a full disk that would raise on rank 0 alone
    engine.module_state_dict = lambda **how: _state(engine)


def _state(engine) -> dict[str, torch.Tensor]:
    """The module's part of a checkpoint: buffers, and at ZeRO stage 0 the trained weights. From stage 1 on they are in the optimizer's files already, in
    float32: 3 times their bytes with Adam's moments instead of 4. By itself DeepSpeed keeps a frozen head that is tied, by its second name."""
    left_out = {name for name, p in engine.module.named_parameters(remove_duplicate=False) if engine.zero_optimization() or not p.requires_grad}
    return {name: value for name, value in engine.module.state_dict().items() if name not in left_out}


def save(engine, folder: Path, state: dict, keep: int, keep_every: int = 0) -> str | None:
    """Collective. Write checkpoint-{state['step']}, move the pointer, delete older ones but the newest `keep` and every `keep_every`-th step.

    Frozen weights are left out; of the others there is one copy, from ZeRO stage 1 on the optimizer's in float32. Returns None, or on every rank what went
    wrong: then all older checkpoints are as they were, and `latest` names a whole one.
    """
    path, files = folder / f"checkpoint-{state['step']}", engine.checkpoint_engine
    files.written, files.error = {}, None
    main = engine.global_rank == 0
    if main:
        try:
            if path.exists():
                shutil.rmtree(path)  # the unfinished one of a killed run
            path.mkdir()
        except OSError as error:
            files.error = error
    if not (problem := _first_error(files)):
        engine.save_checkpoint(str(path), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        problem = _first_error(files)
    written = [None] * dist.get_world_size()
    dist.all_gather_object(written, {str(file.relative_to(path)): said for file, said in files.written.items()})
    if main and not problem:
        try:
            known = {name: said for part in written for name, said in part.items()}
            write_text(path / STATE, json.dumps({**state, "files": known}, indent=2))
        except OSError as error:
            files.error = error
    if problem := _first_error(files):
        if main:
            shutil.rmtree(path, ignore_errors=True)
        return problem
    if main:
        try:
            write_text(folder / "latest", path.name)
            _prune(folder, state["step"], keep, keep_every)
        except OSError as error:  # the pointer may have moved: nothing is deleted
            files.error = error
    return _first_error(files)


def _prune(folder: Path, step: int, keep: int, keep_every: int) -> None:
    steps = _steps(folder)
    whole = [s for s in steps if s <= step and (folder / f"checkpoint-{s}" / STATE).is_file()]
    kept = set(whole[-keep:]) | {s for s in whole if keep_every and s % keep_every == 0}
    for s in set(steps) - kept:  # also those beyond this step and unfinished ones, which a killed run left behind
        shutil.rmtree(folder / f"checkpoint-{s}", ignore_errors=True)  # what is left is damaged, and deleted with the next


def newest(folder: Path, ranks: Ranks) -> dict | None:
    """Collective. The trainer state of the newest whole checkpoint, or None where there is none.

    Damaged ones that it passes over are named, and renamed to damaged-N. Raises UserError if all are damaged.
    """
    found: list = [_listed(folder) if ranks.main else None]  # one rank looks: a shared disk may show the ranks different things
    dist.broadcast_object_list(found)
    steps, passed, problems = found[0], [], []
    if steps is None:
        return None
    for step in reversed(steps):
        problem, state = None, {}
        try:
            state = json.loads((folder / f"checkpoint-{step}" / STATE).read_text())
            files = sorted(state["files"].items())
            problem = _damage(folder / f"checkpoint-{step}", files[ranks.rank :: ranks.world])
        except (OSError, ValueError, KeyError, TypeError):
            problem = f"{STATE} is missing or damaged"
        every: list = [None] * ranks.world
        dist.all_gather_object(every, problem)
        if not any(every):
            if passed and ranks.main:
                print(f"WARNING: {'; '.join(problems)}; going back to checkpoint-{step}", flush=True)
                for damaged in passed:
                    shutil.rmtree(folder / f"damaged-{damaged}", ignore_errors=True)
                    (folder / f"checkpoint-{damaged}").rename(folder / f"damaged-{damaged}")
            dist.barrier()
            return state
        passed.append(step)
        problems.append(f"checkpoint-{step} is damaged ({next(filter(None, every))})")
    raise UserError(f"--output_dir: {'; '.join(problems) or 'latest points to nothing'}: no checkpoint is left in {folder}; use a new folder")


def _listed(folder: Path) -> list[int] | None:
    """Steps of the checkpoints that may be whole: what lies beyond the pointer is unfinished. None if there never was one."""
    pointer = folder / "latest"
    if not pointer.is_file():  # lost, if there are whole checkpoints without it
        steps = [s for s in _steps(folder) if (folder / f"checkpoint-{s}" / STATE).is_file()] if folder.is_dir() else []
        return steps or None
    named = re.fullmatch(r"checkpoint-(\d+)", pointer.read_text().strip())
    return [s for s in _steps(folder) if not named or s <= int(named[1])]


def load(engine, folder: Path, state: dict, ranks: Ranks) -> None:
    """Collective. Put model and optimizer back to what `state` says. After `needs_conversion` the engine must have been built with "load_universal"."""
    path, tag = folder / f"checkpoint-{state['step']}", TAG
    converted = engine.load_universal_checkpoint()
    if converted:
        tag = UNIVERSAL
        if ranks.main:
            _convert(path, state["ranks"])
        dist.barrier()
    decays = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(path), tag=tag, load_module_strict=False)  # frozen weights are not in it
    if loaded is None:
        raise UserError(f"--output_dir: {path} does not load; write the name of an older checkpoint into {folder / 'latest'}")
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()  # DeepSpeed loads this rank's part of the float32 weights alone; at stage 3 a rank has no other
    if converted:
        engine._config.load_universal_checkpoint = False
        # at stage 3 DeepSpeed gives all parameters the first group's weight decay, and one and the same counter of steps, which then runs twice as fast
        for group, decay in zip(engine.basic_optimizer.param_groups, decays):
            group["weight_decay"] = decay
        for moments in engine.basic_optimizer.state.values():
            moments["step"] = moments["step"].clone()
        dist.barrier()
        if ranks.main:
            shutil.rmtree(path / UNIVERSAL)


def needs_conversion(state: dict, ranks: Ranks, stage: int) -> bool:
    """Whether a checkpoint of `state` was cut for another number of ranks. ZeRO stage 0 cuts nothing."""
    return stage > 0 and state["step"] > 0 and state["ranks"] != ranks.world


def _convert(path: Path, ranks: int) -> None:
    """checkpoint-N/state -> checkpoint-N/universal, in a process of its own: the converter starts worker processes, which a rank must not fork."""
    out = path / f".{UNIVERSAL}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(path / UNIVERSAL, ignore_errors=True)
    print(f"{path.name} is of {ranks} ranks: converting it to a universal checkpoint", flush=True)
    # relative paths: the converter takes its folders for regular expressions, and `lora+norms` would match nothing
    folders = ["--input_folder", TAG, "--output_folder", out.name]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", *folders]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    done = subprocess.run(command, cwd=path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        shutil.rmtree(out, ignore_errors=True)
        reason = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--output_dir: {path} cannot be converted from {ranks} ranks to another number ({reason}); resume it with {ranks} ranks")
    out.rename(path / UNIVERSAL)


def _first_error(files: Files) -> str | None:
    """Collective. What any rank met, the same on all of them."""
    errors: list = [None] * dist.get_world_size()
    dist.all_gather_object(errors, files.error and str(files.error).splitlines()[0])
    return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), None)


def _damage(path: Path, files: list[tuple[str, list[int]]]) -> str | None:
    for name, said in files:
        try:
            found = _fingerprint(path / name) if (path / name).stat().st_size == said[0] else None
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != said:
            return f"{name} is not what was written"
    return None


def _fingerprint(path: Path) -> list[int]:
    """[bytes, CRC-32]: against disks and truncation, not against people; 1 GB takes about a second."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _steps(folder: Path) -> list[int]:
    return sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)))
