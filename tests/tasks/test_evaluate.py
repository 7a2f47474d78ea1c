"""Measuring a model: captions shared by images, copies, labels without images, comparisons."""

import html
import json
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

import clipkit
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.cli import main
from clipkit.config import parse_config
from clipkit.data.open_source import open_source
from clipkit.errors import CaptionError, DataError, ModelMismatchError
from clipkit.evaluation.classification import measure_classification
from clipkit.evaluation.retrieval import measure_retrieval, relevant_pairs
from clipkit.evaluation.significance import compare_classification, compare_retrieval
from clipkit.models.checkpoint import save_checkpoint
from clipkit.tasks.compare import compare
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model
from tests.helpers.pictures import COLOURS
from tests.helpers.toys import unit_rows

LABELS = list(COLOURS)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return clipkit.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Another model of the same shape."""
    path = tmp_path_factory.mktemp("stranger") / "step-1"
    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=1)
    save_checkpoint(path, towers, {"step": 1}, {"step": 1})
    return clipkit.load_model(path)


@pytest.fixture
def albums(tmp_path):
    """Thirty pictures of three colours in class folders."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "albums" / name).mkdir(parents=True)
        for number in range(10):
            noise = generator.integers(-90, 90, (16, 16, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "albums" / name / f"{number}.png")
    return tmp_path / "albums"


def test_captions_that_differ_in_case_and_spaces_are_merged():
    texts = ["A dog", "a  dog", "a cat", "A CAT", "a dog"]
    owners = np.array([0, 0, 0, 1, 2])
    merged = relevant_pairs(texts, owners, "merge")
    assert merged.captions.tolist() == [0, 2]
    assert merged.distinct == 2
    pairs = list(zip(merged.image_of.tolist(), merged.caption_of.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 1), (2, 0)]
    apart = relevant_pairs(texts, owners, "apart")
    assert apart.captions.tolist() == apart.caption_of.tolist() == [0, 1, 2, 3, 4]
    assert apart.image_of.tolist() == owners.tolist()


def test_another_image_with_the_same_caption_is_relevant_unless_kept_apart(encoder, colour_folder):
    source = open_source(colour_folder)  # "a red picture" stands beside four images
    merged = evaluate_retrieval(source, encoder, progress=False)
    apart = evaluate_retrieval(source, encoder, equal_captions="apart", progress=False)
    assert merged.counts["equal_captions"] == apart.counts["equal_captions"] == 9
    assert merged.outcome.captions == ["a blue picture", "a green picture", "a red picture"]
    assert len(apart.outcome.captions) == 12
    assert "all of its images are relevant" in merged.notes[0]
    assert "the other images count as wrong" in apart.notes[0]
    # Four equal captions tie, so none of their images is ever ranked first alone.
    assert apart.metrics["image_to_text_r1"] == 0
    assert merged.metrics["image_to_text_r1"] > 0
    vectors = encoder.encode_text(merged.outcome.captions)
    images = encoder.encode_images(
        [Image.open(colour_folder / key).convert("RGB") for key in merged.outcome.keys]
    )
    best = (images @ vectors.T).argmax(axis=1)
    right = [
        merged.outcome.captions[caption].split()[1] in key
        for caption, key in zip(best, merged.outcome.keys, strict=True)
    ]
    assert merged.metrics["image_to_text_r1"] == pytest.approx(np.mean(right))
    assert merged.to_dict()["settings"] == {"equal_captions": "merge"}


def test_duplicates_in_the_gallery_are_noted_and_tie(encoder, colour_folder):
    for number in range(3):
        (colour_folder / f"copy-{number}.png").write_bytes(
            (colour_folder / "red-0.png").read_bytes()
        )
        (colour_folder / f"copy-{number}.txt").write_text(f"copy number {number}")
    report = evaluate_retrieval(open_source(colour_folder), encoder, progress=False)
    assert report.counts["equal_images"] == 3
    assert "images with the same vector as an earlier one: 3" in report.notes[1]
    asked = [report.outcome.captions.index(f"copy number {number}") for number in range(3)]
    found = report.outcome.results["text_to_image"]
    assert (found.ranks[np.isin(found.queries, asked)] >= 3).all()


def test_caption_files_without_an_image_are_noted(encoder, colour_folder):
    (colour_folder / "red-0.png").unlink()
    (colour_folder / "deep").mkdir()
    (colour_folder / "deep" / "notes.txt").write_text("no image lies here")
    report = evaluate_retrieval(open_source(colour_folder), encoder, progress=False)
    assert report.notes[0] == (
        "caption files without an image, which are not queries: 1 (red-0.txt)"
    )
    assert report.counts["images"] == 11
    table = colour_folder / "t.csv"
    table.write_text("filepath,caption\nred-1.png,one\nblue-1.png,two\nred-0.png,three\n")
    report = evaluate_retrieval(open_source(table), encoder, progress=False)
    assert [item.key for item in report.skipped] == ["red-0.png"]
    assert "cannot be opened" in report.skipped[0].reason
    assert report.outcome.captions == ["one", "two"]


def test_labels_without_images_and_images_without_a_label_are_noted(encoder, albums):
    table = albums / "t.csv"
    rows = [f"{label}/{number}.png,{label}" for label in LABELS for number in range(10)]
    table.write_text(
        "\n".join(["filepath,label", *rows, "red/3.png,"]).replace("red/0.png,red", "red/0.png,")
    )
    labels = [*LABELS, "yellow", "grey"]
    report = evaluate_zero_shot(open_source(table), encoder, labels, progress=False)
    assert [item.reason for item in report.skipped] == ["has no label"]
    assert report.notes[0].startswith("labels without an image: 2 of 5 (yellow, grey)")
    assert (report.counts["images"], report.counts["classes"]) == (29, 5)
    with pytest.raises(DataError, match=r"not among --labels: blue \(1 in all\)"):
        evaluate_zero_shot(open_source(albums), encoder, ["red", "green"], progress=False)
    with pytest.raises(DataError, match="has no labels; expected one folder per class"):
        evaluate_zero_shot(open_source(albums / "red"), encoder, LABELS, progress=False)


def test_zero_shot_metrics_are_those_of_the_logits(encoder, albums):
    report = evaluate_zero_shot(open_source(albums), encoder, LABELS, progress=False)
    classifier = ZeroShotClassifier.from_labels(encoder, LABELS)
    images = [Image.open(albums / key).convert("RGB") for key in report.outcome.keys]
    logits = classifier.logits(encoder.encode_images(images))
    targets = np.repeat([LABELS.index(name) for name in sorted(LABELS)], 10)
    _, figures, fitted = measure_classification(logits, targets)
    assert report.metrics == pytest.approx({n: e.value for n, e in figures.items()}, abs=1e-5)
    assert report.outcome.fitted == pytest.approx(fitted, rel=1e-3)
    assert report.outcome.logit_scale == pytest.approx(encoder.logit_scale)
    # The fitted scale has a lower NLL on items that it was not fitted on.
    assert report.metrics["nll_fitted"] < report.metrics["nll"]
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_single_class_has_no_roc_curve(encoder, albums):
    source = open_source(albums / "red" / "0.png")
    from dataclasses import replace

    source = replace(source, rows=source.rows.map(lambda row: {**row, "label": "red"}))
    report = evaluate_zero_shot(source, encoder, LABELS, progress=False)
    assert report.to_dict()["roc_auc"] is None
    assert report.outcome.fitted is None
    assert "ece_fitted" not in report.metrics


def test_a_classifier_of_another_model_is_refused(encoder, stranger, albums):
    classifier = ZeroShotClassifier.from_labels(stranger, LABELS)
    with pytest.raises(ModelMismatchError, match="the classifier was made by"):
        evaluate_zero_shot(open_source(albums), encoder, classifier, progress=False)


# Comparing


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


def test_a_verdict_agrees_with_the_numbers(encoder, stranger, albums, colour_folder):
    source, names = open_source(colour_folder), ("a", "b")
    same = compare(encoder, encoder, source, names=names, progress=False)
    assert same.better is None
    assert same.verdict.startswith("no significant difference: mean_recall is")
    labelled = open_source(albums)
    found = compare(encoder, stranger, labelled, labels=LABELS, names=names, progress=False)
    again = compare(stranger, encoder, labelled, labels=LABELS, names=names[::-1], progress=False)
    assert found.better == again.better
    assert found.headline.difference.value == pytest.approx(-again.headline.difference.value)
    assert found.headline.p == again.headline.p
    json.dumps(found.to_dict(), allow_nan=False)


def test_compare_on_the_command_line(
    tiny_checkpoint, stranger, albums, colour_folder, monkeypatch, capsys
):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert not end.value.code, printed.err
        return printed.out

    models = ["eval", "compare", tiny_checkpoint, stranger.model.name]
    names = (str(tiny_checkpoint), stranger.model.name)
    wanted = compare(*names, str(colour_folder), progress=False)
    assert wanted.names == names
    assert wanted.to_pandas()["metric"][0] == "mean_recall"
    assert wanted.verdict in html.unescape(wanted._repr_html_())
    found = json.loads(run(*models, "--data", colour_folder, "--json"))
    assert found["verdict"] == wanted.verdict
    assert found["headline"]["p"] == wanted.headline.p
    assert [row["better"] for row in found["metrics"]] == list(
        map(wanted.better_at, wanted.differences)
    )
    assert [row["name"] for row in found["metrics"]] == [row.name for row in wanted.differences]
    lines = run(*models, "--data", albums, "--labels", ",".join(LABELS)).splitlines()
    assert (lines[0].split()[0], lines[0].split()[-1]) == ("metric", "better")
    assert lines[1].split()[0] == "top1"
    assert "top1 is" in lines[-1]


def test_a_label_that_does_not_fit_is_refused(encoder):
    with pytest.raises(CaptionError, match=r"label 'word word.*expected at most 77; shorten it"):
        ZeroShotClassifier.from_labels(encoder, ["cat", "word " * 90])
