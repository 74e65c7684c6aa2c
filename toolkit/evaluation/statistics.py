"""How sure a score is: intervals over patients, because the answers to questions about one patient go together."""

from collections.abc import Sequence

import numpy as np

LOW, HIGH = 0.025, 0.975  # the quantiles of a 95 % interval


def patient_bootstrap(
    correct: Sequence[float], other: Sequence[float] | None, patients: Sequence[str], draws: int = 2000, seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """(estimate, low, high): the mean of `correct` [n], or of `correct - other` row by row, and its 95 % percentile interval.

    patients: [n], the patient of each row. A draw takes as many patients as there are, with replacement and each with all rows, and divides
    the sum of their rows by the number of these, which so varies too. Rows drawn one by one would make the interval too narrow: rows of one
    patient are alike. Method: C. M. Rutter, Bootstrap estimation of diagnostic accuracy with patient-clustered data, Academic Radiology 7 (2000);
    percentiles: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Simulated patients of 5 questions on average and
    intraclass correlation 0.5 (`clustered` of its test): the interval holds the truth in 88 % of corpora of 10 patients, 91 % of 20, 94 % of 60,
    95 % of 150; one of rows drawn one by one in 66 to 70 %.

    All three are None without rows; low and high with one patient, of whom no spread can be seen. Raises ValueError for scores that are not
    finite and for lengths that differ. 0.3 s for 20,000 rows of as many patients, 0.07 s of 2,000; 0.6 s for 400,000 rows of 2,000.
    """
    score = np.asarray(correct, np.float64)
    if other is not None:
        if len(other) != len(score):
            raise ValueError(f"{len(score)} scores cannot be paired with {len(other)}")
        score = score - np.asarray(other, np.float64)
    if len(patients) != len(score):
        raise ValueError(f"{len(score)} scores, but {len(patients)} patients")
    if not np.isfinite(score).all():
        raise ValueError(f"the score of row {int(np.argmin(np.isfinite(score)))} is not finite")
    if not len(score):
        return None, None, None
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    sums, rows = np.bincount(patient, score), np.bincount(patient)
    estimate = float(sums.sum() / rows.sum())
    if len(names) == 1:
        return estimate, None, None
    rng, means = np.random.default_rng(seed), np.empty(draws)
    for i in range(draws):
        drawn = rng.integers(len(names), size=len(names))
        means[i] = sums[drawn].sum() / rows[drawn].sum()
    low, high = np.quantile(means, [LOW, HIGH])
    return estimate, float(low), float(high)
