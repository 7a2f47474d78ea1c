"""``--batch-size`` and ``--workers``: they reach encoder and threads, and do not change results."""

import json
import shutil

import numpy as np
import pytest

from clipkit.index.vector_index import VectorIndex
from clipkit.models import embed_source
from tests.helpers.colours import COLOURS

GIVEN = ("--batch-size", 5, "--workers", 2)
IGNORED = {"measured", "milliseconds"}
"""Facts about the time, which differ between any two runs."""


@pytest.fixture
def used(monkeypatch):
    """The batch sizes and numbers of threads that images are encoded with."""
    found = []
    batcher, map_ordered = embed_source.AdaptiveBatcher, embed_source.map_ordered

    def note_size(encoder, size):
        found.append(("batch size", size))
        return batcher(encoder, size)

    def note_workers(*args, workers, ahead):
        found.append(("workers", workers))
        return map_ordered(*args, workers=workers, ahead=ahead)

    monkeypatch.setattr(embed_source, "AdaptiveBatcher", note_size)
    monkeypatch.setattr(embed_source, "map_ordered", note_workers)
    return found


@pytest.fixture
def albums(colour_folder, tmp_path):
    """The coloured pictures in class folders, and a suite of them."""
    for name in COLOURS:
        (tmp_path / "albums" / name).mkdir(parents=True)
        for file in colour_folder.glob(f"{name}-*.png"):
            for copy in ("a", "b"):  # calibration needs 19 images or more
                shutil.copy(file, tmp_path / "albums" / name / f"{copy}-{file.name}")
    (tmp_path / "suite.toml").write_text(
        '[[set]]\nname = "albums"\ndata = "albums"\ntask = "zero-shot"\nlabels = "red,green,blue"\n'
        '[[set]]\nname = "colours"\ndata = "colours"\ntask = "retrieval"'
    )
    return tmp_path / "albums"


def leaves(item):
    """The values of JSON data, without facts about the time."""
    if isinstance(item, dict):
        return [leaf for name in item if name not in IGNORED for leaf in leaves(item[name])]
    if isinstance(item, list):
        return [leaf for one in item for leaf in leaves(one)]
    return [item]


def is_number(value):
    return isinstance(value, int | float)


@pytest.mark.parametrize(
    "words",
    [
        "classify {albums} --labels red,green,blue",
        "classify {albums} --labels red,green,blue --calibrate {albums}",
        "eval retrieval {colours}",
        "eval zero-shot {albums} --labels red,green,blue",
        "eval suite {albums}/../suite.toml --out {albums}/../{out}",
        "eval probe {albums} --shots 1 --seeds 1 --methods neighbours",
        "eval probe {albums} --shots 1 --seeds 1 --methods neighbours --test {albums}",
        "eval compare {model} {model} --data {colours}",
        "eval compare {model} {model} --data {albums} --labels red,green,blue",
    ],
)
def test_results_do_not_depend_on_them(run, used, words, albums, colour_folder, tiny_checkpoint):
    def results(out, *more):
        used.clear()
        given = words.format(albums=albums, colours=colour_folder, model=tiny_checkpoint, out=out)
        model = () if "compare" in words else ("--model", tiny_checkpoint)
        printed, _ = run(*given.split(), *model, "--json", *more)
        return leaves([json.loads(line) for line in printed.splitlines()]), set(used)

    first, encoded = results("one", *GIVEN)
    assert encoded == {("batch size", 5), ("workers", 2)}
    second, encoded = results("two")
    assert ("batch size", "auto") in encoded
    assert [one for one in first if not is_number(one)] == [
        one for one in second if not is_number(one)
    ]
    assert list(filter(is_number, first)) == pytest.approx(
        list(filter(is_number, second)), abs=1e-4
    )


def test_indexes_do_not_depend_on_them(run, used, albums, tiny_checkpoint, tmp_path):
    """``index build``, ``add`` and ``sync`` in turn."""
    indexes = []
    for name, more in (("one", GIVEN), ("two", ())):
        index, root = tmp_path / f"{name}-index", tmp_path / name
        shutil.copytree(albums / "red", root / "red")
        shutil.copytree(albums / "blue", root / "blue")
        for words in (
            ("build", root / "red", "--out", index, "--model", tiny_checkpoint),
            ("add", index, root / "blue"),
            ("sync", index),
        ):
            if words[0] == "sync":
                shutil.copy(albums / "green" / "a-green-0.png", root / "red")
            used.clear()
            run("index", *words, *more)
            assert dict(used)["batch size"] == (5 if more else "auto"), words
            assert dict(used)["workers"] == 2 or not more, words
        indexes.append(VectorIndex.open(index))
    one, two = indexes
    assert one.keys == two.keys
    assert len(one) == 17
    vectors = [np.concatenate([vectors for vectors, _ in index.shards()]) for index in (one, two)]
    np.testing.assert_allclose(*vectors, atol=1e-6)
