"""No figure from patients that the model was trained on: the check that runs before any answer is generated."""

import json
from pathlib import Path

from toolkit.errors import UserError
from toolkit.lm.backbone import STAMP
from toolkit.shards.reader import Shards
from toolkit.training.shards import ShardArguments

SHOWN = 3  # samples named in an error


def trained_on(model: str | Path) -> list[str]:
    """The shards that a model of ours, and the backbone below it, was trained on, as its stamp remembers them; [] if it does not."""
    path = Path(model) / STAMP
    return json.loads(path.read_text()).get("trained_on", []) if path.is_file() else []


def check_leak(judged: Shards, folders: list[str], named: bool, args: ShardArguments) -> tuple[list[str], str | None]:
    """What was found of patients that are in both: (the training shards that were looked at, a sentence for the report or None).

    judged: the split of task shards that is to be judged. folders: of the training shards; named: by --train_shards, so that one that is not there is a
    mistake; else it is left out and said. Raises UserError naming --train_shards on overlap, unless --on_leak warn.
    """
    cache = {"cache": args.shard_cache, "cache_gb": args.shard_cache_gb}
    looked, absent, shared = [], [], set()
    patients = [judged.meta(i)["patients"] for i in range(len(judged))]
    mine = {patient for some in patients for patient in some}
    for folder in folders:
        try:
            train = Shards.open(folder, "train", flag="--train_shards", **cache)
        except UserError:
            if named:
                raise
            absent.append(folder)
            continue
        looked.append(folder)
        one = train.index["kind"] == "tokens"
        for i in range(len(train)):
            meta = train.meta(i)
            shared.update(mine.intersection([meta["patient"]] if one else meta["patients"]))
    if shared:
        samples = [i for i, some in enumerate(patients) if shared.intersection(some)]
        text = (
            f"{len(shared)} of the {len(mine)} patients of split {judged.split} are in the training shards ({', '.join(looked)}),"
            f" with {len(samples)} of {len(patients)} samples, such as {', '.join(judged.key(i) for i in samples[:SHOWN])}"
        )
        if args.on_leak == "error":
            raise UserError(f"--train_shards: {text}; judge another split, or shards made with the same split, or know it: --on_leak warn")
        return looked, f"Leak: {text}. The figures are of patients that the model was trained on."
    if not folders:
        return looked, "No leak check: the model does not say what it was trained on. Name it with --train_shards."
    if absent:
        gone = f"not at hand: {', '.join(absent)}. Name them with --train_shards."
        return looked, f"Leak check of {len(looked)} of {len(folders)} folders of training shards; {gone}"
    return looked, None
