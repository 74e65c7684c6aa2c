"""The shard arguments of the launchers, and what happens when a shard is bad: stop, or train without it, the same on every rank."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from toolkit.errors import UserError
from toolkit.shards.reader import Shards, locate
from toolkit.shards.remote import CACHE, CACHE_GB, is_url
from toolkit.shards.verify import find_bad
from toolkit.training.arguments import arg
from toolkit.training.distributed import start


@dataclass(kw_only=True)
class ShardArguments:
    """Where the shards of a URL are kept."""

    shard_cache: str = arg("Folder for copies of the shards where --shards is a URL (s3://, gs://, https://, ...).", CACHE)
    shard_cache_gb: float = arg("GB of shards kept there; the ones used longest ago are deleted. It should hold all of --shards.", CACHE_GB)


@dataclass(kw_only=True)
class TrainingShardArguments(ShardArguments):
    """What a trainer does about bad shards. A resumed run must leave out the same ones."""

    on_bad_shard: Literal["error", "skip"] = arg(
        "error: stop at a shard that is missing or damaged. skip: compare every shard with index.json before training and train without the bad ones.", "error"
    )
    bad_shard_budget: float = arg("With --on_bad_shard skip: the largest share of a split's samples that may be left out.", 0.01)


def open_shards(args: ShardArguments, splits: list[str], kind: str) -> tuple[list[Shards], dict[str, list[str]]]:
    """The splits of --shards, and the shards of each that are left out (always none without --on_bad_shard skip). Joins the ranks to find those.

    Raises UserError for what `Shards.open` does, and if a split would lose more than --bad_shard_budget of its samples.
    """
    cache = {"cache": args.shard_cache, "cache_gb": args.shard_cache_gb}
    if getattr(args, "on_bad_shard", "error") == "error":
        return [Shards.open(args.shards, split, kind=kind, **cache) for split in splits], {split: [] for split in splits}
    if not 0 <= args.bad_shard_budget <= 1:
        raise UserError(f"--bad_shard_budget must be a share from 0 to 1, not {args.bad_shard_budget}")
    index = locate(args.shards, "--shards", **cache)[2]
    ranks = start()
    # every node has its own disk or cache, so each looks at all shards; a shard that is bad on one node is left out on all
    parts = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))  # torchrun's, deepspeed's; else every rank looks at all
    part = int(os.environ["LOCAL_RANK"]) % parts
    found: list = [None] * ranks.world
    dist.all_gather_object(found, {split: find_bad(args.shards, split, part, parts, **cache) for split in splits})
    skipped = {split: sorted({name for part in found for name in part[split]}) for split in splits}
    for split, names in skipped.items():
        if names:
            _check_budget(split, names, index["splits"][split], args.bad_shard_budget, ranks.main)
    return [Shards.open(args.shards, split, kind=kind, skip=skipped[split], **cache) for split in splits], skipped


def _check_budget(split: str, names: list[str], entry: dict, budget: float, main: bool) -> None:
    """Say what a split loses with its bad shards; raises UserError if that is more than the budget."""
    lost = sum(shard["samples"] for shard in entry["shards"] if shard["name"] in names)
    share = lost / max(1, entry["samples"])
    which = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    text = f"{len(names)} of {len(entry['shards'])} shards of {split} are bad, {lost:,} samples or {100 * share:.2g} %: {which}"
    if share > budget:
        raise UserError(f"--shards: {text}; mend them (`python -m sharding.verify shards` says how) or raise --bad_shard_budget, now {budget}")
    if main:
        print(f"{text}; training without them", flush=True)


def trained_on(stamp: dict | None, shards: list[Shards], names: list[str]) -> list[dict]:
    """What a model's stamp remembers of its training shards, those of its backbone's stamp with them, so that no patient of theirs is judged unseen.

    {"shards": folder or URL, "digest"} each; {"shards": None} for a backbone of before stamps said it. names: of the shards, as the user gave them.
    """
    known = [] if stamp is None or "made_of" in stamp else stamp.get("trained_on", [{"shards": None}])
    own = [{"shards": name if is_url(name) else str(Path(name).resolve()), "digest": one.digest} for one, name in zip(shards, names, strict=True)]
    return [*known, *(one for one in own if one not in known)]


def check_together(train: list[Shards], valid: list[Shards]) -> None:
    """Raises UserError if folders hold tokens of several ECG tokenizers, or a patient of one's train is in another's valid (`shard` sees to it in one)."""
    if len(train) == 1:
        return
    made = [folder.index["tokenizer"] for folder in train]
    if len(set(made)) > 1:
        raise UserError(f"--shards: the folders hold tokens of {len(set(made))} ECG tokenizers ({', '.join(made)}, in their order); make all with one")
    seen = [{patient for i in range(len(folder)) for patient in folder.meta(i)["patients"]} for folder in train]
    for folder in valid:
        patients = {patient for i in range(len(folder)) for patient in folder.meta(i)["patients"]}
        for other, known in zip(train, seen):
            if both := known & patients:
                raise UserError(
                    f"--shards: {len(both)} patients of valid in {folder.folder} are in train of {other.folder}, so validation would be of what was trained on;"
                    " make both from token shards with one split (`python -m sharding.verify leak` names them)"
                )
