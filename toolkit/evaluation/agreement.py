"""What raters gave, how they agree, and how a metric goes with them: Scores over cases, so that their intervals are those of every other score.

Ratings are whole numbers 1 to 5, nan where one is missing. The formulas are written out because the package `krippendorff` is GPL, which this
toolkit is not, and because a sum over cases is what a bootstrap needs; the tests compare them with that package and with scikit-learn.
"""

import numpy as np
from scipy.stats import rankdata

from toolkit.evaluation.scores import Score, mean_score
from toolkit.evaluation.statistics import estimate, interval

LEVELS = 5

Figure = dict[str, float | int | None]  # value, low and high of its 95 % interval over cases, n cases or texts that it is of; None where undefined


def mean(values: np.ndarray) -> Figure:
    """The mean of values [cases], nan where a case has none."""
    cases = np.flatnonzero(np.isfinite(values))
    return _figure(estimate(mean_score("mean", "Mean", cases, values[cases]), np.arange(len(values))), len(cases))


def between(ratings: np.ndarray) -> dict[str, Figure]:
    """{"alpha": ..., "kappa": ... if there are two raters} of ratings [raters, cases, texts]; n: texts that at least two rated."""
    scores = [alpha(ratings)] + ([kappa(ratings)] if len(ratings) == 2 else [])
    n = int((np.isfinite(ratings).sum(0) > 1).sum())
    return {one.name: _figure(estimate(one, np.arange(ratings.shape[1])), n) for one in scores}


def correlation(x: np.ndarray, y: np.ndarray) -> Figure:
    """Spearman's rank correlation of x and y [cases, texts], nan where missing; n: texts that have both."""
    return _figure(spearman(x, y), int(np.isfinite(x + y).sum()))


def _figure(estimated: tuple[float | None, float | None, float | None], n: int) -> Figure:
    return {**dict(zip(("value", "low", "high"), estimated)), "n": n}


def alpha(ratings: np.ndarray) -> Score:
    """Krippendorff's alpha for ordinal ratings: 1 full agreement, 0 that of chance, below 0 worse; nan where all ratings are equal or none is paired.

    ratings [raters, cases, texts]; a text that fewer than two rated does not count. A row of the Score is a case, its stats the coincidences of its
    texts. Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), sections C and D.
    """
    counts = np.stack([(ratings == level).sum(0) for level in range(1, LEVELS + 1)], -1).astype(np.float64)  # [cases, texts, levels]
    raters = counts.sum(-1)[..., None, None]
    pairs = counts[..., :, None] * counts[..., None, :] - counts[..., :, None] * np.eye(LEVELS)
    coincidences = np.where(raters > 1, pairs / np.maximum(raters - 1, 1), 0).sum(1)
    return _score("alpha", "Krippendorff's alpha (ordinal)", coincidences, _alpha)


def _alpha(sums: np.ndarray) -> np.ndarray:
    observed = sums.reshape(*sums.shape[:-1], LEVELS, LEVELS)
    of = observed.sum(-1)  # ratings of each level
    n, up_to = of.sum(-1), np.cumsum(of, -1)
    # ratings from level c to level k, each end counted half: the distance of ranks
    distance = (up_to[..., None, :] - up_to[..., :, None] - of[..., None, :] / 2 + of[..., :, None] / 2) ** 2
    expected = (of[..., :, None] * of[..., None, :] - of[..., :, None] * np.eye(LEVELS)) / np.maximum(n - 1, 1)[..., None, None]
    return _one_minus((observed * distance).sum((-1, -2)), (expected * distance).sum((-1, -2)))


def kappa(ratings: np.ndarray) -> Score:
    """Cohen's kappa of two raters, weights quadratic: 1 full agreement, 0 that of chance; nan where each gives all texts one and the same level.

    ratings [2, cases, texts]; a text that one of them left out does not count. A row of the Score is a case, its stats the cross table of its texts.
    Source: J. Cohen, Weighted kappa, Psychological Bulletin 70 (1968).
    """
    first, second = ((ratings[rater][..., None] == np.arange(1, LEVELS + 1)).astype(np.float64) for rater in (0, 1))
    return _score("kappa", "Weighted kappa (quadratic)", np.einsum("cti,ctj->cij", first, second), _kappa)


def _kappa(sums: np.ndarray) -> np.ndarray:
    table = sums.reshape(*sums.shape[:-1], LEVELS, LEVELS)
    weights = np.subtract.outer(np.arange(LEVELS), np.arange(LEVELS)) ** 2
    expected = table.sum(-1)[..., :, None] * table.sum(-2)[..., None, :] / np.maximum(table.sum((-1, -2)), 1)[..., None, None]
    return _one_minus((table * weights).sum((-1, -2)), (expected * weights).sum((-1, -2)))


def _score(name: str, label: str, tables: np.ndarray, value) -> Score:
    """tables [cases, levels, levels]."""
    return Score(name, label, np.arange(len(tables)), tables.reshape(len(tables), -1), value)


def _one_minus(seen: np.ndarray, chance: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance > 0, 1 - seen / chance, np.nan)


def spearman(x: np.ndarray, y: np.ndarray, n: int = 1000, seed: int = 0) -> tuple[float | None, float | None, float | None]:
    """(rank correlation, low, high) of x and y [cases, texts], nan where missing; 95 % interval of n draws of cases, because texts of a case go together.

    None where there are fewer than three pairs, or one of both is constant.
    """
    both = np.isfinite(x + y)
    x, y = (np.where(both, values, np.inf) for values in (x, y))  # missing pairs rank behind all others, and are left out of the sums
    value = _spearman(x.ravel(), y.ravel())
    if np.isnan(value):
        return None, None, None
    drawn = np.random.default_rng(seed).integers(len(x), size=(n, len(x)))
    return float(value), *interval(_spearman(x[drawn].reshape(n, -1), y[drawn].reshape(n, -1)))


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x, y [..., pairs], inf in both where a pair is missing -> [...]."""
    both = np.isfinite(x)
    n = both.sum(-1)
    ranks = [np.where(both, rankdata(values, axis=-1), 0) for values in (x, y)]
    x, y = (np.where(both, rank - (rank.sum(-1) / np.maximum(n, 1))[..., None], 0) for rank in ranks)
    spread = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where((n > 2) & (spread > 0), (x * y).sum(-1) / np.where(spread > 0, spread, 1), np.nan)
