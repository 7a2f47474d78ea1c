"""Error bars and paired tests, against their definitions and their promises."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import permutation_test

from clipkit.evaluation.bootstrap import estimate, estimate_difference, resamples
from clipkit.evaluation.significance import holm, sign_flip_test


def mean_of(values):
    return lambda weights: {"mean": weights @ values / weights.sum(axis=1)}


def test_a_resample_draws_as_many_items():
    weights = np.concatenate(list(resamples(7, seed=0, count=500)))
    assert weights.shape == (500, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.2)
    assert weights.var() == pytest.approx(1 - 1 / 7, abs=0.1)  # of a binomial count


def test_the_interval_equals_that_of_resampling_values():
    values = np.random.default_rng(0).exponential(size=200)
    found = estimate(mean_of(values), 200)["mean"]
    generator = np.random.default_rng(5)
    means = [generator.choice(values, 200).mean() for _ in range(4000)]
    assert found.value == pytest.approx(values.mean())
    width = np.quantile(means, 0.975) - np.quantile(means, 0.025)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.1 * width)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.1 * width)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for number in range(200):
        values = (generator.random(150) < 0.3).astype(float)
        found = estimate(mean_of(values), 150, seed=number)["mean"]
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 199  # 95 % of 200 is 190, its standard deviation 3


def test_the_block_size_of_resamples_does_not_change_the_interval(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = estimate(mean_of(values), 50)["mean"]
    monkeypatch.setattr("clipkit.evaluation.bootstrap._NUMBERS", 640)
    parts = list(resamples(50, 0))
    assert max(map(len, parts)) == 12
    assert sum(map(len, parts)) == 1000
    assert estimate(mean_of(values), 50)["mean"] == pytest.approx(whole)


def test_resamples_without_a_value_are_left_out_of_the_interval():
    def odd(weights):
        return {"odd": np.where(weights[:, 0] > 0, 1.0, np.nan)}

    found = estimate(odd, 5)["odd"]
    assert (found.low, found.high) == (1, 1)
    nothing = estimate(lambda weights: {"no": np.full(len(weights), np.nan)}, 5)["no"]
    assert math.isnan(nothing.low)


def test_a_paired_difference_has_a_narrower_interval():
    generator = np.random.default_rng(0)
    hard = generator.normal(size=300)
    one, other = hard + 0.1 * generator.normal(size=300), hard + 0.1
    found = estimate_difference(mean_of(one), mean_of(other), 300)["mean"]
    assert found.value == pytest.approx(other.mean() - one.mean())
    assert found.low < 0.1 < found.high
    apart = estimate(mean_of(one), 300)["mean"]
    assert found.high - found.low < 0.2 * (apart.high - apart.low)


def mcnemar(better, worse):
    """The exact test, as the sum over all outcomes of fair coins."""
    count, least = better + worse, min(better, worse)
    return min(1, 2 * sum(math.comb(count, k) for k in range(least + 1)) / 2**count)


def test_differences_of_one_size_are_tested_exactly():
    for better, worse in ((0, 0), (5, 0), (3, 3), (9, 2), (1, 12)):
        differences = np.repeat([0.25, -0.25, 0.0], [better, worse, 4])
        assert sign_flip_test(differences) == pytest.approx(mcnemar(better, worse))
    many = np.repeat([1.0, -1.0], [5000, 4000])
    assert sign_flip_test(many) == pytest.approx(4.4e-26, rel=0.1)  # by the normal approximation


def test_the_sign_flip_test_agrees_with_scipys_permutation_test():
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.2, 0.5):
        differences = generator.normal(size=60) + shift
        theirs = permutation_test(
            (differences,),
            lambda x, axis: x.sum(axis),
            permutation_type="samples",
            n_resamples=20_000,
            rng=np.random.default_rng(1),
        )
        assert sign_flip_test(differences) == pytest.approx(theirs.pvalue, abs=0.015)


def test_the_sign_flip_test_counts_all_signs():
    differences = np.array([0.5, -0.2, 0.9, 0.1, 0.0, 0.4, 0.3])
    moved = differences[differences != 0]
    sums = [abs(np.dot(signs, moved)) for signs in product((-1, 1), repeat=len(moved))]
    wanted = np.mean(np.array(sums) >= abs(moved.sum()) - 1e-9)
    assert sign_flip_test(differences) == pytest.approx(wanted, abs=0.01)
    assert sign_flip_test(np.zeros(4)) == 1


def test_equal_models_are_significantly_different_as_rarely_as_promised():
    generator = np.random.default_rng(0)
    found = [sign_flip_test(generator.normal(size=40), seed=i) for i in range(100)]
    assert 1 <= sum(p < 0.05 for p in found) <= 11  # 5 of 100, whose standard deviation is 2.2


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == {
        "a": pytest.approx(0.04),
        "b": pytest.approx(0.09),
        "c": pytest.approx(0.09),
        "d": pytest.approx(0.5),
    }
