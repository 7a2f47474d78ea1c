"""Learning from a few labelled vectors, against scikit-learn and the papers' formulas."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression as SkLogistic
from sklearn.neighbors import KNeighborsClassifier

import clipkit
from clipkit.artifacts import ModelRef
from clipkit.classifiers.few_shot import (
    ALPHAS,
    BETAS,
    METHODS,
    Labelled,
    LogisticRegression,
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
from clipkit.cli import main
from clipkit.data.open_source import open_source
from clipkit.errors import DataError
from clipkit.tasks.probe import draw, probe
from tests.helpers.pictures import COLOURS
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
def test_logistic_regression_equals_scikit_learns(strength, count):
    data, others = sample(count, 0), sample(50, 2)
    regression = LogisticRegression(data.vectors, data.targets, CLASSES)
    weights, bias = regression.fit(strength)
    theirs = SkLogistic(C=strength, tol=1e-10, max_iter=5000).fit(
        data.vectors.astype(float), data.targets
    )
    assert len(theirs.classes_) == CLASSES
    odds = torch.softmax(torch.from_numpy(others.vectors).double() @ weights.T + bias, dim=1)
    np.testing.assert_allclose(odds, theirs.predict_proba(others.vectors.astype(float)), atol=1e-4)
    np.testing.assert_allclose(weights, theirs.coef_, atol=1e-3 * max(1, strength**0.5))
    # From whatever else was fitted before.
    regression.fit(1e5)
    again, _ = regression.fit(strength)
    np.testing.assert_allclose(again, weights, atol=1e-3 * max(1, strength**0.5))


def test_equal_examples_are_fitted_too():
    vectors = np.tile(unit_rows(1, DIM), (6, 1))
    weights, bias = LogisticRegression(vectors, np.array([0, 0, 0, 0, 1, 1]), 2).fit(10.0)
    odds = torch.softmax(torch.from_numpy(vectors[0]).double() @ weights.T + bias, dim=0)
    np.testing.assert_allclose(odds, [2 / 3, 1 / 3], atol=1e-5)
    np.testing.assert_allclose(weights, 0, atol=1e-5)


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


def test_the_held_out_part_chooses(text):
    """Of all strengths the one is taken that does best on it; none does better than captions."""
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
def test_more_shots_teach_more(text, method):
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


def test_fine_tuning_moves_the_keys_downhill(text):
    data, held_out = sample(60, 0), sample(40, 4)
    plain = METHODS["tip-adapter"](data, held_out, text)
    tuned = METHODS["tip-adapter-f"](data, held_out, text)
    assert not np.array_equal(plain.keys, tuned.keys)

    def surprise(keys):
        head = TipAdapterHead(
            text.labels, text.weights, (keys, plain.values), (1.0, 5.5), 20.0, MODEL
        )
        odds = head.probabilities(data.vectors)[np.arange(60), data.targets]
        return -np.log(odds).mean()

    assert surprise(tuned.keys) < surprise(plain.keys)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_learned_is_kept(text, method, tmp_path):
    head = METHODS[method](sample(30, 0), sample(20, 4), text)
    save_classifier(head, tmp_path / "head")
    again = open_classifier(tmp_path / "head")
    others = sample(10, 2).vectors
    np.testing.assert_array_equal(head.logits(others), again.logits(others))
    assert (again.labels, again.fingerprint) == (head.labels, head.fingerprint)


def test_a_draw_takes_so_many_of_each_and_never_the_same_twice():
    pool = sample(200, 0)
    for shots, others in ((1, 1), (3, 3), (16, 4)):
        learned, held_out = draw(pool, shots, seed=1)
        assert (np.bincount(learned.targets) == shots).all()
        assert (np.bincount(held_out.targets) == others).all()
        both = np.concatenate([learned.vectors, held_out.vectors])
        assert len(np.unique(both, axis=0)) == len(both)
    other = draw(pool, 3, seed=2)[0]
    assert not np.array_equal(other.vectors, draw(pool, 3, seed=1)[0].vectors)


@pytest.fixture
def albums(tmp_path):
    """Thirty noisy pictures of each of three colours."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "albums" / name).mkdir(parents=True)
        for number in range(30):
            noise = generator.integers(-200, 200, (16, 16, 3)) + generator.integers(-60, 60, 3)
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "albums" / name / f"{number}.png")
    return tmp_path / "albums"


def test_probing_a_model(albums, tiny_checkpoint):
    encoder = clipkit.load_model(tiny_checkpoint)
    found = probe(
        open_source(albums), encoder, shots=(8, 1, 20), methods=["linear"], seeds=3, progress=False
    )
    assert [(row.method, row.shots) for row in found.rows] == [
        ("zero-shot", 0),
        ("linear", 1),
        ("linear", 8),
    ]
    assert "20 shots are left out: of 'blue' there are 15 images" in found.notes[0]
    assert found.tested == 45
    for row in found.rows:
        assert row.accuracy.value == pytest.approx(np.mean(row.by_seed))
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high
        # As many of each class are tested on.
        assert row.mean_per_class.value == pytest.approx(row.accuracy.value)
    assert found.rows[2].accuracy.value > found.rows[0].accuracy.value
    json.dumps(found.to_dict())
    with pytest.raises(DataError, match="has 15 images of 'blue' to learn from, expected 17"):
        probe(open_source(albums), encoder, shots=(16,), progress=False)
    with pytest.raises(DataError, match="expected two or more; name a label column"):
        probe(open_source(albums / "red"), encoder, progress=False)


def test_shots_are_fitted_on_one_thread(albums, tiny_checkpoint, monkeypatch):
    """Of a few examples, threads wait for each other longer than they work."""
    seen = []
    fit = METHODS["neighbours"]
    monkeypatch.setitem(
        METHODS, "neighbours", lambda *data: (seen.append(torch.get_num_threads()), fit(*data))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encoder, source = clipkit.load_model(tiny_checkpoint), open_source(albums)
        probe(source, encoder, shots=(2,), methods=["neighbours"], seeds=3, progress=False)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert (seen, after) == ([1, 1, 1], 2)


def test_probe_on_the_command_line(albums, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed.err
        return printed.out, printed.err

    words = [albums, "--model", tiny_checkpoint, "--shots", "1,4", "--seeds", "2"]
    out, err = run("probe", *words, "--test", albums, "--save", tmp_path / "head", "--json")
    found = json.loads(out)
    assert len(found["rows"]) == 9
    assert (found["tested"], found["classes"]) == (90, 3)
    assert f"kept the {found['best']} classifier" in err
    out, _ = run("classify", albums, "--labels", tmp_path / "head", "--json")
    right = [
        one["predictions"][0]["label"] == one["key"].partition("/")[0]
        for one in map(json.loads, out.splitlines())
    ]
    zeroshot, _ = run("eval", "zeroshot", albums, "--labels", tmp_path / "head", "--json")
    assert json.loads(zeroshot)["top1"] == pytest.approx(np.mean(right))
    out, _ = run("probe", *words, "--methods", "neighbours")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == [
        "zero-shot",
        "neighbours",
        "neighbours",
    ]
    assert "expected one of linear" in run("probe", *words, "--methods", "magic", code=1)[1]
    run("probe", *words[:-4], "--shots", "0", code=2)
