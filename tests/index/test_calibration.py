import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clipkit.errors import ArtifactError
from clipkit.index.calibration import (
    RIDGE,
    Calibration,
    _cross_fitted,
    _fit,
    _fragments,
    calibrate,
    grade_hits,
)
from clipkit.index.sample_queries import SampleQueries
from tests.helpers.toys import unit_rows

DIM = 32
TOPICS = 20


def world(match, count=600, asked=150, seed=0):
    """Images in topics with three captions each, and sample queries that lean towards their image.

    The captions of an image name its topic and its pair: images 2n and 2n + 1 are a pair.
    """
    random = np.random.default_rng(seed)
    topic = random.integers(TOPICS, size=count // 2).repeat(2)
    images = unit_rows(TOPICS, DIM, seed=5)[topic] + 0.9 * unit_rows(count, DIM, seed=6)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    words = ["".join(chr(97 + n) for n in random.integers(26, size=6)) for _ in range(2000)]
    captions = {
        row: [
            f"{words[topic[row]]} {words[100 + row // 2]} {words[1000 + row]}",
            f"{words[topic[row]]} {words[100 + row // 2]} {words[1001 + row]}",
            words[topic[row]],
        ]
        for row in range(count)
    }
    rows = np.sort(random.choice(count, asked, replace=False))
    vectors = match * images[rows] + unit_rows(asked, DIM, seed=7)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [captions[int(row)][0] for row in rows]
    nonsense = unit_rows(50, DIM, seed=8)
    queries = SampleQueries(texts, vectors.astype(np.float32), rows, nonsense, "captions")
    return images, captions, queries


def made(match, size=100, **more):
    images, captions, queries = world(match, **more)
    cut = range(size, len(images), size)
    return calibrate(queries, lambda: np.split(images, cut), reading(captions))


def reading(captions):
    """Gives the captions of rows, and of no others."""
    return lambda rows: {int(row): captions[int(row)] for row in rows}


def slow_fit(margins, targets, weights):
    """Slope and constant by scikit-learn: a soft target is a pair of weighted examples."""
    centre, scale = margins.mean(), margins.std()
    inputs = np.tile((margins - centre) / scale, 2)[:, None]
    label = np.repeat([1, 0], len(margins))
    share = np.concatenate([targets * weights, (1 - targets) * weights]) / weights.sum()
    model = LogisticRegression(C=1 / RIDGE, tol=1e-10, max_iter=10_000)
    model.fit(inputs[share > 0], label[share > 0], share[share > 0])
    slope = model.coef_[0, 0] / scale
    return slope, model.intercept_[0] - slope * centre


def test_the_fit_equals_scikit_learns():
    random = np.random.default_rng(0)
    margins, targets = random.normal(0.3, 0.01, 400), random.random(400) ** 3
    weights = random.random(400)
    found = _fit(margins, targets, weights)
    np.testing.assert_allclose(found, slow_fit(margins, targets, weights), rtol=1e-4)
    sharp = (margins > 0.3).astype(float)
    np.testing.assert_allclose(
        _fit(margins, sharp, weights), slow_fit(margins, sharp, weights), rtol=1e-3
    )


def test_fragments_of_words():
    assert _fragments("A dog.") == {" a ", " dog", "dog "}
    assert _fragments("dogs") & _fragments("Dog") == {" dog"}
    assert _fragments("?!") == set()


def slow_grades(texts, rows, hits, captions):
    """The definition, one pair at a time."""
    vocabulary = [set().union(*map(_fragments, captions[row])) for row in sorted({*rows.tolist()})]

    def weight(fragment):
        return np.log((len(rows) + 1) / max(1, sum(fragment in one for one in vocabulary)))

    def rest(n):
        return [text for text in captions[rows[n]] if text != texts[n]]

    def agreement(n, written):
        held = set().union(*map(_fragments, written[: len(rest(n))]))
        total = sum(weight(one) for one in _fragments(texts[n]))
        return sum(weight(one) for one in _fragments(texts[n]) & held) / total

    own = np.array([agreement(n, rest(n)) for n in range(len(rows))])

    def grade(value):
        return min(1, 2 * np.mean(own <= value + 1e-9))

    other = np.random.default_rng(0).permutation(len(rows))
    random = np.mean([grade(agreement(n, rest(m))) for n, m in enumerate(other) if m != n])
    trust = 1 - random / np.mean([grade(value) for value in own])
    return [
        [1 if hit == row else trust * grade(agreement(n, captions[hit])) for hit in line]
        for n, (row, line) in enumerate(zip(rows, hits, strict=True))
    ]


def test_grades_equal_their_definition():
    _, captions, queries = world(0.7)
    # Its own image, the other one of the pair, and any.
    hits = np.stack([queries.rows, queries.rows ^ 1, (queries.rows + 77) % 600], axis=1)
    grades, how = grade_hits(queries.texts, queries.rows, hits, captions)
    assert how == "other images graded by their captions"
    np.testing.assert_allclose(
        grades, slow_grades(queries.texts, queries.rows, hits, captions), atol=1e-9
    )
    assert (grades[:, 0] == 1).all()
    assert grades[:, 1].mean() > 0.5 > 0.1 > grades[:, 2].mean()


def test_captions_that_say_nothing_vouch_for_no_other_image():
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + n) for n in random.integers(26, size=5)) for _ in range(40)]
    captions = {row: [" ".join(random.choice(words, 4)) for _ in range(3)] for row in range(200)}
    rows = np.arange(100)
    hits = np.stack([rows, rows + 100, rows + 50], axis=1)
    grades, _ = grade_hits([captions[row][0] for row in range(100)], rows, hits, captions)
    assert (grades[:, 0] == 1).all()
    assert grades[:, 1:].mean() < 0.1


