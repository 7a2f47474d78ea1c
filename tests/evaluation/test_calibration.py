"""Temperature scaling against torch, softmax and calibration error against their definitions."""

import numpy as np
import pytest
import scipy.special
import torch

from clipkit.evaluation.calibration import (
    cross_fitted,
    expected_calibration_error,
    fit_logit_scale,
    reliability,
    softmax,
)


@pytest.fixture(scope="module")
def example():
    """Logits and classes of 400 items of 6 classes."""
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 6, 400).astype(np.int64)
    return generator.normal(size=(400, 6)) + 1.5 * np.eye(6)[targets], targets


def test_softmax_equals_scipys(example):
    logits, _ = example
    np.testing.assert_allclose(softmax(logits), scipy.special.softmax(logits, axis=1))
    large = softmax(np.array([[1e4, 1e4, -1e4]], np.float32))
    assert large.dtype == np.float32
    np.testing.assert_array_equal(large, [[0.5, 0.5, 0]])


def test_the_calibration_error_is_the_gap_of_its_bins(example):
    logits, targets = example
    probabilities = softmax(logits)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    wanted = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            wanted += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, correct, np.ones((1, 400)))[0] == pytest.approx(
        wanted
    )
    bins = reliability(confidence, correct)
    assert sum(one.count for one in bins) == 400
    gaps = sum(one.count * abs(one.accuracy - one.confidence) for one in bins)
    assert gaps / 400 == pytest.approx(wanted)
    assert all(one.low < one.confidence <= one.high for one in bins)


@pytest.mark.parametrize("sharpened", [0.05, 1.0, 8.0])
def test_the_fitted_scale_has_the_lowest_cross_entropy(example, sharpened):
    logits, targets = example
    found = fit_logit_scale(logits * sharpened, targets)
    tries = torch.linspace(0.97, 1.03, 61, dtype=torch.float64) * found
    values, truth = torch.from_numpy(logits * sharpened), torch.from_numpy(targets)
    losses = torch.stack([torch.nn.functional.cross_entropy(t * values, truth) for t in tries])
    assert int(losses.argmin()) == 30
    assert fit_logit_scale(logits, targets) == pytest.approx(found * sharpened, rel=1e-6)


def test_a_scale_without_an_optimum_stays_finite():
    perfect = np.eye(3)[[0, 1, 2, 0]]
    assert 20 < fit_logit_scale(perfect, np.array([0, 1, 2, 0])) <= 1e3
    assert 1e-3 <= fit_logit_scale(-perfect, np.array([0, 1, 2, 0])) < 0.05
    assert fit_logit_scale(np.zeros((4, 3)), np.array([0, 1, 2, 0])) <= 1e3


def test_cross_fitting_never_uses_the_half_of_an_item(example):
    logits, targets = example
    order = np.random.default_rng(0).permutation(400)
    changed = targets.copy()
    changed[order[:200]] = (changed[order[:200]] + 1) % 4  # the labels of the first half
    before, after = cross_fitted(logits, targets), cross_fitted(logits, changed)
    np.testing.assert_array_equal(before[order[:200]], after[order[:200]])
    assert not np.allclose(before[order[200:]], after[order[200:]])
