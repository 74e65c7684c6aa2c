"""Continuous features of a sample's ECGs (`--ecg_input continuous`): what the ECG encoder knows of each token before it makes a code of it.

Shards hold codes alone, so the recordings are read and encoded again, found through the manifest that the shards' index names.
"""

from pathlib import Path

import numpy as np
import torch

from sharding.manifest import read_manifest
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError
from toolkit.shards.order import spaced
from toolkit.shards.reader import Shards
from toolkit.tokenizer.fsq import ids_of
from toolkit.tokenizer.tokenizer import ECGTokenizer

MEASURED = 128  # ECGs of which mean and spread are taken
KEPT = 1 << 28  # bytes of features kept in memory, those of 2,200 ECGs with 192 features a token: to read and encode an ECG takes 11 ms
SAME = 0.99  # of the codes: where an output lay on an edge float64 decided, and another machine has other last bits
FLAG = "--ecg_input continuous"


class ECGFeatures:
    """`of(shards, codes, meta)`: the features of a sample of task shards, each of mean 0 and SD 1 over `MEASURED` ECGs of the training split.

    tokenizer: that of the shards, whose fingerprint all of them share. mean, std: float32 [D], as `measure` gave them to the run that made a model.
    """

    def __init__(self, tokenizer: ECGTokenizer, mean: np.ndarray | float = 0.0, std: np.ndarray | float = 1.0):
        self.tokenizer, self.mean, self.std = tokenizer, mean, std
        self._recordings: dict[Path, dict] = {}
        self._kept: dict[tuple, np.ndarray] = {}

    def measure(self, shards: list[Shards]) -> tuple[np.ndarray, np.ndarray]:
        """Set mean and spread from samples evenly spaced over all the shards; the features of those, standardised, float32 [n, D], and their codes [n]."""
        starts = np.cumsum([0, *map(len, shards)])
        folders = [(int(np.searchsorted(starts, place, "right")) - 1, place) for place in spaced(int(starts[-1]), MEASURED)]
        samples = [(shards[folder], place - int(starts[folder])) for folder, place in folders]
        found = [(self._raw(one, one.ids(i), one.meta(i)), one.ids(i).reshape(-1)) for one, i in samples]
        raw, codes = (np.concatenate(parts) for parts in zip(*found))
        self.mean, std = raw.mean(0), raw.std(0)
        self.std = np.maximum(std, 0.01 * std.max())  # one that hardly moves is not blown up
        return (raw - self.mean) / self.std, codes

    def of(self, shards: Shards, codes: np.ndarray, meta: dict) -> np.ndarray:
        """float16 [n_ecgs * 313, D] of the sample with these codes uint16 [n_ecgs, 313] and this json.

        Raises UserError naming --ecg_input if the recordings are not at hand, or not those that the codes were made from.
        """
        key = (shards.folder, meta["source"], *meta["record_ids"])
        features = self._kept.get(key)
        if features is None:
            features = ((self._raw(shards, codes, meta) - self.mean) / self.std).astype(np.float16)
            if (len(self._kept) + 1) * features.nbytes <= KEPT:  # kept to the end: in epochs of another order each, the last ones would be hit no more often
                self._kept[key] = features
        return features

    def encode(self, ecgs: np.ndarray) -> np.ndarray:
        """float16 [B * 313, D], as `of` gives them, of ECGs float32 [B, 12, 5000] that are not those of the shards."""
        features = self.tokenizer.features(ecgs)
        return ((features.reshape(-1, features.shape[-1]) - self.mean) / self.std).astype(np.float16)

    def _raw(self, shards: Shards, codes: np.ndarray, meta: dict) -> np.ndarray:
        """float32 [n_ecgs * 313, D], not standardised."""
        features = self.tokenizer.features(np.stack([self._read(shards, meta["source"], record) for record in meta["record_ids"]]))
        with torch.no_grad():
            z = torch.sigmoid(self.tokenizer.encoder.to_code(torch.from_numpy(features)))
        same = (ids_of(z, self.tokenizer.config.levels).numpy() == codes).mean()
        if not same >= SAME:
            raise UserError(
                f"{FLAG}: only {100 * same:.0f} % of the codes of {', '.join(meta['record_ids'])} in {shards.folder} are those of its recording now;"
                " make the shards again from the manifest beside them"
            )
        return features.reshape(-1, features.shape[-1])

    def _read(self, shards: Shards, source: str, record: str) -> np.ndarray:
        if shards.folder not in self._recordings:
            self._recordings[shards.folder] = recordings(shards)
        try:
            place = self._recordings[shards.folder][source, record]
            return read_checked(*place, "flag")[0]  # what passed `prepare` reads the same under both rules
        except KeyError:
            raise UserError(f"{FLAG}: {source} {record} of {shards.folder} is not in its manifest; use the manifest that the shards were made from") from None
        except (RecordError, OSError) as error:
            raise UserError(f"{FLAG}: the recording {place[0]} cannot be read ({error}); put it back, or tune with --ecg_input tokens") from error


def recordings(shards: Shards, flag: str = FLAG, mend: str = "tune with --ecg_input tokens") -> dict[tuple[str, str], tuple[str, float, str]]:
    """(source, record id) -> (path, start, array) of the ECGs in the manifest of shards; of a record's windows the first, as tasks are joined.

    Raises UserError naming `flag` and the mend.
    """
    try:
        manifest = read_manifest(Path(shards.folder) / shards.index["manifest"])
    except (KeyError, UserError) as error:
        raise UserError(
            f"{flag}: reads the recordings, and the manifest of {shards.folder} is not at hand ({error}); put it there, or {mend}"
        ) from error
    found: dict = {}
    columns = manifest.sort_values("key")[["source", "record_id", "path", "start", "array"]]
    for source, record, *place in columns.itertuples(index=False, name=None):
        found.setdefault((source, record), tuple(place))
    return found
