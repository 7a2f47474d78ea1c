"""Paired tests and comparisons, against their definitions, scipy and their promises."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from clipkit.evaluation.classification import measure_classification
from clipkit.evaluation.retrieval import measure_retrieval, relevant_pairs
from clipkit.evaluation.significance import (
    compare_classification,
    compare_retrieval,
    holm,
    sign_flip_test,
)
from tests.helpers.toys import unit_rows


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


def blurred(vectors, noise, seed):
    rows = vectors + noise * unit_rows(*vectors.shape, seed=seed)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def two_retrievals():
    """A good model and a worse one on 300 images of two captions each."""
    texts, owners = [f"caption {n}" for n in range(600)], np.repeat(np.arange(300), 2)
    related = relevant_pairs(texts, owners, "merge")
    images = unit_rows(300, 16)
    return [
        measure_retrieval(images, blurred(images[owners], noise, seed), related)
        for noise, seed in ((0.9, 5), (1.3, 6))
    ]


def test_the_better_retrieval_is_named(two_retrievals):
    (one, figures), (other, others) = two_retrievals
    headline, rows = compare_retrieval(one, other, 300)
    assert headline.p < 0.001
    assert headline.difference.high < 0
    names = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert headline.first == pytest.approx(np.mean([figures[name].value for name in names]))
    by_name = {row.name: row for row in rows}
    assert set(by_name) == set(figures)
    for name, row in by_name.items():
        assert (row.first, row.second) == (figures[name].value, others[name].value)
        assert row.difference.value == pytest.approx(row.second - row.first)
        assert (row.p is None) == name.endswith("median_rank")
    # A lower median rank is better.
    lower = by_name["image_to_text_median_rank"]
    assert (lower.difference.low > 0, lower.better, headline.better) == (True, 0, 0)
    back, again = compare_retrieval(other, one, 300)
    mirrored = [None if row.better is None else 1 - row.better for row in (back, *again)]
    assert mirrored == [row.better for row in (headline, *rows)]
    same, rows = compare_retrieval(one, one, 300)
    assert {same.better, *(row.better for row in rows)} == {None}
    assert (same.p, same.difference.low, same.difference.high) == (1, 0, 0)
    assert {row.p for row in rows} == {1, None}


def test_top1_is_compared_by_mcnemars_test():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 4, 200)
    one, other = (
        measure_classification(generator.normal(size=(200, 4)) + gain * np.eye(4)[targets], targets)
        for gain in (2.0, 1.0)
    )
    headline, rows = compare_classification(one[0], other[0])
    gained = int((other[0].correct & ~one[0].correct).sum())
    lost = int((one[0].correct & ~other[0].correct).sum())
    assert headline.p == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert headline.difference.value == pytest.approx((gained - lost) / 200)
    assert {row.name for row in rows if row.p is None} == {
        *("macro_precision", "macro_f1", "roc_auc", "ece")
    }