def test_a_single_caption_matches_an_image_whose_caption_holds_all_of_it():
    captions = {row: [f"number{row} photo"] for row in range(60)}
    captions[60] = ["a photo of number7"]
    rows = np.arange(60)
    hits = np.stack([rows, np.full(60, 60)], axis=1)
    grades, how = grade_hits([captions[row][0] for row in range(60)], rows, hits, captions)
    assert how == "other images rarely match"
    np.testing.assert_array_equal(grades[:, 0], 1)
    np.testing.assert_array_equal(grades[:, 1], rows == 7)


def test_probabilities_equal_a_slow_fit_on_queries_with_and_without_their_image():
    images, captions, queries = world(0.7)
    found = made(0.7)
    background = images.mean(0)
    margins, grades, best, any_match = [], [], [], []
    for left_out in (False, True):
        for text, vector, row in zip(queries.texts, queries.captions, queries.rows, strict=True):
            scores = images @ vector
            if left_out:
                scores[row] = -np.inf
            top = np.argsort(-scores)[:10]
            margins += (scores[top] - vector @ background).tolist()
            grades.append((text, row, top))
    lines = np.array([top for _, _, top in grades])
    half = grade_hits(queries.texts, queries.rows, lines[:150], captions)[0]
    other = grade_hits(queries.texts, queries.rows, lines[150:], captions)[0]
    targets = np.concatenate([half, other])
    weights = np.tile(1 / np.arange(1, 11), 300)
    expected = slow_fit(np.array(margins), targets.ravel(), weights)
    np.testing.assert_allclose((found.hit.slope, found.hit.constant), expected, rtol=1e-3)
    noise = np.array([(images @ one).max() - one @ background for one in queries.nonsense])
    best = np.concatenate([np.reshape(margins, (300, 10))[:, 0], noise])
    any_match = np.concatenate([targets.max(axis=1), np.zeros(50)])
    weights = np.repeat([0.5 / 150, 0.25 / 150, 0.25 / 50], [150, 150, 50])
    expected = slow_fit(best, any_match, weights)
    fitted = found.any_match.slope, found.any_match.constant
    np.testing.assert_allclose(fitted, expected, rtol=1e-3)
    assert found.noise == pytest.approx(np.quantile(noise, 0.95))


def test_the_check_uses_fits_that_have_not_seen_a_query():
    random = np.random.default_rng(1)
    margins, numbers = random.normal(size=500), np.arange(500) % 100
    targets = (random.random(500) < 1 / (1 + np.exp(-2 * margins))).astype(float)
    weights = random.random(500)
    found = _cross_fitted(margins, targets, weights, numbers)
    chance = np.empty(500)
    for fold in range(5):
        seen = numbers % 5 != fold
        slope, constant = slow_fit(margins[seen], targets[seen], weights[seen])
        chance[~seen] = 1 / (1 + np.exp(-(slope * margins[~seen] + constant)))
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (chance > low) & (chance <= low + 1 / 15)
        error += abs((weights * (targets - chance))[inside].sum()) / weights.sum()
    assert found.error == pytest.approx(error, abs=1e-4)
    gaps = [
        abs(one.accuracy - one.confidence)
        * weights[(chance > one.low) & (chance <= one.high)].sum()
        for one in found.reliability
    ]
    assert sum(gaps) / weights.sum() == pytest.approx(error, abs=1e-4)


def test_probabilities_hold_on_other_captions_with_and_without_their_image():
    found = made(0.7)
    assert found.informative
    images, captions, queries = world(0.7)
    random = np.random.default_rng(3)
    rows = np.setdiff1d(np.arange(600), queries.rows)
    vectors = 0.7 * images[rows] + unit_rows(len(rows), DIM, seed=30)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [captions[int(row)][int(random.integers(2))] for row in rows]
    gaps = []
    for left_out in (False, True):  # half of all queries each, as in the fit
        scores = vectors @ images.T
        if left_out:
            scores[np.arange(len(rows)), rows] = -1
        best = np.argsort(-scores, axis=1)[:, :1]
        true = grade_hits(texts, rows, best, captions)[0][:, 0]
        top = np.take_along_axis(scores, best, axis=1).astype(np.float32)
        stated = [
            found.assess(query.astype(np.float32), own).probabilities[0]
            for query, own in zip(vectors, top, strict=True)
        ]
        gaps.append(np.mean(stated) - true.mean())
    assert abs(np.mean(gaps)) < 0.1


