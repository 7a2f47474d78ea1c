"""Bootstrap intervals, against resampling of values and their promised coverage."""

import math

import numpy as np
import pytest

from clipkit.evaluation.bootstrap import estimate, estimate_difference, resamples


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
