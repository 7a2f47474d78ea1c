"""Evaluating a model: shared captions, duplicates, labels without images, saved classifiers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import clipkit
from clipkit.classifiers.heads import save_classifier
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.data.open_source import open_source
from clipkit.errors import CaptionError, DataError, ModelMismatchError
from clipkit.evaluation.classification import measure_classification
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from tests.helpers.colours import COLOURS, write_albums
from tests.helpers.models import save_tiny

LABELS = list(COLOURS)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return clipkit.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Another model of the same shape."""
    return clipkit.load_model(save_tiny(tmp_path_factory.mktemp("stranger") / "step-1", seed=1))


@pytest.fixture
def albums(tmp_path):
    return write_albums(tmp_path / "albums", 10, noise=90)


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
    assert merged.to_dict()["settings"] == {"equal_captions": "merge", "ties": "against"}


def test_duplicates_in_the_gallery_are_noted_and_tie(encoder, colour_folder):
    for number in range(3):
        (colour_folder / f"copy-{number}.png").write_bytes(
            (colour_folder / "red-0.png").read_bytes()
        )
        (colour_folder / f"copy-{number}.txt").write_text(f"copy number {number}")
    report = evaluate_retrieval(open_source(colour_folder), encoder, progress=False)
    assert report.counts["equal_images"] == 3
    assert "images with the same vector as an earlier one: 3" in report.notes[1]
    queries = [report.outcome.captions.index(f"copy number {number}") for number in range(3)]
    found = report.outcome.results["text_to_image"]
    assert (found.ranks[np.isin(found.queries, queries)] >= 3).all()


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
    source = replace(source, rows=source.rows.map(lambda row: replace(row, label="red")))
    report = evaluate_zero_shot(source, encoder, LABELS, progress=False)
    assert report.to_dict()["roc_auc"] is None
    assert report.outcome.fitted is None
    assert "ece_fitted" not in report.metrics


def test_a_classifier_of_another_model_is_refused(encoder, stranger, albums):
    classifier = ZeroShotClassifier.from_labels(stranger, LABELS)
    with pytest.raises(ModelMismatchError, match="the classifier was built with"):
        evaluate_zero_shot(open_source(albums), encoder, classifier, progress=False)


def test_a_label_that_does_not_fit_is_refused(encoder):
    with pytest.raises(CaptionError, match=r"label 'word word.*expected at most 77; shorten it"):
        ZeroShotClassifier.from_labels(encoder, ["cat", "word " * 90])


def test_data_may_be_paths_and_reports_become_tables(encoder, colour_folder, albums, tmp_path):
    table = colour_folder / "pairs.csv"
    table.write_text("filepath,caption\nred-1.png,one\nblue-1.png,two\n")
    for data in (table, str(table), open_source(table)):
        report = evaluate_retrieval(data, encoder, progress=False)
        assert report.counts["images"] == 2
    frame = report.to_pandas()
    assert list(frame.columns) == ["metric", "value", "low", "high"]
    assert dict(zip(frame["metric"], frame["value"], strict=True)) == report.metrics

    (tmp_path / "labels.txt").write_text("\n".join(sorted(LABELS)))
    save_classifier(
        ZeroShotClassifier.from_labels(encoder, sorted(LABELS)), tmp_path / "classifier"
    )
    wanted = evaluate_zero_shot(albums, encoder, sorted(LABELS), progress=False).metrics
    for labels in (None, str(tmp_path / "labels.txt"), tmp_path / "classifier"):
        assert evaluate_zero_shot(str(albums), encoder, labels, progress=False).metrics == wanted
    # A saved classifier loads its own model.
    saved = evaluate_zero_shot(albums, None, tmp_path / "classifier", progress=False)
    assert saved.model == encoder.model
    with pytest.raises(TypeError, match="labels is one string, 'red', expected a list"):
        evaluate_zero_shot(albums, encoder, "red", progress=False)
    with pytest.raises(TypeError, match="templates is one string"):
        evaluate_zero_shot(albums, encoder, LABELS, "a photo of a {}.", progress=False)
    with pytest.raises(CaptionError, match="captions are already encoded"):
        evaluate_zero_shot(albums, encoder, tmp_path / "classifier", ["{}"], progress=False)


def test_without_an_encoder_the_default_model_is_loaded(encoder, colour_folder, monkeypatch):
    monkeypatch.setattr("clipkit.tasks.evaluate.load_model", lambda: encoder)
    assert evaluate_retrieval(colour_folder, progress=False).model == encoder.model
