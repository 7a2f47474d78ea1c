"""Few-shot classifiers, against scikit-learn and the formulas of the papers."""

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
    again = open_classifier(tmp_path / "head")
    others = sample(10, 2).vectors
    np.testing.assert_array_equal(head.logits(others), again.logits(others))
    assert (again.labels, again.fingerprint) == (head.labels, head.fingerprint)


def test_a_draw_takes_the_shots_of_each_class_without_repetition():
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
    assert [(row.method, row.shots) for row in found.results] == [
        ("zero-shot", 0),
        ("linear", 1),
        ("linear", 8),
    ]
    assert "20 shots are left out: 'blue' has 15 training images" in found.notes[0]
    assert found.tested == 45
    for row in found.results:
        assert row.accuracy.value == pytest.approx(np.mean(row.by_seed))
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high
        # As many of each class are tested on.
        assert row.mean_per_class.value == pytest.approx(row.accuracy.value)
    assert found.results[2].accuracy.value > found.results[0].accuracy.value
    json.dumps(found.to_dict())
    frame = found.to_pandas()
    assert list(frame["shots"]) == [0, 1, 8]
    assert frame["accuracy"][2] == found.results[2].accuracy.value
    assert "linear" in found._repr_html_()
    with pytest.raises(TypeError, match="methods is one string"):
        probe(albums, encoder, methods="linear", progress=False)
    with pytest.raises(DataError, match="has 15 training images of 'blue', expected 17"):
        probe(open_source(albums), encoder, shots=(16,), progress=False)
    with pytest.raises(DataError, match="expected two or more; name a label column"):
        probe(open_source(albums / "red"), encoder, progress=False)


def test_shots_are_fitted_on_one_thread(albums, tiny_checkpoint, monkeypatch):
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
    out, err = run("eval", "probe", *words, "--test", albums, "--save", tmp_path / "head", "--json")
    found = json.loads(out)
    assert len(found["rows"]) == 9
    assert (found["tested"], found["classes"]) == (90, 3)
    assert f"saved the {found['best']} classifier" in err
    out, _ = run("classify", albums, "--labels", tmp_path / "head", "--json")
    right = [
        one["predictions"][0]["label"] == one["key"].partition("/")[0]
        for one in map(json.loads, out.splitlines())
    ]
    zeroshot, _ = run("eval", "zero-shot", albums, "--labels", tmp_path / "head", "--json")
    assert json.loads(zeroshot)["top1"] == pytest.approx(np.mean(right))
    out, _ = run("eval", "probe", *words, "--methods", "neighbours")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == [
        "zero-shot",
        "neighbours",
        "neighbours",
    ]
    assert "expected one of linear" in run("eval", "probe", *words, "--methods", "magic", code=1)[1]
    run("eval", "probe", *words[:-4], "--shots", "0", code=2)
