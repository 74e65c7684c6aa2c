"""The ECG tokenizer that a model folder carries, so that the model reads recordings without shards: `ecg_tokenizer/` in it."""

import json
from pathlib import Path

from toolkit.errors import UserError
from toolkit.lm.backbone import STAMP
from toolkit.tokenizer.tokenizer import ECGTokenizer

FOLDER = "ecg_tokenizer"


def carried_in(folder: str | Path) -> Path | None:
    """Where a model's ECG tokenizer is: in its folder or, as of a run's `last/` and `backbone/`, in the folder around it; None if there is none."""
    here = Path(folder).resolve()
    return next((place / FOLDER for place in (here, here.parent) if (place / FOLDER / "config.json").is_file()), None)


def ecg_tokenizer_of(folder: str | Path, given: str | Path | None = None) -> ECGTokenizer:
    """The ECG tokenizer whose codes a model knows. given: the folder of one, in place of what the model carries.

    Raises UserError naming --model if the folder says of no ECG tokenizer, else --tokenizer if that is not there, damaged or another one.
    """
    try:
        wanted = json.loads((Path(folder) / STAMP).read_text())["tokenizer"]
    except OSError:
        raise UserError(f"--model: {folder} has no {STAMP}; name the --output_dir of launchers/instruct.py, or what toolkit.lm.merge made of it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--model: {Path(folder) / STAMP} is damaged; make the model again") from None
    place = given or carried_in(folder)
    if place is None:
        raise UserError(f"--tokenizer: {folder} carries no {FOLDER}/, as those made before there was one; name the folder of launchers/train_tokenizer.py")
    tokenizer = ECGTokenizer.from_pretrained(place)
    if tokenizer.fingerprint() != wanted:
        raise UserError(f"--tokenizer: {place} is {tokenizer.fingerprint()}, and {folder} was trained on the codes of {wanted}; name that one")
    return tokenizer
