"""What a score is: what each row adds, and the figure of a sum. So an interval over patients and a paired test need not know which score it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Score:
    """A score of some prediction rows.

    name: as in files, "exact_match". label: for people, "Exact match". rows: int64 [m], the places of the rows that it is over.
    stats: float64 [m, k], what each of these adds, in the same order. value: from sums of stats float64 [..., k] the score [...], nan where it is of nothing.
    """

    name: str
    label: str
    rows: np.ndarray
    stats: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    def on(self, rows: np.ndarray) -> "Score":
        """The same score over those of its rows that are among `rows`."""
        kept = np.isin(self.rows, rows)
        return replace(self, rows=self.rows[kept], stats=self.stats[kept])

    def all(self) -> float:
        """The score over all its rows; nan if there is none."""
        return float(self.value(self.stats.sum(0)))


def mean(sums: np.ndarray) -> np.ndarray:
    """The value of stats [score of the row, 1]: its mean over rows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def mean_score(name: str, label: str, rows: np.ndarray, each: np.ndarray) -> Score:
    """The mean over rows of what each scores, `each` [m]."""
    return Score(name, label, np.asarray(rows, np.int64), np.stack([np.asarray(each, np.float64), np.ones(len(rows))], -1), mean)
