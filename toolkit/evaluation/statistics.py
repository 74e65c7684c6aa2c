"""How sure a score is: intervals and tests over patients, because the answers to questions about one patient go together.

A draw takes as many patients as there are, with replacement and each with all rows, and the score is that of the sum of their rows, whose number so varies
too. Rows drawn one by one would make the interval too narrow: rows of one patient are alike. Method: C. M. Rutter, Bootstrap estimation of diagnostic
accuracy with patient-clustered data, Academic Radiology 7 (2000); percentiles: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
Simulated patients of 5 questions on average and intraclass correlation 0.5 (`clustered` of the test): the interval of a mean holds the truth in 88 % of
corpora of 10 patients, 91 % of 20, 94 % of 60, 95 % of 150; one of rows drawn one by one in 66 to 70 %.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from toolkit.evaluation.scores import Score

LOW, HIGH = 0.025, 0.975  # the quantiles of a 95 % interval
DEFINED = 0.95  # of the draws, at least: of a finding that three patients have, 5 % hold none, and the others alone would tell too good a story
CHUNK = 1 << 22  # draws times patients held at a time: 32 MB
HELD = 1 << 24  # patients times their sums held at a time, 128 MB; what is more has the draws made again

Interval = tuple[float | None, float | None, float | None]  # value, low, high


def draws(patients: int, n: int = 2000, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of so many patients is in each of n draws with replacement: chunks float64 [some, patients], n rows in all, each of sum `patients`."""
    rng, step = np.random.default_rng(seed), max(1, CHUNK // patients)
    for start in range(0, n, step):
        some = min(step, n - start)
        drawn = rng.integers(patients, size=(some, patients)) + patients * np.arange(some)[:, None]
        yield np.bincount(drawn.ravel(), minlength=some * patients).reshape(some, patients).astype(np.float64)


def resampled(scores: Sequence[Score], patients: np.ndarray, n: int = 2000, seed: int = 0) -> list[np.ndarray] | None:
    """Each score [n] in the same draws of the patients that have a row of it; nan where a draw leaves it undefined.

    scores: of the same rows. patients: [all rows], the patient of each. None where they are fewer than two, of whom no spread can be seen.
    Raises ValueError for scores of different rows, rows without a patient and stats that are not finite.
    """
    number, patient = _patients_of(scores, patients)
    if number < 2:
        return None
    left = list({_place(score.stats): score.stats for score in scores}.items())  # BLEU-1..4 have the same counts: summed once
    drawn = {}
    while left:
        some = [left.pop(0)]
        while left and number * sum(stats.shape[1] for _, stats in (*some, left[0])) <= HELD:
            some.append(left.pop(0))
        sums = np.concatenate([_sums(stats, patient, number) for _, stats in some], axis=1)
        values = np.concatenate([weights @ sums for weights in draws(number, n, seed)])
        drawn |= dict(zip((place for place, _ in some), np.split(values, np.cumsum([stats.shape[1] for _, stats in some[:-1]]), axis=1)))
    found = [score.value(drawn[_place(score.stats)]) for score in scores]
    return [np.where(np.isfinite(values), values, np.nan) for values in found]


def resampled_all(scores: Sequence[Score], patients: np.ndarray, n: int = 2000, seed: int = 0) -> dict[int, np.ndarray | None]:
    """id of each score -> what `resampled` gives; those of the same rows are in the same draws."""
    same: dict[bytes, dict[int, Score]] = {}
    for score in scores:
        same.setdefault(score.rows.tobytes(), {})[id(score)] = score
    found = {}
    for group in same.values():
        found |= dict(zip(group, resampled(list(group.values()), patients, n, seed) or [None] * len(group)))
    return found


def interval(values: np.ndarray | None) -> tuple[float, float] | tuple[None, None]:
    """(low, high) of the 95 % percentile interval of a score [n] in n draws, without those that leave it undefined; None where they are more than 5 %."""
    defined = [] if values is None else values[~np.isnan(values)]
    if values is None or len(defined) < DEFINED * len(values):
        return None, None
    low, high = np.quantile(defined, [LOW, HIGH])
    return float(low), float(high)


def estimate(score: Score, patients: np.ndarray, n: int = 2000, seed: int = 0) -> Interval:
    """(value, low, high) of a score; all None where it is of nothing, low and high where no interval can be seen. Errors: see `resampled`."""
    value, drawn = score.all(), resampled([score], patients, n, seed)
    return (None, None, None) if np.isnan(value) else (value, *interval(drawn and drawn[0]))


def difference(a: Score, b: Score, patients: np.ndarray, n: int = 2000, seed: int = 0) -> Interval:
    """(a - b, low, high), both scores in the same draws: what is hard for both is no part of the interval. None and errors as in `estimate`."""
    value, drawn = a.all() - b.all(), resampled([a, b], patients, n, seed)
    return (None, None, None) if np.isnan(value) else (value, *interval(drawn and drawn[0] - drawn[1]))


def permutation(a: Score, b: Score, patients: np.ndarray, n: int = 10_000, seed: int = 0) -> float | None:
    """The two-sided p of no difference between two systems on the same rows; None where the difference is undefined.

    Approximate randomisation: if the systems are alike, it is all the same whose answers to a patient's questions are whose. Each of n times they change
    places for half of the patients, by chance; p is (1 + how often the difference is then at least as large) / (1 + n). Source: E. W. Noreen,
    Computer-Intensive Methods for Testing Hypotheses (1989); the added ones: B. Phipson and G. K. Smyth, Permutation p-values should never be zero,
    Statistical Applications in Genetics and Molecular Biology 9 (2010). Errors: see `resampled`.
    """
    number, patient = _patients_of([a, b], patients)
    first, second = (_sums(score.stats, patient, number) for score in (a, b))
    seen = abs(a.all() - b.all())
    if np.isnan(seen):
        return None
    change = (second - first)[(first != second).any(1)]  # to swap a patient with equal sums changes nothing
    rng, width, reached = np.random.default_rng(seed), len(change), 0
    step = max(1, CHUNK // max(1, width))
    for start in range(0, n, step):
        some = min(step, n - start)
        swapped = np.unpackbits(rng.integers(256, size=(some, -(-width // 8)), dtype=np.uint8), axis=1, count=width)
        moved = swapped.astype(np.float64) @ change
        other = np.abs(a.value(first.sum(0) + moved) - b.value(second.sum(0) - moved))
        reached += int((~(other < seen - 1e-12)).sum())  # equal but for the last digit is equal; undefined counts against
    return (1 + reached) / (1 + n)


def holm(ps: Sequence[float]) -> list[float]:
    """p values [n] corrected for n tests, in the order given. S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 6 (1979)."""
    corrected, worst = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = max(worst, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = worst
    return corrected


def _patients_of(scores: Sequence[Score], patients: np.ndarray) -> tuple[int, np.ndarray]:
    """How many patients have a row of the scores, and which of them, 0, 1, ..., has each row."""
    rows = scores[0].rows
    if any(not np.array_equal(score.rows, rows) for score in scores):
        raise ValueError(f"scores of different rows cannot be paired: {', '.join(sorted({score.name for score in scores}))}")
    if len(rows) and rows.max() >= len(patients):
        raise ValueError(f"row {rows.max()} has a score, but there are {len(patients)} patients")
    for score in scores:
        if not (finite := np.isfinite(score.stats).all(1)).all():
            raise ValueError(f"{score.name} of row {rows[np.argmin(finite)]} is not finite")
    names, patient = np.unique(np.asarray(patients)[rows], return_inverse=True)
    return len(names), patient


def _sums(stats: np.ndarray, patient: np.ndarray, number: int) -> np.ndarray:
    """float64 [number, k] of stats [rows, k]: the sums of each patient's rows."""
    sums = np.empty((number, stats.shape[1]))
    for i, column in enumerate(stats.T):  # bincount: many times faster than np.add.at
        sums[:, i] = np.bincount(patient, column, number)
    return sums


def _place(stats: np.ndarray) -> tuple:
    """Where an array lies: the same for two views of the same numbers."""
    return stats.ctypes.data, stats.shape, stats.strides
