"""What a run is told before it starts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.config import parse_config
from clipkit.data.duplicates import Shared, shared_images
from clipkit.data.open_source import open_source
from clipkit.data.rows import StoredImage
from clipkit.data.sampler import split_held_out
from clipkit.errors import DataError
from clipkit.models.tokenizer import TruncationReport
from clipkit.tasks.train import train
from clipkit.training.preflight import Facts, preflight_warnings
from tests.helpers.colours import COLOURS
from tests.helpers.runs import configured

FINE = Facts(pairs=10_000, steps=1000, captions=9000, cut=TruncationReport(10_000, 5), shared=None)


def findings(facts=FINE, **sections):
    return preflight_warnings(parse_config(sections), facts)


def test_nothing_is_said_of_a_run_without_faults():
    assert findings() == []
    assert findings(Facts(None, 0, None, TruncationReport(), None)) == []
    assert findings(replace(FINE, shared=Shared([], 500, 10_000, 10_000))) == []


@pytest.mark.parametrize(
    ("name", "rate", "doubtful"),
    [
        ("adamw", 5e-4, False),
        ("adamw", 0.5, True),
        ("adamw", 1e-9, True),
        ("sgd", 0.5, False),
        ("sgd", 50.0, True),
        ("lion", 1e-2, True),
        ("novograd", 1e-2, False),
    ],
)
def test_rates_out_of_range(name, rate, doubtful):
    found = findings(optim={"name": name, "lr": rate})
    assert len(found) == doubtful
    if doubtful:
        assert f"optim.lr is {rate:g}, expected " in found[0]
        assert f" for {name}: " in found[0]


@pytest.mark.parametrize(
    ("facts", "sections", "sentence"),
    [
        (FINE, {"optim": {"warmup": 1.0}}, "100% of the run (1000 of 1000 steps)"),
        (replace(FINE, steps=0), {"optim": {"warmup": 0.5}}, "50% of the run, so"),
        (replace(FINE, steps=1), {}, "the run has a single step"),
        (replace(FINE, pairs=200), {}, "batch_size is 256, but there are 200 pairs"),
        (replace(FINE, captions=1), {}, "all captions of the 10000 images are the same"),
        (replace(FINE, captions=10), {}, "10000 images have 10 different captions"),
        (
            replace(FINE, cut=TruncationReport(1000, 30, 400)),
            {},
            "3.0% of the captions (30 of 1,000)",
        ),
        (
            replace(FINE, shared=Shared([("a.jpg", "b.jpg")], 500, 200_000, 1_000_000)),
            {},
            "1 of 500 held-out images are byte-identical to some of the 1,000,000 training images "
            "(a sample of 200,000), e.g. a.jpg = b.jpg",
        ),
    ],
)
def test_each_fault_is_one_sentence(facts, sections, sentence):
    (found,) = findings(facts, **sections)
    assert sentence in found


@pytest.mark.parametrize(
    ("augment", "views", "told"),
    [
        ({"flip": 0.5}, 1, True),
        ({"token_dropout": 0.2}, 1, False),
        ({"flip": 0.5}, 2, False),
        ({"flip": 0.5}, 0, False),
    ],
)
def test_changes_that_stored_features_do_not_see(augment, views, told):
    data, model = {"feature_views": views}, {"lock": ["image"]}
    found = findings(augment=augment, data=data, model=model)
    assert [("encodes each image once" in finding) for finding in found] == [True] * told


def test_captions_that_are_split_are_not_cut():
    facts = replace(FINE, cut=TruncationReport(1000, 30, 400))
    assert findings(facts, data={"long_captions": "split"}) == []


def shared_slowly(training, held_out):
    """The definition: every pair of images compared."""

    def read(row):
        return row.image.data or Path(row.image.path).read_bytes()

    known = {}
    for row in training.rows:
        known.setdefault(read(row), row.key)
    return {row.key: known[read(row)] for row in held_out.rows if read(row) in known}


@pytest.mark.parametrize("form", ["paths", "bytes"])
def test_shared_images_equal_comparing_all(tmp_path, form):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(60):
        # Few different pictures, of which several have the same size as files.
        pixels = np.full((5, 5, 3), generator.integers(0, 60), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.bmp")
        (folder / f"{number:02}.txt").write_text("a picture")
    source = open_source(folder)
    if form == "bytes":
        rows = source.rows.map(
            lambda row: replace(row, image=StoredImage((folder / row.key).read_bytes()))
        )
        source = replace(source, rows=rows)
    training, held_out = split_held_out(source, 0.3, seed=1)
    slow = shared_slowly(training, held_out)
    assert 3 < len(slow) < 18
    found = shared_images(training, held_out)
    assert dict(found.keys) == slow
    assert (found.held_out, found.looked_at, found.training) == (18, 42, 42)
    some = shared_images(training, held_out, most=5)
    assert (some.looked_at, some.training) == (5, 42)
    assert {key for key, _ in some.keys} < slow.keys()


def test_a_stream_is_not_compared(colour_folder):
    stream = open_source(colour_folder, streaming=True)
    assert shared_images(stream, open_source(colour_folder)) is None


def test_missing_and_empty_files_are_passed_over(colour_folder):
    source = open_source(colour_folder)
    (colour_folder / "red-0.png").unlink()
    for number in (1, 2):
        (colour_folder / f"red-{number}.png").write_bytes(b"")
    found = shared_images(source, source)
    assert len(found.keys) == len(COLOURS) * 4 - 3


def test_a_run_is_warned_and_goes_on(colour_folder, tmp_path, capsys):
    config = configured(
        colour_folder, data={"val": str(colour_folder)}, train={"epochs": 2, "batch_size": 64}
    )
    result = train(config, tmp_path / "run")
    assert result.finished
    shown = capsys.readouterr().err
    assert [f"warning: {finding}" in shown for finding in result.findings] == [True, True]
    assert "12 of 12 held-out images are byte-identical" in shown
    assert "batch_size is 64, but there are 12 pairs" in shown


def test_one_pair_alone_is_an_error(colour_folder, tmp_path):
    for file in sorted(colour_folder.iterdir())[2:]:
        file.unlink()
    with pytest.raises(DataError, match="leaves one pair to train on, expected at least 2"):
        train(configured(colour_folder, data={"val_fraction": 0.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
