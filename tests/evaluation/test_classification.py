"""Every classification metric against scikit-learn, or by hand if it has no such metric."""

import numpy as np
import pytest
from sklearn import metrics as sk

from clipkit.evaluation.calibration import softmax
from clipkit.evaluation.classification import (
    ClassificationResult,
    auroc,
    classification_metrics,
    per_class,
    sums_per_item,
)


@pytest.fixture(scope="module")
def example():
    """400 items of 6 classes, none of class 4; a classifier that is often correct."""
    generator = np.random.default_rng(0)
    targets = generator.choice([0, 0, 0, 1, 2, 3, 5], 400).astype(np.int64)
    logits = generator.normal(size=(400, 6)) + 1.5 * np.eye(6)[targets]
    return logits, softmax(logits), targets


def metrics(probabilities, targets, weights=None):
    result = ClassificationResult.from_probabilities(probabilities, targets)
    weights = np.ones((1, len(targets))) if weights is None else weights
    return {name: value.tolist() for name, value in classification_metrics(result, weights).items()}


def test_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.4, 0.1]], np.float32)
    found = metrics(probabilities, np.array([0, 1, 1]))
    assert found["top1"] == [pytest.approx(1 / 3)]
    assert found["mean_per_class"] == [0.5]
    assert found["macro_precision"] == [0.25]  # one of two predictions of 0 is correct
    assert "top5" not in found


def test_ties_count_against_the_model():
    found = metrics(np.full((10, 5), 0.2, np.float32), np.arange(10) % 5)
    assert (found["top1"], found["top5"], found["roc_auc"]) == ([0], [1], [0.5])


def test_metrics_equal_those_of_scikit_learn(example):
    _, probabilities, targets = example
    predictions = probabilities.argmax(axis=1)
    present = np.unique(targets)
    found = metrics(probabilities, targets)
    several = {"labels": present, "average": "macro", "zero_division": 0}
    areas = [sk.roc_auc_score(targets == c, probabilities[:, c]) for c in present]
    with pytest.warns(UserWarning, match="classes not in y_true"):
        balanced = sk.balanced_accuracy_score(targets, predictions)
    wanted = {
        "top1": sk.accuracy_score(targets, predictions),
        "top5": sk.top_k_accuracy_score(targets, probabilities, k=5, labels=np.arange(6)),
        "mean_per_class": balanced,
        "macro_precision": sk.precision_score(targets, predictions, **several),
        "macro_f1": sk.f1_score(targets, predictions, **several),
        "roc_auc": np.mean(areas),
        "nll": sk.log_loss(targets, probabilities, labels=np.arange(6)),
    }
    for name, value in wanted.items():
        assert found[name] == [pytest.approx(value, abs=1e-6)], name
    one = ClassificationResult.from_probabilities(probabilities, targets)
    np.testing.assert_allclose(one.auroc[present], areas, atol=1e-12)
    assert np.isnan(one.auroc[4])
    matrix = sk.confusion_matrix(targets, predictions, labels=np.arange(6))
    np.testing.assert_array_equal(one.confusion, matrix)
    recall, precision, f1 = (row[0] for row in per_class(one, np.ones((1, 400))))
    by_class = sk.precision_recall_fscore_support(
        targets, predictions, labels=present, zero_division=0
    )
    np.testing.assert_allclose(precision[present], by_class[0])
    np.testing.assert_allclose(recall[present], by_class[1])
    np.testing.assert_allclose(f1[present], by_class[2])
    assert np.isnan([recall[4], precision[4], f1[4]]).all()


def test_weighted_metrics_equal_those_of_repeated_items(example):
    _, probabilities, targets = example
    weights = np.random.default_rng(1).integers(0, 4, (3, 400))
    found = metrics(probabilities, targets, weights.astype(float))
    for row, counts in enumerate(weights):
        again = np.repeat(np.arange(400), counts)
        wanted = metrics(probabilities[again], targets[again])
        for name in found:
            # The area is taken to first order, which is off by the square of the change.
            tolerance = 0.004 if name == "roc_auc" else 1e-9
            assert found[name][row] == pytest.approx(wanted[name][0], abs=tolerance), name


def test_auroc_equals_scikit_learns():
    generator = np.random.default_rng(0)
    positive, negative = generator.integers(0, 9, 40) + 2, generator.integers(0, 9, 70)
    truth = np.repeat([1, 0], [40, 70])
    wanted = sk.roc_auc_score(truth, np.concatenate([positive, negative]))
    assert auroc(positive, negative) == pytest.approx(wanted)


def test_ties_count_half_in_the_area(example):
    _, probabilities, targets = example
    coarse = np.round(probabilities, 1)
    areas = [sk.roc_auc_score(targets == c, coarse[:, c]) for c in np.unique(targets)]
    assert metrics(coarse, targets)["roc_auc"] == [pytest.approx(np.mean(areas))]


def test_sums_per_item_add_up_to_the_metrics(example):
    _, probabilities, targets = example
    found = metrics(probabilities, targets)
    sums = sums_per_item(ClassificationResult.from_probabilities(probabilities, targets))
    assert sums["top1"].mean() == pytest.approx(found["top1"][0])
    assert sums["nll"].mean() == pytest.approx(found["nll"][0])
    assert sums["mean_per_class"].sum() / 5 == pytest.approx(found["mean_per_class"][0])


def test_auroc_equals_comparing_all_pairs():
    random = np.random.default_rng(0)
    one, other = random.integers(0, 9, 40) / 8, random.integers(0, 7, 30) / 8
    pairs = (one[:, None] > other) + 0.5 * (one[:, None] == other)
    assert auroc(one, other) == pytest.approx(pairs.mean())