def test_a_higher_score_is_likelier_and_a_hit_no_likelier_than_any():
    found = made(0.7)
    query = unit_rows(1, DIM)[0]
    scores = np.linspace(1, -1, 9, dtype=np.float32)
    chances = found.assess(query, scores).probabilities
    assert (np.diff(chances) < 0).all()
    assert chances[0] > 0.95 > 0.01 > chances[-1]
    margin = 0.4 - float(query @ found.background)
    both = float(found.hit(np.float64(margin))), float(found.any_match(np.float64(margin)))
    one = found.assess(query, np.array([0.4], np.float32))
    assert one.probabilities[0] == pytest.approx(min(both))
    assert one.any_match == pytest.approx(both[1])
    assert one.matched == (both[1] >= 0.5)
    assert not found.assess(query, np.array([-1], np.float32)).matched
    assert found.assess(query, np.empty(0, np.float32)).any_match is None


def test_random_words_have_no_good_match():
    images, _, queries = world(0.7)
    found = made(0.7)
    matched = [
        found.assess(one, np.sort(images @ one)[::-1][:10].astype(np.float32)).matched
        for one in queries.nonsense
    ]
    assert np.mean(matched) < 0.2


def test_scores_without_a_meaning_give_no_probability():
    found = made(0.0)
    assert found.auroc < 0.6
    assert not found.informative
    assert not found.gives_probabilities
    nothing = found.assess(unit_rows(1, DIM)[0], np.ones(3, np.float32))
    assert (nothing.probabilities, nothing.any_match, nothing.matched) == (None, None, None)


def test_blocks_do_not_matter():
    one, other = made(0.7, size=100), made(0.7, size=599)
    assert one.to_dict() | {"background": ""} == other.to_dict() | {"background": ""}
    np.testing.assert_allclose(one.background, other.background, atol=1e-7)


def test_fewer_images_than_hits_that_are_graded():
    images, captions, queries = world(0.7)
    images, few = images[:6], queries.rows < 6
    few[:3] = True
    rows = np.arange(few.sum()) % 6
    texts = [captions[row][0] for row in rows]
    queries = SampleQueries(texts, queries.captions[few], rows, queries.nonsense, "captions")
    found = calibrate(queries, lambda: [images], reading(captions))
    # Each query has five hits with its own image, and the five others without it.
    assert sum(one.count for one in found.hit.reliability) == 2 * 5 * len(rows)
    weights = 1 / np.arange(1, 6)
    scores = images @ queries.captions.T
    own = [(np.argsort(-scores[:, n]) == row).argmax() for n, row in enumerate(rows)]
    matching = sum(weights[rank] for rank in own if rank < 5) / (2 * len(rows) * weights.sum())
    observed = np.average(
        [one.accuracy for one in found.hit.reliability],
        weights=[one.count for one in found.hit.reliability],
    )
    assert observed == pytest.approx(matching, abs=0.1)


def test_without_captions_a_search_only_says_that_random_words_score_as_high():
    images, _, queries = world(1.5)
    generic = SampleQueries(
        queries.texts, queries.captions, np.empty(0, int), queries.nonsense, "generic captions"
    )
    found = calibrate(generic, lambda: [images], lambda rows: {})
    assert found.informative
    assert not found.gives_probabilities
    assert (found.captions, found.source) == (150, "generic captions")
    query = queries.captions[0]
    at = float(query @ found.background) + found.noise
    below = found.assess(query, np.array([at - 0.01], np.float32))
    above = found.assess(query, np.array([at + 0.01], np.float32))
    assert (below.probabilities, below.any_match, below.matched) == (None, None, False)
    assert (above.probabilities, above.any_match, above.matched) == (None, None, None)


def test_it_is_kept_as_plain_data():
    found = made(0.7)
    again = Calibration.from_dict(found.to_dict(), DIM)
    np.testing.assert_array_equal(again.background, found.background)
    assert again.to_dict() == found.to_dict()
    for one, other in zip(again.hit.reliability, found.hit.reliability, strict=True):
        assert vars(one) == pytest.approx(vars(other), abs=1e-4)
    assert again.hit.slope == pytest.approx(found.hit.slope, abs=1e-6)
    bare = Calibration(found.background, 0.9, 0.2, 240, "generic captions")
    assert Calibration.from_dict(bare.to_dict(), DIM).to_dict() == bare.to_dict()
    for damage in (
        {"hit": [1]},
        {"hit": {"slope": 1}},
        {"background": "?"},
        {"background": "AAAA"},
        {"auroc": "x"},
    ):
        with pytest.raises(ArtifactError, match="the calibration in the manifest of x cannot be"):
            Calibration.from_dict(found.to_dict() | damage, DIM, "x")


def test_the_calibration_of_an_older_clipkit_is_refused():
    old = {"background": "", "weights": [9, -5], "auroc": 0.9, "error": 0.1, "captions": 1}
    with pytest.raises(ArtifactError, match="too high; run `clipkit index calibrate x` again"):
        Calibration.from_dict(old, DIM, "x")
