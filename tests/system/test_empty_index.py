"""An index from which every picture was removed: whatever is asked of it ends in a sentence."""

import warnings

import pytest

from clipkit.cli import main
from clipkit.errors import DataError
from clipkit.index.vector_index import VectorIndex
from clipkit.tasks.index import compact_index, remove_items
from clipkit.tasks.map import draw_map
from clipkit.tasks.sync import add_images
from tests.helpers.toys import COLOURS, png, square
from tests.helpers.web_toys import ServedEncoder, build, client, keys


@pytest.fixture(params=["removed", "compacted"])
def index(tmp_path, request):
    path = build(tmp_path, per_colour=1)
    assert len(remove_items(path, ["*"])) == len(COLOURS)
    if request.param == "compacted":
        compact_index(path)
    return path


def test_a_search_finds_nothing(index, monkeypatch, capsys):
    assert VectorIndex.open(index, encoder=ServedEncoder()).search("red").items == ()
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # which a command changes
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["clipkit", "search", str(index), "red", *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        out, err = capsys.readouterr()
        assert out == ""
        assert "is empty, so there is nothing to find; `clipkit index add` adds images" in err


def test_a_map_of_it_is_refused(index, tmp_path):
    with pytest.raises(DataError, match="cannot draw a map of 0 items, expected at least 5"):
        draw_map(index, tmp_path / "map.html")
    assert not (tmp_path / "map.html").exists()


def test_it_is_served_and_fills_again(index, tmp_path):
    with client(index) as ask:
        info = ask.get("/info").json()
        assert (info["count"], info["columns"], info["missing"]) == (0, [], None)
        for query in ({}, {"q": "red"}, {"q": "red", "minus": "blue"}, {"offset": 60}):
            answer = ask.get("/search", params=query)
            assert keys(answer) == []
            assert (answer.json()["total"], answer.json()["matched"]) == (0, None)
        sent = ask.post("/search", content=png(square("red")))
        assert keys(sent) == []
        labels = {"labels": ["red", "blue"], "image": sent.json()["image"]}
        (answer,) = ask.post("/classify", json=labels).json()["images"]
        assert answer["probabilities"][0] > 0.5
        filtered = ask.get("/search", params={"q": "red", "where": "label = 'red'"})
        assert (keys(filtered), filtered.json()["total"]) == ([], 0)
        for path in ("/similar/red/red-0.png", "/thumb/red/red-0.png", "/image/red/red-0.png"):
            assert ask.get(path).status_code == 404
        assert "clipkit_index_images 0.0" in ask.get("/metrics").text
        add_images(index, tmp_path / "photos", encoder=ServedEncoder())
        assert ask.served.refresh()
        assert len(keys(ask.get("/search", params={"q": "red"}))) == len(COLOURS)
