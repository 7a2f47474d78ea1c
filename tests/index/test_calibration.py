import numpy as np
import pytest

from clipkit.errors import ArtifactError
from clipkit.index.calibration import (
    Calibration,
    _balanced_error,
    _best_near_and_far,
    _fit,
    calibrate,
)
from tests.helpers.toys import unit_rows

DIM = 32


def world(match, count=600, asked=150, seed=0):
    """Images in topics, captions that lean towards their own image by ``match``, and nonsense."""
    random = np.random.default_rng(seed)
    topics = unit_rows(20, DIM, seed=5)
    images = topics[random.integers(20, size=count)] + 0.9 * unit_rows(count, DIM, seed=6)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    rows = np.sort(random.choice(count, asked, replace=False))
    captions = match * images[rows] + unit_rows(asked, DIM, seed=7)
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    return images, captions.astype(np.float32), rows, unit_rows(50, DIM, seed=8)


def made(match, size=100):
    images, captions, rows, nonsense = world(match)
    cut = range(size, len(images), size)
    return calibrate(captions, rows, nonsense, lambda: np.split(images, cut), "captions")


def test_probabilities_tell_what_is_there_from_what_is_not():
    found = made(0.7)
    assert found.informative
    assert found.auroc > 0.85
    assert found.error < 0.15
    images, captions, _, nonsense = world(0.7, seed=1)
    sure, unsure = (
        np.mean([found.probabilities(q, (images @ q).max(keepdims=True)) for q in queries])
        for queries in (captions, nonsense)
    )
    assert sure > 0.7 > 0.5 > unsure


def test_a_higher_score_is_likelier():
    found = made(0.7)
    chances = found.probabilities(unit_rows(1, DIM)[0], np.linspace(-1, 1, 9, dtype=np.float32))
    assert (np.diff(chances) > 0).all()
    assert chances[0] < 0.01 < 0.99 < chances[-1]


def test_captions_without_a_meaning_give_no_probability():
    found = made(0.0)
    assert found.auroc < 0.55
    assert not found.informative
    assert found.probabilities(unit_rows(1, DIM)[0], np.ones(3, np.float32)) is None


def test_blocks_do_not_matter():
    one, other = made(0.7, size=100), made(0.7, size=599)
    assert one.to_dict() | {"background": ""} == other.to_dict() | {"background": ""}
    np.testing.assert_allclose(one.background, other.background, atol=1e-7)


def test_the_best_near_and_far_equal_looking_at_all():
    images, captions, rows, _ = world(0.7)
    like = images @ images[rows].T
    limit = np.quantile(like, 7 / 8, axis=0)
    scores = images @ captions.T
    there, absent = _best_near_and_far(captions, rows, images, lambda: np.split(images, [7, 300]))
    for n in range(len(captions)):
        near = like[:, n] > limit[n]
        assert near.sum() == len(images) // 8
        assert near[rows[n]]
        assert there[n] == pytest.approx(scores[near, n].max(), abs=1e-6)
        assert absent[n] == pytest.approx(scores[~near, n].max(), abs=1e-6)


def test_generic_captions_stand_against_nonsense():
    images, captions, _, nonsense = world(1.5)
    found = calibrate(captions, np.empty(0, int), nonsense, lambda: [images], "generic captions")
    assert found.informative
    assert (found.captions, found.source) == (150, "generic captions")
    blind = calibrate(unit_rows(150, DIM, 9), np.empty(0, int), nonsense, lambda: [images], "")
    assert not blind.informative


def test_the_error_in_numbers_one_can_check():
    chance = np.array([0.9, 0.9, 0.9, 0.9, 0.1, 0.1])
    right = np.array([True, True, True, False, False, True])
    # Four right ones weigh 1/8 each, two wrong ones 1/4. Two bins:
    expected = abs(3 * 0.1 / 8 - 0.9 / 4) + abs(-0.1 / 4 + 0.9 / 8)
    assert _balanced_error(chance, right) == pytest.approx(expected)
    assert _balanced_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_the_fit_is_where_likelihood_is_highest():
    random = np.random.default_rng(0)
    margins = random.normal(0.3, 0.01, 400)
    right = random.random(400) < 1 / (1 + np.exp(-(300 * (margins - 0.3) + 0.5)))

    def loss(weights):
        chance = 1 / (1 + np.exp(-(weights[0] * margins + weights[1])))
        return (
            -np.log(np.where(right, chance, 1 - chance))[right].mean()
            - np.log(np.where(right, chance, 1 - chance))[~right].mean()
        )

    weights = np.array(_fit(margins, right))
    assert weights[0] == pytest.approx(300, rel=0.3)
    for move in ([20, -6], [-20, 6], [0, 0.1], [0, -0.1]):
        assert loss(weights + move) > loss(weights)


def test_it_is_kept_as_plain_data():
    found = made(0.7)
    again = Calibration.from_dict(found.to_dict(), DIM)
    np.testing.assert_array_equal(again.background, found.background)
    np.testing.assert_allclose(again.weights, found.weights, atol=1e-6)
    for damage in (
        {"weights": [1]},
        {"background": "?"},
        {"background": "AAAA"},
        {"auroc": "x"},
    ):
        with pytest.raises(ArtifactError, match="calibration in the manifest cannot be read"):
            Calibration.from_dict(found.to_dict() | damage, DIM)
