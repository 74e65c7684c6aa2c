"""The ECGs shown in the report: the recording if its file is at hand, with what the tokenizer kept of it."""

import io
from pathlib import Path

import numpy as np
import torch

from toolkit.ecg.plot import draw_ecg
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError
from toolkit.evaluation.metrics import is_correct
from toolkit.shards.reader import Shards
from toolkit.tokenizer.tokenizer import ECGTokenizer


def card(shards: Shards, i: int, rows: list[dict], recordings: dict[str, tuple[str, float, str]], tokenizer: ECGTokenizer) -> dict:
    """One ECG of the report, in the form that `write_report` takes.

    rows: the predictions for sample i; recordings: record id -> (path, start, array) of those that are at hand, as in a manifest.
    """
    meta = shards.meta(i)
    record = meta["record_ids"][0]
    z = tokenizer.decode(shards.ids(i)[0])
    picture = io.BytesIO()
    try:
        ecg = read_checked(*recordings[record], "flag")[0]
        draw_ecg(ecg, picture, reconstruction=millivolts(tokenizer, z, ecg))
        title = f"ECG {record}"
    except (KeyError, RecordError):
        draw_ecg(z * np.array(meta["gains"][0])[:, None], picture)  # about the mean of each lead, which is not known
        title = f"ECG {record}, reconstruction alone: the recording is not at hand"
    questions = [{**row, "correct": is_correct(row)} for row in rows if row["task"] == "ecgqa"]
    report = next(({name: row[name] for name in ("reference", "prediction")} for row in rows if row["task"] == "report"), None)
    return {"key": f"{meta['source']}, sample {i} of the split", "title": title, "png": picture.getvalue(), "questions": questions, "report": report}


def millivolts(tokenizer: ECGTokenizer, z: np.ndarray, ecg: np.ndarray) -> np.ndarray:
    """Decoded z-scores [12, 5000] in mV, as the tokenizer took the recording `ecg` [12, 5000] mV to z-scores."""
    _, mean, std = tokenizer.normalise(torch.from_numpy(ecg)[None])
    return z * std[0].numpy() + mean[0].numpy()


def tokenizer_of(shards: Shards) -> ECGTokenizer:
    """The ECG tokenizer that travels with the shards (to the local mirror of a URL). Raises UserError if it is not the one that made their ids."""
    tokenizer = ECGTokenizer.from_pretrained(Path(shards.folder) / "tokenizer", "--shards")
    if tokenizer.fingerprint() != shards.index["tokenizer"]:
        raise UserError(f"--shards: the ids of {shards.folder} were not made by the tokenizer beside them; copy the folder again")
    return tokenizer
