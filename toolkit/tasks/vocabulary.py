"""Where the ECG tokens are among a language model's token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.ecg.gains import gain_bins


@dataclass(frozen=True)
class ECGVocabulary:
    """Where the ECG tokens are: id of code c is `first + c`, that of gain bin b `gain_first + b`.

    gain_first: None if the model has no gain tokens; where it has, every ECG carries them.
    """

    start: int
    end: int
    first: int
    codes: int
    gain_first: int | None = None

    @property
    def code_rows(self) -> range:
        """Token ids of the codes."""
        return range(self.first, self.first + self.codes)

    def wrap(self, codes: np.ndarray, gains: Sequence[Sequence[float]] | None = None) -> np.ndarray:
        """uint16 [n_ecgs, 313] -> int64 [n_ecgs * 315], or n_ecgs * 327 with gain tokens: each ECG between its start and end token.

        gains: [n_ecgs, 12] mV, unused without gain tokens; they come first, for the model to know the scale of what it reads.
        """
        rows = codes.astype(np.int64) + self.first
        edges = np.full((len(rows), 1), self.start), np.full((len(rows), 1), self.end)
        scale = [] if self.gain_first is None else [gain_bins(gains) + self.gain_first]
        return np.concatenate([edges[0], *scale, rows, edges[1]], 1).reshape(-1)
