"""Indexes joined: every image once, no key for two images."""

import numpy as np
import pytest

from clipkit.artifacts import Manifest, ModelRef
from clipkit.errors import ArtifactError, ModelMismatchError
from clipkit.index.merge import merge_indexes
from clipkit.index.roots import Root, Scope, find_scope, new_root, owner, root_of, roots_of
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.toys import records, unit_rows

DIM = 16
MODEL = ModelRef("toy", "a", "fingerprint-a", DIM)
VECTORS = unit_rows(90, DIM)


def build(path, rows, folder, spec="Flat", later=0, model=MODEL):
    """An index of some of the vectors, as if embedded from a folder."""
    with EmbeddingStore.create(path.with_name(f"{path.name}.store"), model) as writer:
        kept = [r | {"mtime_ns": r["mtime_ns"] + later} for r in records(max(rows) + 1)]
        writer.append(VECTORS[rows], [kept[n] for n in rows])
        store = writer.finish({"spec": folder, "root": folder, "kind": "folder"})
    return VectorIndex.build(store, path, spec)


def key(number):
    return f"item-{number:05d}.png"


def assert_holds(index, expected):
    """The index answers as the sorted products with ``expected``, a vector by key."""
    assert sorted(index.keys) == sorted(expected)
    keys, rows = list(expected), np.stack(list(expected.values()))
    queries = unit_rows(10, DIM, seed=5)
    order = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :5]
    found = [[hit.key for hit in hits] for hits in index.search_vectors(queries, 5)]
    assert found == [[keys[n] for n in best] for best in order]


@pytest.mark.parametrize("spec", ["Flat", "IVF4,Flat"])
def test_parts_of_one_folder_are_joined_as_they_are(tmp_path, spec):
    one = build(tmp_path / "one", range(0, 50), "/photos", spec)
    build(tmp_path / "two", range(30, 80), "/photos", "SQ8")
    index = merge_indexes([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert_holds(index, {key(n): VECTORS[n] for n in range(80)})
    assert index.spec == spec
    ids = dict(zip(index.keys, index.records()["id"].to_pylist(), strict=True))
    assert [ids[k] for k in one.keys] == one.records()["id"].to_pylist()
    assert sorted(ids.values()) == list(range(80))
    assert [root.where for root in roots_of(index.manifest)] == ["/photos"]


def test_of_an_image_in_both_the_one_changed_last_is_taken(tmp_path):
    build(tmp_path / "one", range(10), "/photos")
    build(tmp_path / "two", range(5, 15), "/photos", later=1)
    with IndexWriter(tmp_path / "two") as writer:
        table = writer.index.records().filter([k == key(7) for k in writer.index.keys])
        writer.remove([key(7)])
        writer.append(VECTORS[80:81], table)
        writer.commit()
    expected = {key(n): VECTORS[n] for n in range(15)}
    for names in (["one", "two"], ["two", "one"]):
        paths = [tmp_path / name for name in names]
        index = merge_indexes(paths, tmp_path / "-".join(names))
        assert_holds(index, expected | {key(7): VECTORS[80]})
        first = VectorIndex.open(paths[0]).records().to_pylist()
        ids = dict(zip(index.keys, index.records()["id"].to_pylist(), strict=True))
        assert all(ids[row["key"]] == row["id"] for row in first)


def test_equal_keys_of_different_folders_stay_two_images(tmp_path):
    build(tmp_path / "one", range(10), "/photos")
    build(tmp_path / "two", range(5, 15), "/mnt/photos")
    build(tmp_path / "three", range(20), "/else/photos")
    index = merge_indexes([tmp_path / name for name in ("one", "two", "three")], tmp_path / "out")
    expected = {key(n): VECTORS[n] for n in range(10)}
    expected |= {f"photos/{key(n)}": VECTORS[n] for n in range(5, 15)}
    expected |= {f"photos-2/{key(n)}": VECTORS[n] for n in range(20)}
    assert sorted(index.keys) == sorted(expected)
    assert len(index) == 40
    found = {(root.prefix, root.where) for root in roots_of(index.manifest)}
    assert found == {("", "/photos"), ("photos", "/mnt/photos"), ("photos-2", "/else/photos")}


def test_a_folder_within_another_is_the_same_images(tmp_path):
    build(tmp_path / "inner", range(5), "/photos/2024")
    build(tmp_path / "outer", range(5, 9), "/photos")
    index = merge_indexes([tmp_path / "outer", tmp_path / "inner"], tmp_path / "out")
    expected = {key(n): VECTORS[n] for n in range(5, 9)}
    assert_holds(index, expected | {f"2024/{key(n)}": VECTORS[n] for n in range(5)})
    with pytest.raises(ArtifactError, match="/photos contains /photos/2024"):
        merge_indexes([tmp_path / "inner", tmp_path / "outer"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_merged_is_refused(tmp_path):
    build(tmp_path / "one", range(5), "/photos")
    build(tmp_path / "two", range(5), "/else", model=ModelRef("other", "", "b", DIM))
    with pytest.raises(ArtifactError, match="got 1 indexes, expected at least two"):
        merge_indexes([tmp_path / "one"], tmp_path / "out")
    with pytest.raises(ModelMismatchError, match="toy/a.*other"):
        merge_indexes([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    with pytest.raises(ArtifactError, match="already holds a clipkit index"):
        merge_indexes([tmp_path / "one", tmp_path / "one"], tmp_path / "two")
    assert VectorIndex.open(tmp_path / "two").model.name == "other"


def test_roots_are_read_from_what_embed_wrote():
    folder = {"spec": "photos", "root": "/home/photos", "kind": "sidecars"}
    assert root_of(folder) == Root("", "/home/photos", True)
    table = {"spec": "data/pairs.csv", "root": "/home/data", "kind": "csv"}
    assert root_of(table) == Root("", "/home/data/pairs.csv", False)
    assert root_of({"spec": "hf:a/b:train", "root": None, "kind": "hub"}).where == "hf:a/b:train"
    manifest = Manifest("index", MODEL, 0, folder)
    assert roots_of(manifest) == [Root("", "/home/photos", True)]


def test_keys_belong_to_the_root_with_their_prefix():
    roots = [Root("", "/a", True), Root("b", "/x/b", True)]
    assert owner(roots, "b/1.png").where == "/x/b"
    assert owner(roots, "bb/1.png").where == owner(roots, "1.png").where == "/a"
    assert find_scope(roots, Root("", "/x/b/c", True)) == Scope(roots[1], "c")
    assert find_scope(roots, Root("", "/x/b/c", True)).key("1.png") == "b/c/1.png"
    assert find_scope(roots, Root("", "/bb", True)) is None
    assert find_scope([Root("", "", False)], Root("", "", False)) is None


@pytest.mark.parametrize("prefix", ["", "a/b", "..", "b", "c"])
def test_a_prefix_that_is_taken_or_none_is_refused(prefix):
    roots = [Root("", "/a", True), Root("b", "/x/b", True)]
    with pytest.raises(ArtifactError, match="--prefix"):
        new_root(roots, ["c/1.png"], Root("", "/new", True), prefix)
