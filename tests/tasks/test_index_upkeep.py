"""Commands that look after an index."""

import io
import json
import sys

import pytest
from PIL import Image

from clipkit.cli import main
from clipkit.errors import ArtifactError
from clipkit.index.vector_index import VectorIndex
from clipkit.tasks.index import compact_index, remove_items
from tests.helpers.indexes import DIM, QUERIES, make_store
from tests.helpers.toys import unit_rows


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
    with pytest.raises(ArtifactError, match="no-such.*nothing was removed"):
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


def test_add_and_sync_from_the_command_line(
    colour_folder, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    index = tmp_path / "index"
    words = ("index", "build", colour_folder, "--out", index, "--model", tiny_checkpoint)
    assert run(monkeypatch, capsys, *words)[0] == 0
    (colour_folder / "red-0.png").rename(colour_folder / "rouge.png")
    (colour_folder / "red-0.txt").rename(colour_folder / "rouge.txt")
    (colour_folder / "red-1.png").unlink()
    Image.new("RGB", (40, 30), (9, 99, 9)).save(colour_folder / "new.png")
    (colour_folder / "bad.png").write_bytes(b"none")
    code, out, err = run(monkeypatch, capsys, "index", "sync", index, "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "added": 1,
            "changed": 0,
            "renamed": 1,
            "removed": 1,
            "unchanged": 10,
            "encoded": 1,
            "prefix": "",
            "skipped": 1,
        },
    )
    assert "skipped bad.png" in err
    more = tmp_path / "more"
    more.mkdir()
    Image.new("RGB", (40, 30), (200, 9, 199)).save(more / "red-0.png")
    code, out, _ = run(monkeypatch, capsys, "index", "add", index, more)
    assert code == 0
    assert ["added", "1"] in [line.split() for line in out.splitlines()]
    assert ["prefix", "more"] in [line.split() for line in out.splitlines()]
    keys = VectorIndex.open(index).keys
    assert {"rouge.png", "new.png", "more/red-0.png"} <= set(keys)
    assert run(monkeypatch, capsys, "index", "check", index)[0] == 0
    code, _, err = run(monkeypatch, capsys, "index", "sync", index, tmp_path / "nowhere")
    assert code == 1
    assert "does not exist" in err
