"""What a run goes on from: its results, its newest whole checkpoint, or nothing; and what of it may have changed meanwhile."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock, Timeout

from toolkit.errors import UserError
from toolkit.files import run_folder, sweep, write_text
from toolkit.training import checkpoint, ds_config
from toolkit.training.arguments import TrainingArguments, as_record
from toolkit.training.distributed import Ranks

RESULTS = "train_results.json"  # written last: a run folder that holds it is complete
# what may be another in a resumed run; the number of steps, which follows from some of them, may not
FREE = {
    "output_dir", "deepspeed", "logging_steps", "eval_steps", "max_eval_samples", "save_steps", "save_total_limit", "keep_every", "max_skipped", "profile",
    "hang_timeout", "max_steps", "num_train_epochs", "shard_cache", "shard_cache_gb", "on_bad_shard", "bad_shard_budget",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "kernels", "compile",
    "max_eval_answers",
    "shards", "manifest", "text",  # their digests are in the identity
}  # fmt: skip
LAYOUT = ("round_robin_gradients", "sub_group_size", "zero_hpz_partition_size", "mics_shard_size")  # keys that decide what stands where in a checkpoint


@dataclass
class Run:
    """results: of a complete run, else None. state: where to go on. split: (rows per micro-batch, micro-batches per step). last: the number of steps.
    lock: of the folder, as long as this is alive."""

    folder: Path
    config: dict
    results: dict | None
    state: dict
    split: tuple[int, int]
    last: int
    lock: FileLock | None


def find_run(
    args: TrainingArguments, ranks: Ranks, trainer: str, samples: int, samples_per_row: int, identity: dict, bf16: bool, hidden_size: int | None
) -> Run:
    """Collective. Look at --output_dir, check that it holds this run, and write arguments.json and the resolved ds_config.json to it.

    trainer: its name. samples: in an epoch. identity: digests of what the run is made from. Raises UserError naming what a resumed run has different.
    """
    folder = Path(args.output_dir)
    lock = _lock(folder, ranks)
    results = json.loads((folder / RESULTS).read_text()) if (folder / RESULTS).is_file() else None
    saved = results or checkpoint.newest(folder, ranks)
    if saved and "trainer" not in saved.get("identity", ()):
        raise UserError(f"--output_dir: {folder} holds a run of an older version of the toolkit; name a new folder")
    if saved and saved["identity"]["trainer"] != trainer:
        raise UserError(f"--output_dir: {folder} holds a run of {saved['identity']['trainer']}, not of {trainer}; name a new folder")
    split = batch_split(args, ranks.world, saved["batch"] if saved else None)
    asked = args.per_device_train_batch_size, args.gradient_accumulation_steps
    config = ds_config.resolve(args.deepspeed, args, ranks.world, bf16, hidden_size, None if split == asked else split)
    rows = config["train_batch_size"]
    last = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * samples / (rows * samples_per_row))

    # what a resumed run must share with its checkpoint: all but what only says when to look, and where
    identity = {"trainer": trainer} | {name: value for name, value in as_record(args).items() if name not in FREE} | identity
    if args.early_stopping_patience:  # another validation would judge by another measure, more often or more rarely
        identity |= {"eval_steps": args.eval_steps, "max_eval_samples": args.max_eval_samples}
    zero = config["zero_optimization"]
    identity |= {"steps": last, "bf16": bf16, "ZeRO stage": zero["stage"], **{f"zero_optimization.{key}": zero.get(key) for key in LAYOUT}}
    for name, value in identity.items() if saved else ():
        if saved["identity"].get(name) != value:
            was = saved["identity"].get(name)
            raise UserError(f"--output_dir: {folder} holds a run with {name} {was}, not {value}; resume it with the same, or name a new folder")
    batch = saved["batch"] if saved else {"rows": rows, "asked": list(asked)}
    state = saved or {"step": 0, "samples": 0, "seconds": 0.0, "skipped": 0}
    state |= {"identity": identity, "batch": batch}
    if ranks.main and not results:
        for place in (folder, folder / "tensorboard"):
            sweep(place, "")  # what a kill within a write left
        write_text(folder / "arguments.json", json.dumps(as_record(args), indent=2))
        write_text(folder / "ds_config.json", json.dumps(config, indent=2))
        if split != asked:
            print(f"going on with {rows} rows a step: {split[0]} per rank and micro-batch, {split[1]} micro-batches, {ranks.world} ranks", flush=True)
    return Run(folder, config, results, state, split, last, lock)


def _lock(folder: Path, ranks: Ranks) -> FileLock | None:
    """Collective. Held by rank 0 as long as its process lives. Raises UserError where another run trains in the folder."""
    problem, lock = [None], None
    if ranks.main:
        try:
            lock = FileLock(run_folder(folder) / ".lock")
            lock.acquire(timeout=10)  # a killed run lets go at once, its node's disk perhaps not
        except UserError as error:
            problem = [str(error)]
        except Timeout:
            stop = f"stop it with `touch {folder}/STOP` (a SLURM job with `scancel JOB`, it would be queued again; `squeue --me` shows it)"
            problem = [f"--output_dir: another run is training in {folder}; {stop}, or name another folder"]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    return lock


def batch_split(args: TrainingArguments, world: int, batch: dict | None) -> tuple[int, int]:
    """(rows per micro-batch, micro-batches per step).

    batch: of the run that is resumed. On another number of ranks its rows a step are cut anew, so that the same command goes on with the same steps.
    """
    asked = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch is None or asked[0] * asked[1] * world == batch["rows"]:
        return asked
    if list(asked) != batch["asked"]:
        raise UserError(
            f"--per_device_train_batch_size {asked[0]} x --gradient_accumulation_steps {asked[1]} x {world} ranks are {asked[0] * asked[1] * world} rows a"
            f" step, the run in --output_dir has {batch['rows']}; resume it with the same, or name a new folder"
        )
    rows, left = divmod(batch["rows"], world)
    if left:
        raise UserError(f"--output_dir: its steps have {batch['rows']} rows, which {world} ranks cannot share; use a number of ranks that divides it")
    micro = max(n for n in range(1, min(asked[0], rows) + 1) if rows % n == 0)
    return micro, rows // micro
