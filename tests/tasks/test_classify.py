"""Classifying images: labels with synonyms and groups, rejection, options, and the Python API."""

import json
import shutil

import pytest
from PIL import Image

import clipkit
from clipkit.artifacts import ModelRef
from clipkit.classifiers.heads import save_classifier
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.data.labels import imagenet_labels, parents, parse_label
from clipkit.data.prompts import read_labels, read_templates
from clipkit.errors import CaptionError, DataError
from tests.helpers.colours import COLOURS

LABELS = list(COLOURS)
MODEL = ModelRef("toy", "", "toy", 8)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return clipkit.load_model(tiny_checkpoint)


# Labels


@pytest.mark.parametrize(
    ("text", "name", "path", "phrases"),
    [
        ("fox", "fox", ("fox",), ("fox",)),
        ("fox: red fox, vixen", "fox", ("fox",), ("red fox", "vixen")),
        ("fox: a small, red animal; vixen", "fox", ("fox",), ("a small, red animal", "vixen")),
        ("animal/fox", "animal/fox", ("animal", "fox"), ("fox",)),
        ("a/b / c: see", "a/b/c", ("a", "b", "c"), ("see",)),
        (r"AC\/DC", "AC/DC", ("AC/DC",), ("AC/DC",)),
        (r"Alien\: the film", "Alien: the film", ("Alien: the film",), ("Alien: the film",)),
        ("at 12:30", "at 12:30", ("at 12:30",), ("at 12:30",)),
        ("fox: ", "fox", ("fox",), ("fox",)),
    ],
)
def test_how_a_label_is_read(text, name, path, phrases):
    label = parse_label(text)
    assert (str(label), label.path, label.phrases) == (name, path, phrases)


def test_groups_are_all_that_stands_above():
    labels = [parse_label(text) for text in ("a/b/x", "a/b/y", "a/z", "plain")]
    assert parents(labels) == {"a": [0, 1, 2], "a/b": [0, 1]}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("animal,animal/fox", "'animal' and labels below it, expected either"),
        ("animal/fox,toy/fox", "describes 'animal/fox' and 'toy/fox' with the same words"),
        ("animal//fox,dog", "'animal//fox' with an empty part"),
        ("fox: red fox,dog: Red Fox", "describes 'fox' and 'dog' with the same words"),
        ("fox: red fox,fox: vixen", "'fox' twice"),
    ],
)
def test_labels_that_cannot_be_told_apart(labels, message):
    with pytest.raises(CaptionError, match=message):
        read_labels(labels)


def test_the_sets_that_open_clip_ships():
    from open_clip import zero_shot_metadata as metadata

    labels = read_labels("imagenet")
    assert labels == imagenet_labels()
    assert [label.phrases[0] for label in labels] == list(metadata.IMAGENET_CLASSNAMES)
    assert len({str(label).lower() for label in labels}) == len(labels) == 1000
    assert parents(labels) == {}
    for name, functions in (
        ("openai", metadata.OPENAI_IMAGENET_TEMPLATES),
        ("simple", metadata.SIMPLE_IMAGENET_TEMPLATES),
    ):
        found = read_templates(name)
        assert [t.replace("{}", "cat") for t in found] == [f("cat") for f in functions]


# Rejection, each label alone


def test_reject_and_each_on_the_command_line(run, colour_folder, tiny_checkpoint, encoder):
    words = [colour_folder, "--labels", "red,green", "--model", tiny_checkpoint]
    made = ZeroShotClassifier.from_labels(encoder, ["red", "green"], background=True)
    keys = sorted(path.name for path in colour_folder.glob("*.png"))
    vectors = encoder.encode_images([Image.open(colour_folder / key) for key in keys])
    out, _ = run("classify", *words, "--reject", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["shows_any"] for one in found] == pytest.approx(made.any_of(vectors), abs=1e-5)
    assert all(one["rejected"] == (one["shows_any"] < 0.5) for one in found)
    out, _ = run("classify", *words, "--each", "--json")
    for one, row in zip(map(json.loads, out.splitlines()), made.each_alone(vectors), strict=True):
        scores = {p["label"]: p["score"] for p in one["predictions"]}
        assert [scores["red"], scores["green"]] == pytest.approx(row.tolist(), abs=1e-5)
    _, err = run("classify", *words, "--calibrate", colour_folder, code=1)
    assert "calibrated with 12 images, expected at least 19" in err
    for number in range(20):
        shutil.copy(colour_folder / "red-1.png", colour_folder / f"more-{number}.png")
    out, _ = run("classify", *words, "--calibrate", colour_folder, "--json")
    accepted = [not json.loads(line)["rejected"] for line in out.splitlines()]
    assert sum(accepted) >= 0.95 * len(accepted)


