import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from toolkit.evaluation import agreement

NAN = np.nan


def ratings(seed, raters=3, cases=6, texts=2, missing=0.2):
    rng = np.random.default_rng(seed)
    given = np.clip(rng.integers(1, 6, (1, cases, texts)) + rng.integers(-1, 2, (raters, cases, texts)), 1, 5).astype(float)
    given[rng.random(given.shape) < missing] = NAN
    return given


def slow_alpha(given):
    """By the definition: the mean distance of two ratings of one text over that of any two ratings, the distance being of ranks."""
    units = [[int(r) for r in unit if not np.isnan(r)] for unit in given.reshape(len(given), -1).T]
    units = [unit for unit in units if len(unit) > 1]
    everything = [r for unit in units for r in unit]
    count = {level: everything.count(level) for level in range(1, 6)}

    def distance(a, b):
        a, b = min(a, b), max(a, b)
        return (sum(count[level] for level in range(a, b + 1)) - (count[a] + count[b]) / 2) ** 2

    n = len(everything)
    seen = sum(distance(a, b) / (len(unit) - 1) for unit in units for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j) / n
    chance = sum(distance(a, b) for i, a in enumerate(everything) for j, b in enumerate(everything) if i != j) / (n * (n - 1))
    return 1 - seen / chance


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.floats(0, 0.4))
def test_alpha_is_that_of_a_slow_loop_whatever_the_order(seed, raters, missing):
    given_ratings = ratings(seed, raters=raters, missing=missing)
    value = agreement.alpha(given_ratings).all()
    if not np.isnan(value):
        assert value == pytest.approx(slow_alpha(given_ratings))
        assert value <= 1
        assert agreement.alpha(given_ratings[::-1, ::-1]).all() == pytest.approx(value)


def test_alpha_is_that_of_the_package():
    krippendorff = pytest.importorskip("krippendorff", reason="pip install krippendorff (GPL, so no dependency)")
    for seed in range(20):
        given_ratings = ratings(seed)
        flat = given_ratings.reshape(len(given_ratings), -1)
        expected = krippendorff.alpha(reliability_data=flat, level_of_measurement="ordinal", value_domain=[1, 2, 3, 4, 5])
        assert agreement.alpha(given_ratings).all() == pytest.approx(expected)


def test_alpha_of_the_published_example():
    """Krippendorff (2011), section C: 4 observers, 12 units, missing data; ordinal alpha 0.815."""
    rows = [
        "1 2 3 3 2 1 4 1 2 * * *",
        "1 2 3 3 2 2 4 1 2 5 * 3",
        "* 3 3 3 2 3 4 2 2 5 1 *",
        "1 2 3 3 2 4 4 1 2 5 1 *",
    ]
    given_ratings = np.array([[NAN if r == "*" else float(r) for r in row.split()] for row in rows])[..., None]
    assert agreement.alpha(given_ratings).all() == pytest.approx(0.815, abs=5e-4)


def test_kappa_is_scikit_learns_over_the_texts_that_both_rated():
    for seed in range(20):
        given_ratings = ratings(seed, raters=2, cases=15)
        first, second = given_ratings.reshape(2, -1)
        both = ~np.isnan(first + second)
        expected = cohen_kappa_score(first[both].astype(int), second[both].astype(int), weights="quadratic", labels=[1, 2, 3, 4, 5])
        assert agreement.kappa(given_ratings).all() == pytest.approx(expected)


def test_full_agreement_is_one_and_a_constant_is_undefined():
    same = np.broadcast_to(np.array([[1.0, 2], [3, 5]]), (2, 2, 2))
    assert agreement.alpha(same).all() == agreement.kappa(same).all() == 1
    for one in (agreement.alpha, agreement.kappa):
        assert np.isnan(one(np.full((2, 4, 2), 3.0)).all())
        assert np.isnan(one(np.array([[[1.0, NAN]], [[NAN, 2.0]]])).all())  # no text that both rated


def test_the_figures_of_two_raters_and_of_three():
    given_ratings = ratings(1, raters=2, cases=40, missing=0.1)
    found = agreement.between(given_ratings)
    assert set(found) == {"alpha", "kappa"}
    for figure in found.values():
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["n"] == (~np.isnan(given_ratings.sum(0))).sum()
    assert set(agreement.between(ratings(1))) == {"alpha"}
    alone = agreement.between(given_ratings[:1])["alpha"]
    assert alone == {"value": None, "low": None, "high": None, "n": 0}


def test_a_mean_is_over_the_cases_that_have_one():
    figure = agreement.mean(np.array([1.0, NAN, 3.0, 2.0]))
    assert (figure["value"], figure["n"]) == (2, 3)
    assert 1 <= figure["low"] < 2 < figure["high"] <= 3
    assert agreement.mean(np.full(4, NAN)) == {"value": None, "low": None, "high": None, "n": 0}


def test_spearman_is_scipys_without_what_is_missing():
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 6, (2, 30, 2)).astype(float)
    y += x
    x[0, 0] = y[3, 1] = NAN
    both = ~np.isnan(x + y)
    value, low, high = agreement.spearman(x, y, n=200)
    assert value == pytest.approx(spearmanr(x[both], y[both]).statistic)
    assert low < value < high
    assert agreement.correlation(x, y)["n"] == 58
    assert agreement.spearman(np.ones((4, 1)), np.arange(4.0)[:, None]) == (None, None, None)
    assert agreement.spearman(x[:1], y[:1]) == (None, None, None)
