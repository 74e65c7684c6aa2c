"""Intervals and tests over patients against loops over rows, a plain bootstrap, all swaps one by one, and the truth of simulated patients."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.evaluation import statistics
from toolkit.evaluation.scores import Score, mean_score
from toolkit.evaluation.statistics import difference, draws, estimate, holm, interval, permutation, resampled, resampled_all


def mean_of(each, name="exact_match"):
    return mean_score(name, name, np.arange(len(each)), each)


def ratio_of(parts, wholes):
    """A score that is no mean: the sum of parts over the sum of wholes, as a precision is; nan where these are 0."""

    def value(sums):
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / sums[..., 1]

    return Score("precision", "Precision", np.arange(len(parts)), np.stack([parts, wholes], -1).astype(float), value)


def clustered(rng, patients, mean=0.7, rows=5):
    """(correct [n] of 0 and 1, patients [n]): a patient's questions are mostly all right or all wrong; more rows for some patients, whatever the score."""
    correct, names = [], []
    for p in range(patients):
        own = rng.beta(mean, 1 - mean)  # intraclass correlation 0.5
        n = int(rng.integers(1, 2 * rows))
        correct += list((rng.random(n) < own).astype(float))
        names += [f"p{p}"] * n
    return np.array(correct), np.array(names)


def by_hand(patients, figure, n, seed):
    """figure(rows) of n draws of the patients, with a loop over patients and rows."""
    names, same_draws, found = sorted(set(patients)), np.random.default_rng(seed), []
    for _ in range(n):
        drawn = same_draws.integers(len(names), size=len(names))
        found.append(figure([row for k in drawn for row, patient in enumerate(patients) if patient == names[k]]))
    return np.array(found)


@pytest.mark.parametrize("paired", [False, True])
def test_it_is_the_loop_over_patients_and_rows(paired):
    rng = np.random.default_rng(3)
    correct, patients = clustered(rng, 17)
    other = (rng.random(len(correct)) < 0.4).astype(float)
    score = correct - other if paired else correct
    values = by_hand(patients, lambda rows: sum(score[rows]) / len(rows), 150, 8)
    expected = sum(score) / len(score), np.percentile(values, 2.5), np.percentile(values, 97.5)
    found = difference(mean_of(correct), mean_of(other), patients, 150, 8) if paired else estimate(mean_of(correct), patients, 150, 8)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_score_that_is_no_mean_is_of_the_sums_of_a_draw():
    rng = np.random.default_rng(6)
    _, patients = clustered(rng, 12)
    wholes = rng.integers(1, 4, len(patients))
    parts = rng.integers(0, wholes + 1)
    values = by_hand(patients, lambda rows: parts[rows].sum() / wholes[rows].sum(), 100, 0)
    assert estimate(ratio_of(parts, wholes), patients, 100) == pytest.approx((parts.sum() / wholes.sum(), *np.percentile(values, [2.5, 97.5])))


def test_only_the_patients_of_a_scores_rows_are_drawn():
    correct, patients = clustered(np.random.default_rng(7), 40)
    few = np.flatnonzero(np.isin(patients, ["p3", "p5", "p8", "p13", "p21"]))
    assert estimate(mean_of(correct).on(few), patients) == estimate(mean_of(correct[few]), patients[few])


def test_one_row_a_patient_is_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    correct = rng.normal(size=300)
    plain = np.random.default_rng(99).choice(correct, (4000, 300)).mean(1)
    value, low, high = estimate(mean_of(correct), np.arange(300), 4000)
    assert value == pytest.approx(correct.mean())
    # the standard error of a 2.5 % quantile of 4,000 means is 0.042 of their SD; two of them are compared
    assert [low, high] == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.2 * plain.std())


def test_the_interval_covers_the_truth_and_one_of_single_rows_does_not():
    """200 corpora of 60 patients whose true accuracy is 0.7. Of 1,500 such, 93.8 % were covered, and 68 % by rows; the SD is 3.4 of 200, and 6.6."""
    rng, covered, of_rows = np.random.default_rng(5), 0, 0
    for _ in range(200):
        correct, patients = clustered(rng, 60)
        low, high = estimate(mean_of(correct), patients, 200)[1:]
        covered += low <= 0.7 <= high
        low, high = estimate(mean_of(correct), np.arange(len(correct)), 200)[1:]
        of_rows += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99
    assert of_rows / 200 < 0.78


def test_pairs_by_row_are_surer_than_two_scores_apart():
    rng = np.random.default_rng(2)
    other, patients = clustered(rng, 100)
    correct = np.where(rng.random(len(other)) < 0.1, 1.0, other)  # the same questions are hard for both
    value, low, high = difference(mean_of(correct), mean_of(other), patients)
    assert value == pytest.approx(correct.mean() - other.mean()) and 0 < low < value < high
    one, two = (estimate(mean_of(score), patients) for score in (correct, other))
    assert high - low < 0.5 * np.hypot(one[2] - one[1], two[2] - two[1])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40), st.randoms())
@settings(max_examples=50, deadline=None)
def test_an_interval_is_in_bounds_and_the_order_of_rows_changes_nothing(rows, random):
    """0 and 1 are summed exactly in any order."""
    found = []
    for some in (rows, random.sample(rows, len(rows))):
        right, patients = zip(*some)
        found.append(estimate(mean_of(right), np.array(patients), 50))
    assert found[0] == found[1]
    value, low, high = found[0]
    assert (low is None) == (len(set(patients)) == 1) and (low is None or 0 <= low <= high <= 1) and 0 <= value <= 1


