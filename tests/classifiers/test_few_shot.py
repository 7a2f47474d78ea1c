"""Few-shot classifiers, against scikit-learn and the formulas of the papers."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as SkLogistic
from sklearn.neighbors import KNeighborsClassifier

from clipkit.artifacts import ModelRef
from clipkit.classifiers.few_shot import (
    ALPHAS,
    BETAS,
    METHODS,
    Labelled,
    accuracy,
)
from clipkit.classifiers.heads import (
    NeighbourHead,
    TipAdapterHead,
    one_hot,
    open_classifier,
    save_classifier,
)
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from tests.helpers.toys import unit_rows

DIM, CLASSES = 16, 5
MODEL = ModelRef("toy", "", "toy", DIM)


def sample(count, seed, noise=1.0):
    """Vectors about a centre for each class."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, CLASSES, count).astype(np.int64)
    vectors = unit_rows(CLASSES, DIM)[targets] + noise * unit_rows(count, DIM, seed=seed + 1)
    return Labelled(
        (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), targets
    )


@pytest.fixture(scope="module")
def text():
    """Captions that say a little about the classes."""
    rows = unit_rows(CLASSES, DIM) + 1.2 * unit_rows(CLASSES, DIM, seed=9)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return ZeroShotClassifier([f"class {n}" for n in range(CLASSES)], rows, 20.0, MODEL)


@pytest.mark.parametrize("count", [9, 60], ids=["fewer than dimensions", "more"])
@pytest.mark.parametrize("strength", [0.1, 10.0, 1e3])
def test_logistic_regression_minimises_the_penalised_cross_entropy(
    text, strength, count, monkeypatch
):
    data, others = sample(count, 0), sample(50, 2)
    monkeypatch.setattr("clipkit.classifiers.few_shot.STRENGTHS", (strength,))
    head = METHODS["linear"](data, others, text)
    weights = torch.from_numpy(head.weights).double().requires_grad_()
    bias = torch.from_numpy(head.bias).double().requires_grad_()
    logits = torch.from_numpy(data.vectors).double() @ weights.T + bias
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.targets))
    (losses + weights.square().sum() / (2 * strength * count)).backward()
    assert weights.grad.abs().max() < 2e-5
    assert bias.grad.abs().max() < 2e-5
    theirs = SkLogistic(C=strength, tol=1e-10, max_iter=5000)
    theirs.fit(data.vectors.astype(float), data.targets)
    assert len(theirs.classes_) == CLASSES
    wanted = theirs.predict_proba(others.vectors.astype(float))
    np.testing.assert_allclose(head.probabilities(others.vectors), wanted, atol=2e-3)


def test_two_classes_are_fitted_too():
    two = ZeroShotClassifier(["a", "b"], unit_rows(2, DIM), 20.0, MODEL)
    data = sample(60, 0)
    data = Labelled(data.vectors, data.targets % 2)
    head = METHODS["linear"](data, data, two)
    assert head.weights.shape == (2, DIM)
    assert accuracy(head, data) > 0.8


@pytest.mark.parametrize("k", [1, 3, 60])
def test_neighbours_equal_scikit_learns(text, k):
    data, others = sample(60, 0), sample(50, 2)
    head = NeighbourHead(text.labels, data.vectors, one_hot(data.targets, CLASSES), k, MODEL)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(data.vectors.astype(float), data.targets)
    wanted = theirs.predict_proba(others.vectors.astype(float))
    np.testing.assert_allclose(head.probabilities(others.vectors), wanted, atol=1e-4)


def test_tip_adapter_is_its_formula(text):
    data, others = sample(10, 0), sample(6, 2)
    values = one_hot(data.targets, CLASSES)
    head = TipAdapterHead(
        text.labels, text.weights, (data.vectors, values), (1.5, 4.0), 20.0, MODEL
    )
    wanted = np.zeros((6, CLASSES))
    for i, vector in enumerate(others.vectors.astype(float)):
        for c in range(CLASSES):
            wanted[i, c] = 20.0 * vector @ text.weights[c]
        for key, target in zip(data.vectors, data.targets, strict=True):
            wanted[i, target] += 1.5 * np.exp(-4.0 * (1 - vector @ key))
    np.testing.assert_allclose(head.logits(others.vectors), wanted, rtol=1e-4, atol=1e-4)


def test_the_held_out_part_chooses_the_hyperparameters(text):
    data, held_out = sample(20, 0), sample(40, 4)
    head = METHODS["tip-adapter"](data, held_out, text)
    values = one_hot(data.targets, CLASSES)
    tried = [
        accuracy(
            TipAdapterHead(
                text.labels, text.weights, (data.vectors, values), (alpha, beta), 20.0, MODEL
            ),
            held_out,
        )
        for alpha in ALPHAS
        for beta in BETAS
    ]
    assert accuracy(head, held_out) == max(tried)
    assert max(tried) >= accuracy(text, held_out)


@pytest.mark.parametrize("method", METHODS)
def test_more_shots_give_a_higher_accuracy(text, method):
    held_out, tested = sample(40, 4), sample(400, 6)
    few, many = (
        np.mean(
            [
                accuracy(METHODS[method](sample(count, seed), held_out, text), tested)
                for seed in range(20, 50, 10)
            ]
        )
        for count in (5, 200)
    )
    assert many > few + 0.02
    assert many > accuracy(text, tested)


def test_fine_tuning_lowers_the_cross_entropy(text):
    data, held_out = sample(60, 0), sample(40, 4)
    plain = METHODS["tip-adapter"](data, held_out, text)
    tuned = METHODS["tip-adapter-f"](data, held_out, text)
    assert not np.array_equal(plain.keys, tuned.keys)

    def nll(keys):
        head = TipAdapterHead(
            text.labels, text.weights, (keys, plain.values), (1.0, 5.5), 20.0, MODEL
        )
        odds = head.probabilities(data.vectors)[np.arange(60), data.targets]
        return -np.log(odds).mean()

    assert nll(tuned.keys) < nll(plain.keys)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_head_gives_the_same_logits(text, method, tmp_path):
    head = METHODS[method](sample(30, 0), sample(20, 4), text)
    save_classifier(head, tmp_path / "head")
    again = open_classifier(str(tmp_path / "head"))
    others = sample(10, 2).vectors
    np.testing.assert_array_equal(head.logits(others), again.logits(others))
    assert (again.labels, again.fingerprint) == (head.labels, head.fingerprint)
