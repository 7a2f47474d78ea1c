"""Few-shot classification of a folder, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch

import clipkit
from clipkit.classifiers.few_shot import METHODS, Labelled
from clipkit.data.open_source import open_source
from clipkit.errors import DataError
from clipkit.tasks.probe import draw, probe
from tests.helpers.colours import write_albums
from tests.helpers.toys import unit_rows


@pytest.fixture
def albums(tmp_path):
    """Thirty very noisy images of each of three colours."""
    return write_albums(tmp_path / "albums", 30, noise=200, tint=60)


def test_a_draw_takes_the_shots_of_each_class_without_repetition():
    pool = Labelled(unit_rows(200, 16), np.arange(200) % 5)
    for shots, others in ((1, 1), (3, 3), (16, 4)):
        train, held_out = draw(pool, shots, seed=1)
        assert (np.bincount(train.targets) == shots).all()
        assert (np.bincount(held_out.targets) == others).all()
        both = np.concatenate([train.vectors, held_out.vectors])
        assert len(np.unique(both, axis=0)) == len(both)
    other = draw(pool, 3, seed=2)[0]
    assert not np.array_equal(other.vectors, draw(pool, 3, seed=1)[0].vectors)


def test_probing_a_model(albums, tiny_checkpoint):
    encoder = clipkit.load_model(tiny_checkpoint)
    found = probe(
        open_source(albums), encoder, shots=(8, 1, 20), methods=["linear"], seeds=3, progress=False
    )
    assert [(row.method, row.shots) for row in found.results] == [
        ("zero-shot", 0),
        ("linear", 1),
        ("linear", 8),
    ]
    assert "20 shots are left out: 'blue' has 15 training images" in found.notes[0]
    assert found.tested == 45
    for row in found.results:
        assert row.accuracy.value == pytest.approx(np.mean(row.by_seed))
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high
        # As many of each class are tested on.
        assert row.mean_per_class.value == pytest.approx(row.accuracy.value)
    assert found.results[2].accuracy.value > found.results[0].accuracy.value
    json.dumps(found.to_dict())
    frame = found.to_pandas()
    assert list(frame["shots"]) == [0, 1, 8]
    assert frame["accuracy"][2] == found.results[2].accuracy.value
    assert "linear" in found._repr_html_()
    with pytest.raises(TypeError, match="methods is one string"):
        probe(albums, encoder, methods="linear", progress=False)
    with pytest.raises(DataError, match="has 15 training images of 'blue', expected 17"):
        probe(open_source(albums), encoder, shots=(16,), progress=False)
    with pytest.raises(DataError, match="expected two or more; name a label column"):
        probe(open_source(albums / "red"), encoder, progress=False)


def test_shots_are_fitted_on_one_thread(albums, tiny_checkpoint, monkeypatch):
    seen = []
    fit = METHODS["neighbours"]
    monkeypatch.setitem(
        METHODS, "neighbours", lambda *data: (seen.append(torch.get_num_threads()), fit(*data))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encoder, source = clipkit.load_model(tiny_checkpoint), open_source(albums)
        probe(source, encoder, shots=(2,), methods=["neighbours"], seeds=3, progress=False)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert (seen, after) == ([1, 1, 1], 2)


def test_probe_on_the_command_line(run, albums, tiny_checkpoint, tmp_path):
    words = [albums, "--model", tiny_checkpoint, "--shots", "1,4", "--seeds", "2"]
    out, err = run("eval", "probe", *words, "--test", albums, "--save", tmp_path / "head", "--json")
    found = json.loads(out)
    assert len(found["rows"]) == 9
    assert (found["tested"], found["classes"]) == (90, 3)
    assert f"saved the {found['best']} classifier" in err
    out, _ = run("classify", albums, "--labels", tmp_path / "head", "--json")
    right = [
        one["predictions"][0]["label"] == one["key"].partition("/")[0]
        for one in map(json.loads, out.splitlines())
    ]
    zeroshot, _ = run("eval", "zero-shot", albums, "--labels", tmp_path / "head", "--json")
    assert json.loads(zeroshot)["top1"] == pytest.approx(np.mean(right))
    out, _ = run("eval", "probe", *words, "--methods", "neighbours")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == [
        "zero-shot",
        "neighbours",
        "neighbours",
    ]
    assert "expected one of linear" in run("eval", "probe", *words, "--methods", "magic", code=1)[1]
    run("eval", "probe", *words[:-4], "--shots", "0", code=2)
