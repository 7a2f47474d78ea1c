"""Predictions as a sequence, as rows of a table and as plain data."""

import numpy as np
import pytest

from clipkit.artifacts import ModelRef
from clipkit.classifiers.heads import list_templates, read_labels_or_classifier
from clipkit.classifiers.predictions import LabelScore, Prediction, Predictions, rank
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.data.images import Skipped
from clipkit.data.labels import Label, parse_label
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.errors import CaptionError

MODEL = ModelRef("toy", "", "toy", 3)


@pytest.fixture
def predictions():
    """Scores of labels along the axes, for three images."""
    labels = [parse_label(text) for text in ("warm/red", "cold/green", "cold/blue")]
    classifier = ZeroShotClassifier(labels, np.eye(3, dtype=np.float32), 2.0, MODEL)
    return classifier.predict(np.eye(3, dtype=np.float32), ["r", "g", "b"], k=2)


def test_the_best_scores_come_first_in_the_order_of_the_labels():
    scores = np.array([[0.2, 0.4, 0.4], [0.5, 0.3, 0.2]], np.float32)
    first, second = rank(scores, ["x", "y", "z"], ["a", "b"], 2)
    assert [one.label for one in first.top] == ["y", "z"]
    assert (second.key, second.label, second.score) == ("b", "x", 0.5)


def test_predictions_are_a_sequence(predictions):
    assert isinstance(predictions, Predictions)
    assert [one.key for one in predictions] == ["r", "g", "b"]
    assert predictions[-1].label == "cold/blue"
    assert predictions[1:].items == predictions.items[1:]
    assert predictions.model == MODEL
    with pytest.raises(IndexError):
        predictions[3]


def test_probabilities_and_groups_by_hand(predictions):
    high, low = np.exp(2), 1
    assert predictions[0].score == pytest.approx(high / (high + 2 * low))
    groups = {one.label: one.score for one in predictions[1].groups}
    assert groups["cold"] == pytest.approx((high + low) / (high + 2 * low))
    assert groups["warm"] == pytest.approx(low / (high + 2 * low))
    assert predictions[1].groups[0].label == "cold"


def test_predictions_become_a_table(predictions):
    frame = predictions.to_pandas()
    assert list(frame["key"]) == ["r", "g", "b"]
    assert list(frame["label"]) == list(frame["label_1"])
    assert frame["probability_1"][0] == predictions[0].score
    assert list(frame["group"]) == ["warm", "cold", "cold"]
    assert len(Predictions(()).to_pandas()) == 0


def test_a_rejected_image_has_no_label():
    one = Prediction("a", (LabelScore("x", 0.9),), shows_any=0.2, rejected=True)
    assert (one.label, one.score) == ("none of these", 0.8)
    assert one.to_dict() == {
        "key": "a",
        "predictions": [{"label": "x", "score": 0.9}],
        "shows_any": 0.2,
        "rejected": True,
    }


def test_a_notebook_shows_what_was_skipped():
    one = Prediction("<a>", (LabelScore("x", 0.9), LabelScore("y", 0.1)))
    page = Predictions((one,), MODEL, (Skipped("bad.png", "is empty"),))._repr_html_()
    assert "1 image could not be read" in page
    assert "x 90%" in page
    assert "&lt;a&gt;" in page


def test_labels_and_templates_are_lists_or_files(tmp_path):
    (tmp_path / "labels.txt").write_text("dog\nfox: red fox, vixen\n")
    for file in (tmp_path / "labels.txt", str(tmp_path / "labels.txt")):
        assert [str(label) for label in read_labels_or_classifier(file)] == ["dog", "fox"]
    assert read_labels_or_classifier(("dog", "cat")) == [Label("dog"), Label("cat")]
    assert len(read_labels_or_classifier("imagenet")) == 1000
    for text in ("dog", "dog,cat"):
        with pytest.raises(TypeError, match="labels is one string, .* expected a list such as"):
            read_labels_or_classifier(text)
    with pytest.raises(CaptionError, match="none.txt"):
        read_labels_or_classifier(tmp_path / "none.txt")
    assert list_templates(None) == list(DEFAULT_TEMPLATES)
    assert list_templates(("a {}.",)) == ["a {}."]
    assert len(list_templates("openai")) == 80
    with pytest.raises(TypeError, match="templates is one string"):
        list_templates("a photo of a {}.")