def test_draws_are_as_many_patients_each_and_the_chunks_change_nothing(monkeypatch):
    whole = np.concatenate(list(draws(7, 50, 3)))
    assert whole.shape == (50, 7) and (whole.sum(1) == 7).all()
    correct, patients = clustered(np.random.default_rng(4), 30)
    scores = [mean_of(correct), mean_of(1 - correct), ratio_of(correct, correct + 1)]
    before, p = resampled(scores, patients), permutation(scores[0], scores[1], patients, 500)
    monkeypatch.setattr(statistics, "CHUNK", 10)
    monkeypatch.setattr(statistics, "HELD", 30)  # one score at a time
    np.testing.assert_array_equal(np.concatenate(list(draws(7, 50, 3))), whole)
    np.testing.assert_allclose(resampled(scores, patients), before, rtol=1e-12)
    assert permutation(scores[0], scores[1], patients, 500) == pytest.approx(p, abs=0.1)  # a draw has whole bytes, so other ones


def test_scores_of_one_call_are_in_the_draws_of_a_call_each():
    correct, patients = clustered(np.random.default_rng(9), 25)
    score, some = mean_of(correct), mean_of(1 - correct).on(np.arange(20))
    shared = Score("other", "of the same stats", score.rows, score.stats, lambda sums: 2 * score.value(sums))
    drawn = resampled_all([score, shared, some], patients, 60)
    np.testing.assert_array_equal(drawn[id(score)], resampled([score], patients, 60)[0])
    np.testing.assert_array_equal(drawn[id(shared)], 2 * drawn[id(score)])
    np.testing.assert_array_equal(drawn[id(some)], resampled([some], patients, 60)[0])


def test_draws_that_leave_a_score_undefined_are_left_out_and_too_many_leave_no_interval():
    assert interval(np.array([np.nan] * 5 + [0.5] * 95)) == (0.5, 0.5)
    assert interval(np.array([np.nan] * 6 + [0.5] * 94)) == interval(None) == (None, None)
    wholes = np.zeros(20)
    wholes[:2] = 1  # two patients of 20 have the finding: 12 % of the draws hold none
    assert estimate(ratio_of(wholes / 2, wholes), np.arange(20)) == (0.5, None, None)
    wholes[:5] = 1  # 0.3 %
    value, low, high = estimate(ratio_of(wholes / 2, wholes), np.arange(20))
    assert value == low == high == 0.5


def test_nothing_one_patient_and_what_is_no_score():
    nothing = mean_of([])
    assert estimate(nothing, np.array([])) == difference(nothing, nothing, np.array([])) == (None, None, None)
    assert permutation(nothing, nothing, np.array([])) is None
    assert estimate(mean_of([1, 0, 1, 1]), np.array(["a"] * 4)) == (0.75, None, None)
    assert difference(mean_of([1, 1, 1]), mean_of([0, 0, 0]), np.array(["a", "b", "b"])) == (1, 1, 1)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="exact_match of row 2 is not finite"):
            estimate(mean_of([1, 0, bad, bad]), np.array(["a", "b", "c", "d"]))
    with pytest.raises(ValueError, match="different rows cannot be paired: exact_match"):
        difference(mean_of([1, 0, 1]), mean_of([1]), np.array(["a", "b", "c"]))
    with pytest.raises(ValueError, match="row 2 has a score, but there are 2 patients"):
        estimate(mean_of([1, 0, 1]), np.array(["a", "b"]))


def all_swaps(a, b, patients):
    """The p of every way to swap patients, with a loop."""
    names = sorted(set(patients))
    seen, reached = abs(a.all() - b.all()), 0
    for swapped in itertools.product([False, True], repeat=len(names)):
        swap = np.array([swapped[names.index(patient)] for patient in patients])[:, None]
        one, other = np.where(swap, b.stats, a.stats).sum(0), np.where(swap, a.stats, b.stats).sum(0)
        reached += abs(a.value(one) - b.value(other)) >= seen - 1e-12
    return reached / 2 ** len(names)


@pytest.mark.parametrize("seed", range(4))
def test_p_is_that_of_all_swaps(seed):
    rng = np.random.default_rng(seed)
    patients = rng.integers(8, size=30)
    wholes = rng.integers(1, 4, (2, 30))
    pairs = [
        tuple(mean_of((rng.random(30) < share).astype(float)) for share in (0.8, 0.5)),
        tuple(ratio_of(rng.integers(0, whole + 1), whole) for whole in wholes),
    ]
    for a, b in pairs:  # the standard error of a share of 10,000 is at most 0.005
        assert permutation(a, b, patients) == pytest.approx(all_swaps(a, b, patients), abs=0.02)


def test_p_of_a_closed_form():
    """Six patients, each right for one system alone: only the two swaps of all or none give so large a difference, p = 2 / 2**6."""
    a, b, patients = mean_of(np.ones(18)), mean_of(np.zeros(18)), np.arange(18) % 6
    assert all_swaps(a, b, patients) == 2 / 2**6
    assert permutation(a, b, patients) == permutation(b, a, patients) == pytest.approx(2 / 2**6, abs=0.006)
    assert permutation(a, a, patients) == 1.0
    many = np.arange(200)
    assert permutation(mean_of(np.ones(200)), mean_of(np.zeros(200)), many) == 1 / 10_001  # never 0


def test_p_is_even_where_there_is_no_difference():
    """Of 200 pairs of systems that are alike, about one in ten is below 0.1: the SD is 4.2 of 200."""
    rng, below = np.random.default_rng(11), 0
    for _ in range(200):
        chance, patients = clustered(rng, 30)
        a, b = (mean_of((rng.random(len(chance)) < 0.2 + 0.6 * chance).astype(float)) for _ in range(2))
        below += permutation(a, b, patients, 200) <= 0.1
    assert 7 <= below <= 35


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.2]) == [0.2] and holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]
