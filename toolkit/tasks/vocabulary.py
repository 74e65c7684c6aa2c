"""Where the ECG tokens are among a language model's token ids."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ECGVocabulary:
    """Where the ECG tokens are: id of code c is `first + c`."""

    start: int
    end: int
    first: int
    codes: int

    def wrap(self, codes: np.ndarray) -> np.ndarray:
        """uint16 [n_ecgs, 313] -> int64 [n_ecgs * 315]: each ECG between its start and end token."""
        rows = codes.astype(np.int64) + self.first
        edges = np.full((len(rows), 1), self.start), np.full((len(rows), 1), self.end)
        return np.concatenate([edges[0], rows, edges[1]], 1).reshape(-1)
