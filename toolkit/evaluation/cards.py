"""The ECGs of the report: the recording if its file is at hand, beside it what the tokenizer kept of it, and the tokens."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly

from toolkit.ecg.gains import zscored
from toolkit.ecg.leads import SAMPLING_RATE
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError
from toolkit.shards.reader import Shards
from toolkit.tokenizer.features import recordings
from toolkit.tokenizer.tokenizer import ECGTokenizer

SHOWN_RATE = 250  # Hz: 10 points a millimetre of paper; half the bytes of 500

Recordings = dict[tuple[str, str], tuple[str, float, str]]  # (source, record id) -> (path, start, array), as in a manifest


def ecgs(shards: Shards, samples: Iterable[int], tokenizer: ECGTokenizer) -> dict[int, list[dict]]:
    """The ECGs of these samples, in the form that `write_report` takes: one of each, two of a comparison. 20 to 40 ms an ECG."""
    places = recordings_of(shards)
    return {i: [ecg_of(shards, i, places, tokenizer, number) for number in range(len(shards.ids(i)))] for i in samples}


def recordings_of(shards: Shards) -> Recordings:
    """Where the recordings are, by the manifest that the shards were made from; empty if that is not at hand."""
    try:
        return recordings(shards)
    except UserError:  # the shards were moved without it: the report draws reconstructions alone
        return {}


def ecg_of(shards: Shards, i: int, recordings: Recordings, tokenizer: ECGTokenizer, number: int = 0) -> dict:
    """ECG `number` of sample i: `{"title", "note": str, "fs": 250, "unit": "mV" | "SD", "signal": float32 [12, 2500] | None, "reconstruction": float32
    [12, 2500], "tokens": uint16 [313], "levels": [int]}`, the arrays in that unit. It is SD where the recording was z-scored upstream, so that its amplitudes
    are lost.
    """
    meta, tokens = shards.meta(i), np.array(shards.ids(i)[number])
    record, gains, z = meta["record_ids"][number], np.array(meta["gains"][number], np.float32), tokenizer.decode(tokens)
    try:
        signal = read_checked(*recordings[meta["source"], record], "flag")[0]
        reconstruction, note = millivolts(tokenizer, z, signal), ""
    except (KeyError, RecordError, OSError):
        signal, reconstruction = None, z * gains[:, None]
        note = "The recording is not at hand: this is the tokenizer's reconstruction, each lead about its mean, which is not known."
    return {
        "title": f"ECG {record}",
        "note": note,
        "fs": SHOWN_RATE,
        "unit": "SD" if zscored(gains) else "mV",
        "signal": None if signal is None else shown(signal),
        "reconstruction": shown(reconstruction),
        "tokens": tokens,
        "levels": list(tokenizer.config.levels),
    }


def shown(ecg: np.ndarray) -> np.ndarray:
    """[12, 5000] at 500 Hz -> float32 [12, 2500] at the rate that the page draws."""
    # beyond the ends is the line through both, not zero, which bends an offset of 1 mV by 0.25 at the first sample
    return resample_poly(ecg, 1, SAMPLING_RATE // SHOWN_RATE, axis=1, padtype="line").astype(np.float32)


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
