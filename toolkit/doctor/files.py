"""What the trainers will be given: shards, tokenizer, model, DeepSpeed configuration, run folder. No patient, record or path of one is ever said."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from types import SimpleNamespace

from toolkit.doctor.finding import Finding, error, of_user_error, ok, warning
from toolkit.errors import UserError
from toolkit.evaluation.cards import tokenizer_of
from toolkit.lm.backbone import STAMP, check_stamp
from toolkit.lm.carried import ecg_tokenizer_of
from toolkit.lm.trained import ADAPTER, backbone_of
from toolkit.shards.reader import Shards, locate
from toolkit.shards.remote import is_url
from toolkit.tokenizer.tokenizer import MODEL_TYPE, ECGTokenizer
from toolkit.training import ds_config, stop
from toolkit.training.checkpoint import STATE
from toolkit.training.distributed import bf16_is_fast
from toolkit.training.resume import RESULTS

NAME_A_MODEL = "name the --output_dir of launchers/pretrain.py or launchers/instruct.py"


def check_shards(folders: list[str]) -> Iterator[Finding]:
    """Index, sizes, one sample a split and the ECG tokenizer of each folder. All sha256 are the work of `sharding.verify`."""
    for folder in folders:
        try:
            index = locate(folder, "--shards")[2]
            opened = {split: Shards.open(folder, split) for split, entry in index["splits"].items() if entry["samples"]}
            if not is_url(folder):  # of a URL it would download a shard
                for shards in opened.values():
                    shards.ids(0), shards.meta(0)
                    if "tokenizer_files" in index:
                        tokenizer_of(shards)
        except UserError as problem:
            yield of_user_error("shards", problem)
            continue
        size = sum(shard["bytes"] for entry in index["splits"].values() for shard in entry["shards"])
        splits = ", ".join(f"{split} {len(shards):,} in {len(index['splits'][split]['shards'])}" for split, shards in opened.items())
        said = f"{folder}: {index['kind']}, samples in shards: {splits or 'none'}; {size / 1e6:,.1f} MB"
        if missing := [split for split in ("train", "valid") if split not in opened]:
            yield warning("shards", f"{said}; no samples in {' and '.join(missing)}, which the trainers need", "make them from more records")
        else:
            yield ok("shards", f"{said}; their sha256: python -m sharding.verify shards {quote(folder)}")


def check_tokenizer(folders: list[str], tokenizer: str | None) -> Iterator[Finding]:
    """Whether all shards hold the ids of one ECG tokenizer, and of the one that is named."""
    made = {folder: _made_by(folder) for folder in folders}
    known = {folder: fingerprint for folder, fingerprint in made.items() if fingerprint}
    if len(set(known.values())) > 1:
        each = ", ".join(f"{folder} of {fingerprint}" for folder, fingerprint in known.items())
        yield error(
            "tokenizer", f"--shards are of {len(set(known.values()))} ECG tokenizers: {each}", "make all with one: python -m sharding.shard --tokenizer T"
        )
    elif known and not tokenizer:
        yield ok("tokenizer", f"the shards hold ids of ECG tokenizer {next(iter(known.values()))}")
    if not tokenizer:
        return
    own = ECGTokenizer.from_pretrained(tokenizer)
    for folder, fingerprint in known.items():
        if fingerprint != own.fingerprint():
            yield error(
                "tokenizer", f"{folder} holds ids of ECG tokenizer {fingerprint}, --tokenizer {tokenizer} is {own.fingerprint()}",
                f"name that one, or make the shards anew: python -m sharding.shard --tokenizer {quote(tokenizer)} --overwrite",
            )  # fmt: skip
    if all(fingerprint == own.fingerprint() for fingerprint in known.values()):
        which = "made the ids of all --shards" if known else "loads"
        yield ok("tokenizer", f"{tokenizer} ({own.config.arch}, {own.config.codes:,} codes, {own.fingerprint()}) {which}")


def _made_by(folder: str) -> str | None:
    """The fingerprint that a folder of shards names; None if its index cannot be read, which `check_shards` says."""
    try:
        return locate(folder, "--shards")[2].get("tokenizer")
    except UserError:
        return None


def check_model(model: str, folders: list[str], tokenizer: str | None) -> Iterator[Finding]:
    """Whether a model folder is whole, knows ECG tokens, and those of the shards."""
    path, bad = Path(model), False
    if not any((path / name).is_file() for name in (ADAPTER, "config.json")):
        yield error("model", f"--model {model} holds neither an adapter nor a model", NAME_A_MODEL)
        return
    if not (path / ADAPTER).is_file() and json.loads((path / "config.json").read_text()).get("model_type") == MODEL_TYPE:
        yield error("model", f"--model {model} is an ECG tokenizer", NAME_A_MODEL)
        return
    if not (path / STAMP).is_file():
        yield warning(
            "model", f"{model} has no {STAMP}, so it knows no ECG tokens: it can be --backbone of pretrain.py alone", "pretrain it first: launchers/pretrain.py"
        )
        return
    of = f", an adapter of {backbone_of(path, '--model')}" if (path / ADAPTER).is_file() else ""
    for folder in folders:
        if _made_by(folder):
            try:
                check_stamp(path, locate(folder, "--shards")[2], "--model")
            except UserError as problem:
                bad = True
                yield of_user_error("model", problem)
    carried = ecg_tokenizer_of(path, tokenizer).fingerprint()
    if not bad:
        yield ok("model", f"{model}{of}: knows the tokens of ECG tokenizer {carried}" + (", which made the shards" if folders else ""))


def check_ds_config(path: str, world: int) -> Iterator[Finding]:
    """The file as the trainers would resolve it, batch sizes that it leaves open as by default."""
    given = {key: value for key, value in ds_config.read(path).items() if value != "auto"}
    accumulation = given.get("gradient_accumulation_steps", 1)
    micro = given.get("train_micro_batch_size_per_gpu", max(1, given["train_batch_size"] // (accumulation * world)) if "train_batch_size" in given else 8)
    args = SimpleNamespace(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, max_grad_norm=given.get("gradient_clipping", 1.0))
    bf16 = given.get("bf16", {}).get("enabled", "auto")
    config = ds_config.resolve(path, args, world, bf16_is_fast() if bf16 == "auto" else bf16, 256)
    zero = config["zero_optimization"]
    offload = [part.removeprefix("offload_") for part in ("offload_optimizer", "offload_param") if zero.get(part)]
    said = f"{path}: ZeRO stage {zero['stage']}{', offloads ' + ' and '.join(offload) if offload else ''}, bf16 {config['bf16']['enabled']}"
    yield ok("ds_config", f'{said}; every "auto" is decided by the arguments')


def check_run_folder(path: str) -> Iterator[Finding]:
    """A request to stop that was left, the newest checkpoint, other runs in the folder."""
    folder = Path(path)
    request = quote(str(folder / stop.FILE))
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        yield error("run folder", f"--output_dir {path} cannot be made: {there} is a file", "name a new folder")
        return
    if not folder.is_dir():
        yield ok("run folder", f"{path} is not there yet: a new run")
        return
    if (folder / "index.json").exists():
        yield error("run folder", f"--output_dir {path} holds shards", "name a new folder")
    if (folder / stop.FILE).exists():
        yield warning(
            "run folder", f"{path} has a file {stop.FILE}: a run would save and end with exit code {stop.REQUEUE} at once", f"rm {request}"
        )
    if _is_locked(folder / ".lock"):
        mend = f"stop it with: touch {request} (SLURM would queue it again: scancel JOB), or name another folder"
        yield error("run folder", f"a run is training in {path}", mend)
    if (folder / RESULTS).is_file():
        yield ok("run folder", f"{path} holds a complete run")
        return
    if hangs := sorted(file.name for file in folder.glob("hang/rank-*.txt")):
        yield warning(
            "run folder", f"a run in {path} hung: {len(hangs)} ranks left their stacks",
            f"read {folder / 'hang'} (verdict.txt names the rank that held the others up), mend that, then: rm -r {quote(str(folder / 'hang'))}",
        )  # fmt: skip
    whole, broken = [], []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda place: (len(place.name), place.name)):
        (whole if _is_whole(checkpoint) else broken).append(checkpoint.name)
    pointer = (folder / "latest").read_text().strip() if (folder / "latest").is_file() else None
    if pointer is None and not whole:
        yield ok("run folder", f"{path} holds no checkpoint: a run starts at step 0")
    elif not whole:
        yield error("run folder", f"latest in {path} names {pointer}, and no checkpoint is whole", "name a new folder")
    elif pointer is not None and pointer not in whole:
        yield warning(
            "run folder", f"latest in {path} names {pointer}, which is {'damaged' if pointer in broken else 'gone'}", f"nothing: a run goes on from {whole[-1]}"
        )
    else:
        yield ok("run folder", f"{path}: {len(whole)} whole checkpoints by their sizes, a run goes on from {pointer or whole[-1]}")


def _is_locked(lock: Path) -> bool:
    """Whether a run holds it. Tried as a shared lock: the first ranks of several nodes look at the same time, and would keep each other out."""
    with contextlib.suppress(FileNotFoundError), open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file has the size that was written; a start compares the CRC-32 too."""
    try:
        files = json.loads((checkpoint / STATE).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
