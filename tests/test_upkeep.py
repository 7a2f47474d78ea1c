"""Commands that look after an index."""

import io
import json
import sys

import pytest
from test_index_writer import DIM, QUERIES, make_store, unit_rows

from clipkit.cli import main
from clipkit.errors import ArtifactError
from clipkit.store.vector_index import VectorIndex
from clipkit.tasks.upkeep import compact_index, remove_items


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(30, DIM)), path, "HNSW8")
    return path


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, *capsys.readouterr()


def test_keys_and_patterns_are_removed(index):
    removed = remove_items(index, ["item-00007.png", "item-0001*", "item-00007.png"])
    assert removed == ["item-00007.png", *(f"item-{n:05d}.png" for n in range(10, 20))]
    assert len(VectorIndex.open(index)) == 19
    assert not set(removed) & set(VectorIndex.open(index).keys)


@pytest.mark.parametrize("names", [["item-00001.png", "no-such"], ["item-00001.png", "no-such-*"]])
def test_a_name_that_fits_nothing_removes_nothing(index, names):
    with pytest.raises(ArtifactError, match="no-such.*nothing is removed"):
        remove_items(index, names)
    assert len(VectorIndex.open(index)) == 30


def test_compacting_changes_the_files_and_not_the_answers(index):
    remove_items(index, ["item-0000*"])
    before = VectorIndex.open(index)
    after = compact_index(index)
    assert after.search(QUERIES, 5) == before.search(QUERIES, 5)
    assert [segment.rows for segment in after.segments] == [20]
    assert after.records().to_pylist() == before.records().to_pylist()


def test_the_commands_print_what_they_did(index, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "index", "remove", index, "item-00003.png", "--json")
    assert (code, json.loads(out)) == (0, {"removed": "item-00003.png"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("item-00004.png\n\nitem-00005.png\n"))
    code, out, _ = run(monkeypatch, capsys, "index", "remove", index, "--from", "-")
    assert (code, out.split()) == (0, ["removed", "item-00004.png", "removed", "item-00005.png"])
    code, out, _ = run(monkeypatch, capsys, "index", "compact", index, "--json")
    assert json.loads(out) == {"index": str(index), "vectors": 27, "spec": "HNSW8"}
    code, out, err = run(monkeypatch, capsys, "index", "remove", index, "item-00004.png")
    assert (code, out) == (1, "")
    assert "no item 'item-00004.png'" in err
    assert run(monkeypatch, capsys, "index", "remove", index)[0] == 2
    assert run(monkeypatch, capsys, "index", "compact", index / "none")[0] == 1