def test_a_single_label_is_judged_by_itself(run, colour_folder, tiny_checkpoint, encoder, tmp_path):
    words = [colour_folder, "--labels", "red", "--model", tiny_checkpoint]
    made = ZeroShotClassifier.from_labels(encoder, ["red"], background=True)
    keys = sorted(path.name for path in colour_folder.glob("*.png"))
    vectors = encoder.encode_images([Image.open(colour_folder / key) for key in keys])
    expected = made.each_alone(vectors)[:, 0]
    out, _ = run("classify", *words, "--each", "--save", tmp_path / "saved", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["predictions"][0]["score"] for one in found] == pytest.approx(
        expected.tolist(), abs=1e-5
    )
    found = clipkit.classify(colour_folder, ["red"], encoder, each=True, progress=False)
    assert [one.top[0].score for one in found] == pytest.approx(expected.tolist(), abs=1e-5)
    for more in ([], ["--reject"]):
        _, err = run("classify", *words, *more, code=1)
        assert "only 'red', expected two or more labels" in err
        assert "--each" in err
    with pytest.raises(CaptionError, match="only 'red'"):
        clipkit.classify(colour_folder, tmp_path / "saved", reject=True, progress=False)


def test_example_images_have_the_same_image_column(run, colour_folder, tiny_checkpoint):
    table = colour_folder / "examples.csv"
    for number in range(20):
        shutil.copy(colour_folder / "red-1.png", colour_folder / f"more-{number}.png")
    rows = [f"extra,more-{number}.png" for number in range(20)]
    table.write_text("\n".join(["note,which", *rows]))
    words = ["classify", table, "--labels", "red,green", "--model", tiny_checkpoint, "--json"]
    out, _ = run(*words, "--image-column", "which", "--calibrate", table)
    assert sum(not json.loads(line)["rejected"] for line in out.splitlines()) >= 19


def test_a_list_of_labels_may_be_longer_than_a_file_name(run, colour_folder, tiny_checkpoint):
    labels = ",".join(f"label number {number}" for number in range(400))
    words = [colour_folder, "--labels", labels, "--model", tiny_checkpoint]
    out, _ = run("classify", *words, "-k", 1, "--json")
    assert len(out.splitlines()) == 12


def test_groups_add_up(run, colour_folder, tiny_checkpoint):
    words = [colour_folder, "--labels", "warm/red,cold/green,cold/blue", "--model", tiny_checkpoint]
    out, _ = run("classify", *words, "--json")
    for line in out.splitlines():
        one = json.loads(line)
        scores = {p["label"]: p["score"] for p in one["predictions"]}
        groups = {p["label"]: p["score"] for p in one["groups"]}
        assert groups["cold"] == pytest.approx(scores["cold/green"] + scores["cold/blue"])
        assert groups["warm"] == pytest.approx(scores["warm/red"])
    out, _ = run("classify", *words)
    assert "[cold " in out.splitlines()[1]


# In Python


def test_classify_takes_paths_and_labels(encoder, colour_folder, tmp_path, monkeypatch):
    (colour_folder / "bad.png").write_bytes(b"")
    found = clipkit.classify(colour_folder, LABELS, encoder, progress=False)
    keys = sorted(path.name for path in colour_folder.glob("*.png") if path.name != "bad.png")
    assert [one.key for one in found] == keys
    assert [one.key for one in found.skipped] == ["bad.png"]
    classifier = ZeroShotClassifier.from_labels(encoder, LABELS)
    vectors = encoder.encode_images([colour_folder / key for key in keys])
    for one, row in zip(found, classifier.probabilities(vectors), strict=True):
        assert one.label == LABELS[row.argmax()]
        assert one.score == pytest.approx(row.max(), abs=1e-5)
    assert list(found.to_pandas()["label"]) == [one.label for one in found]

    save_classifier(classifier, tmp_path / "c")
    assert [
        clipkit.classify(str(colour_folder), labels, model, progress=False).items
        for labels, model in ((classifier, encoder), (tmp_path / "c", None))
    ] == [found.items] * 2
    image = colour_folder / "red-0.png"
    monkeypatch.setattr("clipkit.classifiers.heads.load_model", lambda: encoder)
    two = clipkit.classify([image, str(image)], LABELS, progress=False)
    assert [one.key for one in two] == [str(image)] * 2
    with pytest.raises(TypeError, match="labels is one string, 'dog'"):
        clipkit.classify(colour_folder, "dog", encoder, progress=False)
    with pytest.raises(DataError, match=r"none of the images could be read \(1 skipped\)"):
        clipkit.classify(colour_folder / "bad.png", LABELS, encoder, progress=False)


def test_rejection_and_independent_labels(encoder, colour_folder):
    classifier = ZeroShotClassifier.from_labels(encoder, LABELS, background=True)
    paths = sorted(colour_folder.glob("*.png"))
    vectors = encoder.encode_images(paths)
    found = clipkit.classify(colour_folder, LABELS, encoder, reject=True, progress=False)
    shows = classifier.any_of(vectors)
    assert [one.shows_any for one in found] == pytest.approx(shows.tolist(), abs=1e-5)
    assert [one.rejected for one in found] == (shows < 0.5).tolist()
    found = clipkit.classify(colour_folder, LABELS, encoder, each=True, progress=False)
    best = classifier.each_alone(vectors).max(axis=1)
    assert [one.shows_any for one in found] == pytest.approx(best.tolist(), abs=1e-5)
