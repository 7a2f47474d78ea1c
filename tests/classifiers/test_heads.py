"""Saved classifiers: the same predictions, and errors for other models and damage."""

import pytest

import clipkit
from clipkit.artifacts import read_manifest
from clipkit.classifiers.heads import ARRAYS, open_classifier, save_classifier
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.errors import ArtifactError
from tests.helpers.colours import COLOURS
from tests.helpers.models import save_tiny

LABELS = list(COLOURS)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return clipkit.load_model(tiny_checkpoint)


def test_a_saved_classifier_gives_the_same_predictions(
    run, colour_folder, tiny_checkpoint, tmp_path
):
    words = ["--labels", "warm/red: crimson,cold/green,cold/blue", "--model", tiny_checkpoint]
    first, _ = run("classify", colour_folder, *words, "--json", "--save", tmp_path / "c")
    again, _ = run("classify", colour_folder, "--labels", tmp_path / "c", "--json")
    assert first == again
    manifest = read_manifest(tmp_path / "c", "classifier")
    assert manifest.count == 3
    out, _ = run("info", tmp_path / "c")
    assert "zero-shot" in out
    _, err = run(
        *["classify", colour_folder, "--labels", tmp_path / "c", "--templates", "simple"], code=1
    )
    assert "captions are already encoded; leave them out" in err
    _, err = run("classify", colour_folder, "--labels", tmp_path / "c", "--reject", code=1)
    assert "has no background captions" in err


def test_another_model_and_damage_are_refused(
    run, colour_folder, tiny_checkpoint, encoder, tmp_path
):
    save_tiny(tmp_path / "other", seed=1)
    save_classifier(ZeroShotClassifier.from_labels(encoder, LABELS), tmp_path / "c")
    words = ["classify", colour_folder, "--labels", tmp_path / "c"]
    _, err = run(*words, "--model", tmp_path / "other", code=1)
    assert "the classifier was built with" in err
    (tmp_path / "c" / ARRAYS).write_bytes(b"no tensors")
    assert "c is damaged" in run(*words, code=1)[1]
    (tmp_path / "c" / ARRAYS).unlink()
    assert "c is damaged" in run(*words, code=1)[1]
    file = tmp_path / "c" / "manifest.json"
    file.write_text(file.read_text().replace('"zero-shot"', '"crystal-ball"'))
    with pytest.raises(ArtifactError, match="of type 'crystal-ball', expected one of zero-shot"):
        open_classifier(tmp_path / "c")
    assert "holds a clipkit checkpoint" in run(*words[:-1], tiny_checkpoint, code=1)[1]
