"""Instruction tuning without ECG pretraining: a backbone that knows no ECG tokens gets untrained ones."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist

from toolkit.errors import UserError
from toolkit.files import new_folder
from toolkit.lm.backbone import STAMP, check_stamp, load_backbone, save_stamp
from toolkit.lm.trained import ADAPTER
from toolkit.lm.vocabulary import extend
from toolkit.shards.reader import Shards
from toolkit.tasks.corpus import corpus
from toolkit.training.distributed import Ranks

FOLDER = "backbone"  # in the run folder


def prepare_backbone(backbone: str, out: str, shards: list[Shards], seed: int, ranks: Ranks) -> tuple[str, dict]:
    """Collective. The folder of a backbone that knows the shards' ECG tokens, and its stamp: --backbone itself, or what is made of it in the run folder.

    That one is part of the run's result: the adapter needs its untrained rows. Raises UserError naming --backbone.
    """
    given = Path(backbone)
    if (given / ADAPTER).is_file():
        raise UserError(f"--backbone: {given} is an adapter; name the folder of launchers/pretrain.py that it was trained on")
    if not (given / STAMP).is_file() and (given / "arguments.json").is_file():
        raise UserError(f"--backbone: the training of {given} is not complete; run its launchers/pretrain.py command again")
    if not (given / STAMP).is_file():
        given = Path(out) / FOLDER
        if ranks.main:
            _make(given, backbone, shards[0], seed)
        dist.barrier()
    for one in shards:
        stamp = check_stamp(given, one.index, "--backbone")
    return str(given.resolve()), stamp  # the adapter's configuration remembers it


def _make(folder: Path, backbone: str, shards: Shards, seed: int) -> None:
    made_of = {"backbone": backbone, "seed": seed, "shards": shards.digest}
    if folder.is_dir():
        # a run that saved something goes on with it, or says what is another; of one that did not nothing is kept
        if json.loads((folder / STAMP).read_text()).get("made_of") == made_of or (folder.parent / "latest").is_file():
            return
        shutil.rmtree(folder)
    model, tokenizer = load_backbone(backbone, lambda: corpus(shards), seed)
    print(f"{backbone} knows no ECG tokens: they start untrained, in {folder}, which the adapter will need", flush=True)
    knows_text = backbone != "tiny"
    extend(model, tokenizer, shards.index["levels"], seed, knows_text)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_stamp(temporary, shards.index, knows_text, made_of=made_of)
