"""No figure from patients that the model was trained on: the check that runs before any answer is generated."""

import json
from pathlib import Path

from toolkit.errors import UserError
from toolkit.lm.backbone import STAMP
from toolkit.shards.reader import Shards

SHOWN = 3  # samples named in an error
UNKNOWN = "the model, or its backbone, does not say what it was trained on"


def remembered(model: str | Path) -> dict:
    """The stamp of a model folder; {} where there is none. Raises UserError naming --model if it is damaged."""
    path = Path(model) / STAMP
    try:
        stamp = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(stamp, dict):
            raise ValueError
    except ValueError:
        raise UserError(f"--model: {path} is damaged; make the model again") from None
    return stamp


def check_leak(judged: Shards, named: list[str], known: list[dict], warn: bool, **cache) -> tuple[list[str], list[str]]:
    """(the folders of training shards that were looked at, sentences for the report): of patients that are in both, and of what could not be looked at.

    judged: the split of task shards that is to be judged. named: folders of --train_shards. known: of the model's stamp; one that is not there any more,
    or is another by its digest, is said, unless a named one has its digest. Raises UserError naming --train_shards for a named one that is not
    there, and on overlap unless `warn`.
    """
    trains = {folder: Shards.open(folder, "train", flag="--train_shards", **cache) for folder in named}
    digests, notes = {one.digest for one in trains.values()}, []
    for one in known or [{"shards": None}] * (not named):
        if one["shards"] is None:
            notes.append(f"No leak check of all that the model was trained on: {UNKNOWN}. Name it with --train_shards.")
        elif one["digest"] not in digests:
            try:
                train = Shards.open(one["shards"], "train", flag="--train_shards", **cache)
            except UserError:
                train = None
            if train is None or train.digest != one["digest"]:
                gone = "is not at hand" if train is None else "has changed since"
                notes.append(f"No leak check of {short(one['shards'])}, which the model was trained on: it {gone}. Name it with --train_shards.")
            else:
                trains[one["shards"]] = train
                digests.add(train.digest)
    patients = [judged.meta(i)["patients"] for i in range(len(judged))]
    mine, shared = {patient for some in patients for patient in some}, set()
    for train in trains.values():
        one = train.index["kind"] == "tokens"
        for i in range(len(train)):
            meta = train.meta(i)
            shared.update(mine.intersection([meta["patient"]] if one else meta["patients"]))
    if shared:
        samples = [i for i, some in enumerate(patients) if shared.intersection(some)]
        text = f"{len(shared)} of the {len(mine)} patients of split {judged.split} are in the training shards, with {len(samples)} of {len(patients)} samples"
        if not warn:
            raise UserError(
                f"--train_shards: {text}, such as {', '.join(judged.key(i) for i in samples[:SHOWN])} ({', '.join(trains)});"
                " judge another split, or shards made with the same split, or know it: --on_leak warn"
            )
        notes.insert(0, f"Leak: {text}. The figures are of patients that the model was trained on.")
    return list(trains), notes


def short(folder: str) -> str:
    """The end of a path, for files that are handed on."""
    return "/".join(Path(folder).parts[-2:]) if Path(folder).is_absolute() else folder
