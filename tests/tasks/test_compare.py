"""Comparing two models, in Python and on the command line."""

import html
import json

import pytest

import clipkit
from clipkit.data.open_source import open_source
from clipkit.tasks.compare import compare
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


def test_compare_on_the_command_line(run, tiny_checkpoint, stranger, albums, colour_folder):
    models = ["eval", "compare", tiny_checkpoint, stranger.model.name]
    names = (str(tiny_checkpoint), stranger.model.name)
    wanted = compare(*names, str(colour_folder), progress=False)
    assert wanted.names == names
    assert wanted.to_pandas()["metric"][0] == "mean_recall"
    assert wanted.verdict in html.unescape(wanted._repr_html_())
    found = json.loads(run(*models, "--data", colour_folder, "--json")[0])
    assert found["verdict"] == wanted.verdict
    assert found["headline"]["p"] == wanted.headline.p
    assert [row["better"] for row in found["metrics"]] == list(
        map(wanted.better_at, wanted.differences)
    )
    assert [row["name"] for row in found["metrics"]] == [row.name for row in wanted.differences]
    lines = run(*models, "--data", albums, "--labels", ",".join(LABELS))[0].splitlines()
    assert (lines[0].split()[0], lines[0].split()[-1]) == ("metric", "better")
    assert lines[1].split()[0] == "top1"
    assert "top1 is" in lines[-1]
