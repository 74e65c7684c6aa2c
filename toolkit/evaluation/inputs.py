"""What a model is shown: an ECG itself, or in its place, to see what the model reads from it, another patient's, a flat line, or the ECG under noise."""

from collections.abc import Sequence

import numpy as np

from toolkit.ecg.gains import gains, rounded
from toolkit.ecg.leads import LEADS, SAMPLES
from toolkit.ecg.noise import NOISES, add_noise
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError
from toolkit.shards.reader import Shards
from toolkit.tokenizer.features import ECGFeatures, recordings
from toolkit.tokenizer.tokenizer import ECGTokenizer

SHUFFLED, FLAT = "shuffled", "flat"
FLAG = "--noise_db"


def noise_name(decibels: float) -> str:
    """The column of an ECG under noise: "noise 10 dB"."""
    return f"noise {decibels:g} dB"


class Inputs:
    """`of(kind, i)`: the codes uint16 [n_ecgs, 313] and the json that stand for sample i of task shards.

    kind: None for the ECG itself, SHUFFLED, FLAT, or decibels. In the json gains and `features` are those of what is shown, age and sex the patient's own. A
    flat line is nothing that a model has seen, so it may say anything: what the words alone tell it, SHUFFLED shows.
    features: of a model that reads continuous ECGs.
    donors: int64 [len(shards)], by whose ECG each is replaced (`other_patients`).
    """

    def __init__(self, shards: Shards, tokenizer: ECGTokenizer, features: ECGFeatures | None, donors: np.ndarray, seed: int):
        self.shards, self.tokenizer, self.features, self.donors, self.seed = shards, tokenizer, features, donors, seed
        self._recordings: dict | None = None
        self._flat: tuple[np.ndarray, dict] | None = None

    def of(self, kind: str | float | None, i: int) -> tuple[np.ndarray, dict]:
        codes, meta = self.shards.ids(i), self.shards.meta(i)
        if kind is None:
            return codes, meta | ({"features": self.features.of(self.shards, codes, meta)} if self.features else {})
        if kind == SHUFFLED:
            donor, other = self.of(None, int(self.donors[i]))
            return donor, meta | {name: other[name] for name in ("gains", "features") if name in other}
        if kind == FLAT:
            if self._flat is None:
                self._flat = self._encoded(np.zeros((1, len(LEADS), SAMPLES), np.float32))
            flat, shown = self._flat
            n = len(codes)
            return flat.repeat(n, 0), meta | {name: value * n if isinstance(value, list) else np.tile(value, (n, 1)) for name, value in shown.items()}
        # the same noise at every level, of a kind drawn for each ECG
        noisy = []
        for number, record in enumerate(meta["record_ids"]):
            rng = np.random.default_rng((self.seed, i, number))
            noisy.append(add_noise(self._read(meta["source"], record), NOISES[rng.integers(len(NOISES))], kind, rng))
        noisy_codes, shown = self._encoded(np.stack(noisy))
        return noisy_codes, meta | shown

    def _encoded(self, ecgs: np.ndarray) -> tuple[np.ndarray, dict]:
        """Codes, and what a json says of them, of ECGs float32 [n_ecgs, 12, 5000]."""
        shown = {"gains": [rounded(one) for one in gains(ecgs)]} | ({"features": self.features.encode(ecgs)} if self.features else {})
        return self.tokenizer.encode(ecgs), shown

    def _read(self, source: str, record: str) -> np.ndarray:
        if self._recordings is None:
            self._recordings = recordings(self.shards, FLAG, "leave it out")
        try:
            place = self._recordings[source, record]
            return read_checked(*place, "flag")[0]
        except KeyError:
            where = f"{source} {record} of {self.shards.folder}"
            raise UserError(f"{FLAG}: {where} is not in its manifest; use the manifest that the shards were made from") from None
        except (RecordError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error  # no path: one of MIMIC-IV-ECG holds patient numbers
            raise UserError(f"{FLAG}: the recording of {source} {record} cannot be read ({why}); put it back, or leave {FLAG} out") from error


def other_patients(patients: Sequence[tuple[str, ...]], n_ecgs: Sequence[int], seed: int) -> np.ndarray:
    """int64 [n]: for each sample another one with as many ECGs and none of its patients, drawn by the seed alone; -1 where there is none.

    patients: of each sample's ECGs, one or two. The samples of each n_ecgs in a random order: each takes the next one of other patients. So each ECG stands
    in for about one other.
    """
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patient for some in patients for patient in some))}
    whose, n_ecgs = np.array([[numbers[some[0]], numbers[some[-1]]] for some in patients]), np.asarray(n_ecgs)
    donors = np.full(len(patients), -1)
    rng = np.random.default_rng(seed)
    for n in np.unique(n_ecgs):
        order = rng.permutation(np.flatnonzero(n_ecgs == n))
        for step in range(1, len(order)):  # as many as the most ECGs of one patient that follow each other, so few
            ahead = np.roll(order, -step)
            alike = (whose[order][:, :, None] == whose[ahead][:, None]).any((1, 2))
            taken = (donors[order] < 0) & ~alike
            donors[order[taken]] = ahead[taken]
            if (donors[order] >= 0).all():
                break
    return donors
