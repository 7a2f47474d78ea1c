"""Labels with synonyms and paths, rejection, labels alone, saved classifiers, what is written."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import clipkit
from clipkit.artifacts import ModelRef, read_manifest
from clipkit.classifiers import zero_shot as module
from clipkit.classifiers.heads import ARRAYS, open_classifier, save_classifier
from clipkit.classifiers.zero_shot import ZeroShotClassifier, background_weights
from clipkit.config import parse_config
from clipkit.data.labels import Label, imagenet_labels, parents, parse_label
from clipkit.data.prompts import BACKGROUND, read_labels, read_templates
from clipkit.errors import ArtifactError, CaptionError, DataError
from clipkit.models.checkpoint import save_checkpoint
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model
from tests.helpers.pictures import COLOURS
from tests.helpers.toys import unit_rows

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
    assert (label, label.path, label.phrases) == (name, path, phrases)


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
    assert len({label.lower() for label in labels}) == len(labels) == 1000
    assert parents(labels) == {}
    for name, functions in (
        ("openai", metadata.OPENAI_IMAGENET_TEMPLATES),
        ("simple", metadata.SIMPLE_IMAGENET_TEMPLATES),
    ):
        found = read_templates(name)
        assert [t.replace("{}", "cat") for t in found] == [f("cat") for f in functions]


# Class weights


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


def test_a_label_is_the_mean_of_all_it_may_be_called(encoder, monkeypatch):
    labels = [Label(["fox"], ["red fox", "vixen", "fox cub"]), Label(["dog"]), Label(["a", "cat"])]
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


def test_generic_captions_leave_a_labels_own_word_out(encoder):
    assert len(background_weights(encoder, ["fox", "red car"])) == len(BACKGROUND)
    fewer = background_weights(encoder, ["animal", "fast vehicle"])
    assert len(fewer) == len(BACKGROUND) - 2


# Rejection, each label alone


@pytest.fixture
def toy():
    """Labels along the first axes, generic captions along two others."""
    eye = np.eye(8, dtype=np.float32)
    return ZeroShotClassifier(["a", "b", "c"], eye[:3], 10.0, MODEL, eye[3:5])


def test_any_and_each_are_shares_against_the_generic_captions(toy):
    vectors = unit_rows(20, 8)
    all_odds = np.exp(10 * vectors[:, :5].astype(float))
    mine, generic = all_odds[:, :3], all_odds[:, 3:].sum(axis=1)
    wanted = mine.sum(axis=1) / all_odds.sum(axis=1)
    np.testing.assert_allclose(toy.any_of(vectors), wanted, atol=1e-5)
    np.testing.assert_allclose(toy.each_alone(vectors), mine / (mine + generic[:, None]), atol=1e-5)
    bare = ZeroShotClassifier(["a", "b"], np.eye(8, dtype=np.float32)[:2], 10.0, MODEL)
    with pytest.raises(CaptionError, match="no background captions"):
        bare.any_of(vectors)


def test_rejection_keeps_the_share_it_was_calibrated_for(toy):
    kept = []
    for seed in range(40):
        vectors = unit_rows(200, 8, seed=seed)
        toy.calibrate(vectors[:99], kept=0.9)
        kept.append((toy.any_of(vectors[99:]) >= toy.threshold).mean())
    assert 0.9 <= np.mean(kept) < 0.93
    toy.calibrate(vectors[:19], kept=0.95)  # the lowest of 19 may stand for 5 %
    assert toy.threshold == toy.any_of(vectors[:19]).min()
    with pytest.raises(CaptionError, match="calibrated with 18 images, expected at least 19"):
        toy.calibrate(vectors[:18], kept=0.95)


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
    kept = [not json.loads(line)["rejected"] for line in out.splitlines()]
    assert sum(kept) >= 0.95 * len(kept)


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


# Saved classifiers


def test_a_saved_classifier_answers_the_same_without_its_labels(
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
    assert "captions are encoded already; leave --templates out" in err
    _, err = run("classify", colour_folder, "--labels", tmp_path / "c", "--reject", code=1)
    assert "has no background captions" in err


def test_a_classifier_refuses_strangers_and_damage(
    run, colour_folder, tiny_checkpoint, encoder, tmp_path
):
    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=1)
    save_checkpoint(tmp_path / "other", towers, {"step": 1}, {"step": 1})
    save_classifier(ZeroShotClassifier.from_labels(encoder, LABELS), tmp_path / "c")
    words = ["classify", colour_folder, "--labels", tmp_path / "c"]
    _, err = run(*words, "--model", tmp_path / "other", code=1)
    assert "the classifier was made by" in err
    (tmp_path / "c" / ARRAYS).write_bytes(b"no tensors")
    assert "c is damaged" in run(*words, code=1)[1]
    (tmp_path / "c" / ARRAYS).unlink()
    assert "c is damaged" in run(*words, code=1)[1]
    file = tmp_path / "c" / "manifest.json"
    file.write_text(file.read_text().replace('"zero-shot"', '"crystal-ball"'))
    with pytest.raises(ArtifactError, match="of type 'crystal-ball', expected one of zero-shot"):
        open_classifier(tmp_path / "c")
    assert "holds a clipkit checkpoint" in run(*words[:-1], tiny_checkpoint, code=1)[1]


# What is written


def test_tables_pages_and_sheets(run, colour_folder, tiny_checkpoint, tmp_path):
    files = [tmp_path / f"o.{form}" for form in ("csv", "html", "png")]
    outs = ["--csv", files[0], "--html", files[1], "--contact-sheet", files[2]]
    words = [colour_folder, "--labels", ",".join(LABELS), "--model", tiny_checkpoint]
    out, _ = run("classify", *words, "--reject", "--json", *outs)
    told = [json.loads(line) for line in out.splitlines()]
    with files[0].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row, one in zip(rows, told, strict=True):
        best = one["predictions"][0]
        assert row["key"] == one["key"]
        assert row["label"] == ("none of these" if one["rejected"] else best["label"])
        assert (row["label_1"], float(row["probability_1"])) == (best["label"], best["score"])
        assert float(row["shows_any"]) == one["shows_any"]
    page = files[1].read_text()
    assert page.count("data:image/jpeg;base64,") == 12
    assert "<script" not in page
    assert "http" not in page
    with Image.open(files[2]) as sheet:
        assert sheet.width == 8 * 134 + 6
        assert sheet.height >= 128
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "colours",
        *sorted(f.name for f in files),
    ]
    out, _ = run("classify", *words, "--reject", "--csv", "-")
    assert out.splitlines() == files[0].read_text().splitlines()
    _, err = run("classify", *words, "--csv", tmp_path / "o.xlsx", code=2)
    assert "expected a file name that ends in .csv" in " ".join(err.split())


def test_nothing_is_left_of_a_run_that_fails(run, colour_folder, tiny_checkpoint, tmp_path):
    for picture in colour_folder.glob("*.png"):
        picture.write_bytes(b"")
    words = [colour_folder, "--labels", "red,blue", "--model", tiny_checkpoint]
    run(*["classify", *words, "--csv", tmp_path / "o.csv", "--sort", tmp_path / "sorted"], code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["colours"]


def test_pictures_are_sorted_and_stay_where_they_are(run, colour_folder, tiny_checkpoint, tmp_path):
    (colour_folder / "deep").mkdir()
    shutil.copy(colour_folder / "red-1.png", colour_folder / "deep" / "red-0.png")
    before = sorted(colour_folder.rglob("*"))
    words = [colour_folder, "--labels", "warm/red,cold/green,cold/blue", "--model", tiny_checkpoint]
    for kind in ("copies", "links"):
        link = ["--link"] if kind == "links" else []
        out, _ = run("classify", *words, "--json", "--sort", tmp_path / kind, *link)
        found = sorted(p for p in (tmp_path / kind).rglob("*") if not p.is_dir())
        assert len(found) == len(out.splitlines()) == 13
        assert all(p.is_symlink() == (kind == "links") for p in found)
        for one in map(json.loads, out.splitlines()):
            folder = tmp_path / kind / one["predictions"][0]["label"]
            content = (colour_folder / one["key"]).read_bytes()
            assert content in [path.read_bytes() for path in folder.iterdir()]
    assert sorted(colour_folder.rglob("*")) == before
    _, err = run("classify", *words, "--sort", tmp_path / "copies", code=1)
    assert "is not empty, expected a new folder" in err
    assert len(list((tmp_path / "copies").rglob("*.png"))) == 13


def test_pictures_inside_a_table_are_copied_but_not_linked(run, tiny_checkpoint, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.helpers.toys import png, square

    rows = [
        {"key": f"../{n}.png", "image": {"bytes": png(square(n)), "path": None}} for n in LABELS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    words = [tmp_path / "t.parquet", "--labels", "red,blue", "--model", tiny_checkpoint]
    run("classify", *words, "--sort", tmp_path / "sorted", "--json")
    found = [path.name for path in (tmp_path / "sorted").rglob("*.png")]
    assert sorted(found) == ["blue.png", "green.png", "red.png"]
    _, err = run("classify", *words, "--sort", tmp_path / "more", "--link", code=1)
    assert "cannot link to ../red.png, which is inside a table or tar" in err
    assert not (tmp_path / "more").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


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
