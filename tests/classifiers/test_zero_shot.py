"""Class weights, their cache, rejection and independent labels."""

from dataclasses import replace

import numpy as np
import pytest

import clipkit
from clipkit.artifacts import ModelRef
from clipkit.classifiers import zero_shot as module
from clipkit.classifiers.zero_shot import ZeroShotClassifier, background_weights, class_weights
from clipkit.data.labels import Label, imagenet_labels
from clipkit.data.prompts import BACKGROUND, read_labels, read_templates
from clipkit.errors import CaptionError
from tests.helpers.colours import COLOURS
from tests.helpers.toys import unit_rows

LABELS = list(COLOURS)
MODEL = ModelRef("toy", "", "toy", 8)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return clipkit.load_model(tiny_checkpoint)


def test_imagenets_names_in_eighty_templates_are_encoded_once(
    tiny_checkpoint, monkeypatch, tmp_path
):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path))
    encoder, counts = clipkit.load_model(tiny_checkpoint), []

    def encode(self, texts, **options):
        """Cheap vectors that differ with the text."""
        counts.append(len(texts))
        rows = np.zeros((len(texts), self.dim), np.float32)
        rows[:, :2] = [(len(text), text.count("a")) for text in texts]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr(type(encoder), "encode_text", encode)
    labels, templates = read_labels("imagenet"), read_templates("openai")
    first = class_weights(encoder, labels, templates)
    assert sum(counts) == 80_000
    assert max(counts) <= module._AT_ONCE  # no more are held at a time
    texts = [template.replace("{}", str(labels[700])) for template in templates]
    mean = encode(encoder, texts).mean(axis=0)
    np.testing.assert_allclose(first[700], mean / np.linalg.norm(mean), atol=1e-6)

    counts.clear()
    np.testing.assert_array_equal(class_weights(encoder, labels, templates), first)
    assert not counts
    # Other labels, other templates and another model are other weights.
    class_weights(encoder, labels[:10], templates)
    class_weights(encoder, labels[:100], templates[:7])
    assert sum(counts) == 800 + 700
    encoder.model = replace(encoder.model, fingerprint="another")
    class_weights(encoder, labels[:10], templates)
    assert sum(counts) == 800 + 700 + 800


def test_weights_equal_open_clips_for_its_own_sets(encoder):
    import open_clip
    from open_clip import build_zero_shot_classifier
    from open_clip.zero_shot_metadata import SIMPLE_IMAGENET_TEMPLATES

    labels, names = imagenet_labels()[:5], [label.phrases[0] for label in imagenet_labels()[:5]]
    own = ZeroShotClassifier.from_labels(encoder, labels, read_templates("simple"))

    class Model:
        def encode_text(self, tokens, normalize):
            return encoder.network.encode_tokens(tokens)

    theirs = build_zero_shot_classifier(
        Model(), open_clip.get_tokenizer("ViT-B-32"), names, SIMPLE_IMAGENET_TEMPLATES
    )
    np.testing.assert_allclose(own.weights, theirs.numpy().T, atol=1e-6)


def test_a_label_is_the_mean_of_all_its_captions(encoder, monkeypatch):
    labels = [
        Label("fox", phrases=("red fox", "vixen", "fox cub")),
        Label("dog"),
        Label("cat", ("a",)),
    ]
    templates = ["a {}.", "{}"]
    for most in (2048, 3):  # in one part, and a part for each label
        monkeypatch.setattr(module, "_AT_ONCE", most)
        found = ZeroShotClassifier.from_labels(encoder, labels, templates).weights
        said = [("red fox", "vixen", "fox cub"), ("dog",), ("cat",)]
        for row, phrases in zip(found, said, strict=True):
            texts = [t.replace("{}", phrase) for phrase in phrases for t in templates]
            mean = encoder.encode_text(texts).mean(axis=0)
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_many_captions_are_encoded_once(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "CACHED_FROM", 1)
    first = ZeroShotClassifier.from_labels(encoder, LABELS, ["a {}."])
    monkeypatch.setattr(type(encoder), "encode_text", None)  # must not be called again
    second = ZeroShotClassifier.from_labels(encoder, LABELS, ["a {}."])
    np.testing.assert_array_equal(first.weights, second.weights)
    with pytest.raises(TypeError):
        ZeroShotClassifier.from_labels(encoder, LABELS, ["the {}."])


def test_background_captions_leave_out_the_words_of_the_labels(encoder):
    assert len(background_weights(encoder, ["fox", "red car"])) == len(BACKGROUND)
    fewer = background_weights(encoder, ["animal", "fast vehicle"])
    assert len(fewer) == len(BACKGROUND) - 2


@pytest.fixture
def toy():
    """Labels along the first axes, generic captions along two others."""
    eye = np.eye(8, dtype=np.float32)
    return ZeroShotClassifier(["a", "b", "c"], eye[:3], 10.0, MODEL, eye[3:5])


def test_any_of_and_each_alone_are_shares_against_the_background(toy):
    vectors = unit_rows(20, 8)
    all_odds = np.exp(10 * vectors[:, :5].astype(float))
    mine, generic = all_odds[:, :3], all_odds[:, 3:].sum(axis=1)
    wanted = mine.sum(axis=1) / all_odds.sum(axis=1)
    np.testing.assert_allclose(toy.any_of(vectors), wanted, atol=1e-5)
    np.testing.assert_allclose(toy.each_alone(vectors), mine / (mine + generic[:, None]), atol=1e-5)
    bare = ZeroShotClassifier(["a", "b"], np.eye(8, dtype=np.float32)[:2], 10.0, MODEL)
    with pytest.raises(CaptionError, match="no background captions"):
        bare.any_of(vectors)


def test_rejection_accepts_the_share_it_was_calibrated_for(toy):
    accepted = []
    for seed in range(40):
        vectors = unit_rows(200, 8, seed=seed)
        toy.calibrate(vectors[:99], accepted=0.9)
        accepted.append((toy.any_of(vectors[99:]) >= toy.threshold).mean())
    assert 0.9 <= np.mean(accepted) < 0.93
    toy.calibrate(vectors[:19], accepted=0.95)  # the lowest of 19 may stand for 5 %
    assert toy.threshold == toy.any_of(vectors[:19]).min()
    with pytest.raises(CaptionError, match="calibrated with 18 images, expected at least 19"):
        toy.calibrate(vectors[:18], accepted=0.95)
