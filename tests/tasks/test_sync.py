"""An index kept in step with its folder answers as one built afresh of the folder."""

import io
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest

from clipkit.data import images
from clipkit.data.open_source import open_source
from clipkit.errors import ArtifactError, DataError, ModelMismatchError
from clipkit.index.merge import merge_indexes
from clipkit.index.roots import roots_of
from clipkit.index.vector_index import VectorIndex
from clipkit.store import incremental
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks import sync as update_module
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from clipkit.tasks.sync import add_images, sync_index
from tests.helpers.toys import COLOURS, ColourEncoder, png, square, write_squares

QUERIES = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
COUNTS = ("added", "changed", "renamed", "removed", "unchanged", "encoded")


def counts(changes):
    """The counts that are not zero."""
    return {name: getattr(changes, name) for name in COUNTS if getattr(changes, name)}


@pytest.fixture
def photos(tmp_path):
    write_squares(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def encoder():
    return ColourEncoder()


@pytest.fixture
def index(photos, tmp_path, encoder):
    build_index(photos, tmp_path / "index", spec="HNSW8", encoder=encoder)
    encoder.encoded = 0
    return tmp_path / "index"


def ids_of(index):
    rows = VectorIndex.open(index).records().select(["key", "id"]).to_pylist()
    return {row["key"]: row["id"] for row in rows}


def paint(path, colour, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    square(colour, shade=shade).save(path)


def assert_as_fresh(index, photos, tmp_path):
    """The index holds and finds what an index of the folder, built now, holds and finds."""
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    shutil.rmtree(tmp_path / "fresh.store", ignore_errors=True)
    fresh = build_index(photos, tmp_path / "fresh", encoder=ColourEncoder())
    found = VectorIndex.open(index)
    facts = ("size", "mtime_ns", "captions", "label", "content_hash")
    rows, expected = (
        {row["key"]: [row[name] for name in facts] for row in one.records().to_pylist()}
        for one in (found, fresh)
    )
    assert rows == expected
    assert len(found) == len(fresh)
    for ours, theirs in zip(
        found.search_vectors(QUERIES, 99), fresh.search_vectors(QUERIES, 99), strict=True
    ):
        wanted = {hit.key: hit.score for hit in theirs}
        assert {hit.key: hit.score for hit in ours} == pytest.approx(wanted, abs=1e-6)
    assert not [name for name in os.listdir(index.parent) if name.startswith(".")]


def test_new_changed_renamed_and_deleted_images(index, photos, tmp_path, encoder):
    ids = ids_of(index)
    paint(photos / "red" / "new.png", "red", 77)
    paint(photos / "green" / "green-0.png", "magenta", 50)
    (photos / "blue" / "blue-0.png").rename(photos / "blue" / "moved.png")
    (photos / "cyan" / "cyan-0.png").unlink()
    changes = sync_index(index, photos, encoder=encoder)
    assert counts(changes) == {
        "added": 1,
        "changed": 1,
        "renamed": 1,
        "removed": 1,
        "unchanged": 13,
        "encoded": 2,
    }
    assert encoder.encoded == 2
    assert_as_fresh(index, photos, tmp_path)
    after = ids_of(index)
    assert after["blue/moved.png"] == ids["blue/blue-0.png"]
    assert after["green/green-0.png"] == ids["green/green-0.png"]
    assert after["red/new.png"] == 16
    assert all(after[key] == ids[key] for key in after.keys() & ids.keys())


def test_nothing_new_reads_no_image_and_loads_no_model(index, photos, monkeypatch):
    monkeypatch.setattr(incremental, "content_hash", None)
    before = (index / "index.faiss").stat()
    assert counts(sync_index(index)) == {"unchanged": 16}
    assert (index / "index.faiss").stat() == before
    assert len(VectorIndex.open(index).segments) == 1


def test_a_touched_or_copied_image_is_not_encoded(index, photos, tmp_path, encoder):
    os.utime(photos / "red" / "red-0.png", ns=(5, 5))
    shutil.copy(photos / "red" / "red-1.png", photos / "red" / "copy.png")
    assert counts(sync_index(index, encoder=encoder)) == {"added": 1, "unchanged": 16}
    assert encoder.encoded == 0
    assert_as_fresh(index, photos, tmp_path)
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 17}


def test_a_whole_folder_renamed_is_not_encoded(index, photos, tmp_path, encoder):
    (photos / "red").rename(photos / "crimson")
    assert counts(sync_index(index, encoder=encoder)) == {"renamed": 2, "unchanged": 14}
    assert encoder.encoded == 0
    assert_as_fresh(index, photos, tmp_path)  # their label, the folder's name, has changed too


def test_other_captions_change_the_records_alone(colour_folder, tmp_path, encoder):
    build_index(colour_folder, tmp_path / "index", encoder=encoder)
    (colour_folder / "red-0.txt").write_text("a red picture, indeed\n")
    encoder.encoded = 0
    assert counts(sync_index(tmp_path / "index", encoder=encoder)) == {
        "changed": 1,
        "unchanged": 11,
    }
    assert encoder.encoded == 0
    assert_as_fresh(tmp_path / "index", colour_folder, tmp_path)


def test_new_captions_of_unchanged_files_read_no_image(colour_folder, tmp_path, encoder):
    build_index(colour_folder, tmp_path / "index", encoder=encoder)
    (colour_folder / "red-0.txt").write_text("a red picture, indeed\n")
    for image in colour_folder.glob("*.png"):  # same size and time, but nothing can be read
        status = image.stat()
        image.write_bytes(bytes(status.st_size))
        os.utime(image, ns=(status.st_mtime_ns, status.st_mtime_ns))
    changes = sync_index(tmp_path / "index", encoder=encoder)
    assert counts(changes) == {"changed": 1, "unchanged": 11}
    assert not changes.skipped
    table = VectorIndex.open(tmp_path / "index").records()
    captions = dict(zip(table["key"].to_pylist(), table["captions"].to_pylist(), strict=True))
    assert captions["red-0.png"] == ["a red picture, indeed"]


def test_unreadable_images_are_told_and_hold_up_nothing(index, photos, encoder):
    (photos / "red" / "bad.png").write_bytes(b"no image")
    (photos / "red" / "red-0.png").write_bytes(b"no image any more")
    changes = sync_index(index, encoder=encoder)
    assert counts(changes) == {"removed": 1, "unchanged": 15}
    assert {item.key for item in changes.skipped} == {"red/bad.png", "red/red-0.png"}
    assert "red/red-0.png" not in VectorIndex.open(index).keys
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 15}


def test_what_is_out_of_sight_is_not_taken_for_deleted(index, photos, encoder, monkeypatch):
    real = images._list_once

    def forbidden(root, folder, seen):
        if folder == "red":
            raise PermissionError(13, "Permission denied")
        return real(root, folder, seen)

    monkeypatch.setattr(images, "_list_once", forbidden)
    (photos / "blue" / "blue-0.png").unlink()
    changes = sync_index(index, encoder=encoder)
    assert counts(changes) == {"removed": 1, "unchanged": 13}
    assert [item.key for item in changes.skipped] == ["red"]
    assert {"red/red-0.png", "red/red-1.png"} <= set(VectorIndex.open(index).keys)


def test_an_empty_folder_removes_nothing(index, photos, encoder):
    for colour in COLOURS:
        shutil.rmtree(photos / colour)
    with pytest.raises(DataError, match="holds no images"):
        sync_index(index, encoder=encoder)
    assert len(VectorIndex.open(index)) == 16


def test_a_folder_within_is_synced_alone(index, photos, tmp_path, encoder):
    (photos / "red" / "red-0.png").unlink()
    (photos / "blue" / "blue-0.png").unlink()
    paint(photos / "red" / "new.png", "red", 40)
    changes = sync_index(index, photos / "red", encoder=encoder)
    assert counts(changes) == {"added": 1, "unchanged": 1, "removed": 1, "encoded": 1}
    rows = VectorIndex.open(index).records().to_pylist()
    labels = {row["key"]: row["label"] for row in rows}
    assert labels["blue/blue-0.png"] == "blue"
    assert labels["red/new.png"] == labels["red/red-1.png"] == "red"
    assert "red/red-0.png" not in labels


def test_another_folder_is_added_with_a_prefix_and_synced_with_the_rest(
    index, photos, tmp_path, encoder
):
    other = tmp_path / "else" / "photos"
    write_squares(other, per_colour=1)
    paint(other / "red" / "red-0.png", "red", 99)
    with pytest.raises(ArtifactError, match="else/photos is not part of"):
        sync_index(index, other, encoder=encoder)
    changes = add_images(index, other, encoder=encoder)
    assert counts(changes) == {"added": 8, "encoded": 1}  # seven are copies of images it holds
    assert changes.prefix == "photos"
    assert len(VectorIndex.open(index)) == 24
    assert [(root.prefix, root.where) for root in roots_of(VectorIndex.open(index).manifest)] == [
        ("", str(photos)),
        ("photos", str(other)),
    ]
    (other / "blue" / "blue-0.png").unlink()
    (photos / "blue" / "blue-0.png").unlink()
    assert counts(sync_index(index, encoder=encoder)) == {"removed": 2, "unchanged": 22}
    keys = VectorIndex.open(index).keys
    assert "photos/red/red-0.png" in keys
    assert not {"photos/blue/blue-0.png", "blue/blue-0.png"} & set(keys)
    paint(photos / "photos" / "x.png", "red", 13)
    with pytest.raises(ArtifactError, match="'photos/x.png' would belong to .*else/photos"):
        sync_index(index, photos, encoder=encoder)


def test_prefixes_are_named_or_refused(index, photos, tmp_path, encoder):
    write_squares(tmp_path / "red", per_colour=1)
    with pytest.raises(ArtifactError, match="key prefix red/ for .* already used.*--prefix"):
        add_images(index, tmp_path / "red", encoder=encoder, prefix="red")
    assert add_images(index, tmp_path / "red", encoder=encoder).prefix == "red-2"
    with pytest.raises(ArtifactError, match="omit --prefix"):
        add_images(index, photos / "red", encoder=encoder, prefix="x")
    with pytest.raises(ArtifactError, match=f"contains {photos}"):
        add_images(index, tmp_path, encoder=encoder)


def test_adding_what_lies_within_removes_nothing(index, photos, encoder):
    (photos / "red" / "red-0.png").unlink()
    paint(photos / "red" / "new.png", "red", 40)
    changes = add_images(index, photos, encoder=encoder)
    assert counts(changes) == {"added": 1, "unchanged": 15, "encoded": 1}
    assert len(VectorIndex.open(index)) == 17
    paint(photos / "more" / "one.png", "blue", 41)
    changes = add_images(index, photos / "more" / "one.png", encoder=encoder)
    assert counts(changes) == {"added": 1, "encoded": 1}
    assert "more/one.png" in VectorIndex.open(index).keys
    paint(photos.parent / "alone.png", "blue", 42)
    with pytest.raises(ArtifactError, match="is not in a folder of"):
        add_images(index, photos.parent / "alone.png", encoder=encoder)
    with pytest.raises(ArtifactError, match="expected a whole folder.*clipkit index add"):
        sync_index(index, photos / "more" / "one.png", encoder=encoder)


def test_listed_images_are_added_to_their_folder(index, photos, encoder):
    paint(photos / "new-1.png", "red", 40)
    paint(photos / "new-2.png", "blue", 50)
    before = ids_of(index)
    changes = add_images(index, [photos / "new-1.png", photos / "new-2.png"], encoder)
    assert counts(changes) == {"added": 2, "encoded": 2}
    after = ids_of(index)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {"new-1.png", "new-2.png"}
    with pytest.raises(DataError, match="no file matches the pattern"):
        add_images(index, [photos / "*.gif"], encoder)


def test_a_store_is_added(index, photos, tmp_path, encoder):
    paint(photos / "red" / "new.png", "red", 40)
    (photos / "red" / "red-0.png").unlink()
    store = embed(photos, tmp_path / "more", encoder)
    changes = add_images(index, store.path)
    assert counts(changes) == {"added": 1, "unchanged": 15}
    write_squares(tmp_path / "else", per_colour=1)
    store = embed(tmp_path / "else", tmp_path / "third", encoder)
    assert counts(add_images(index, store.path)) == {"added": 8}
    assert "else/red/red-0.png" in VectorIndex.open(index).keys
    other = embed(tmp_path / "else", tmp_path / "fourth", ColourEncoder("other"))
    with pytest.raises(ModelMismatchError, match="embed the images"):
        add_images(index, other.path)
    with pytest.raises(ModelMismatchError, match="encode with its own model"):
        sync_index(index, photos, encoder=ColourEncoder("other"))


def test_a_folder_that_moved_is_found_by_its_content(index, photos, tmp_path, encoder, capsys):
    photos.rename(tmp_path / "pictures")
    paint(tmp_path / "pictures" / "red" / "new.png", "red", 40)
    changes = sync_index(index, tmp_path / "pictures", encoder=encoder)
    assert counts(changes) == {"added": 1, "unchanged": 16, "encoded": 1}
    assert "photos no longer exists, its images moved to" in capsys.readouterr().err
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 17}


def test_a_folder_that_is_gone_is_not_taken_for_deleted(index, photos, tmp_path, encoder):
    other = tmp_path / "other"
    write_squares(other, per_colour=3)
    add_images(index, other, encoder)
    other.rename(tmp_path / "moved")
    advice = rf"other no longer exists.*clipkit index sync {index} NEWFOLDER"
    with pytest.raises(DataError, match=advice):
        sync_index(index, encoder=encoder)
    write_squares(tmp_path / "else" / "deeper", per_colour=1)
    with pytest.raises(ArtifactError, match="else is not part of"):
        sync_index(index, tmp_path / "else", encoder)
    encoder.encoded = 0
    assert counts(sync_index(index, tmp_path / "moved", encoder)) == {"unchanged": 24}
    assert [(root.prefix, root.where) for root in roots_of(VectorIndex.open(index).manifest)] == [
        ("", str(photos)),
        ("other", str(tmp_path / "moved")),
    ]
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 40}
    assert encoder.encoded == 0


def test_what_was_encoded_before_an_interruption_is_not_encoded_again(
    index, photos, tmp_path, encoder, monkeypatch
):
    for shade in range(40, 60):
        paint(photos / "red" / f"new-{shade}.png", "red", shade)
    real, calls = update_module.encoded_batches, []

    def few(encoder, rows, **options):
        for vectors, done in real(encoder, rows, **options | {"batch_size": 4}):
            yield vectors, done
            calls.append(len(done))
            if len(calls) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(update_module, "encoded_batches", few)
    with pytest.raises(KeyboardInterrupt):
        sync_index(index, encoder=encoder)
    assert len(VectorIndex.open(index)) == 16
    monkeypatch.setattr(update_module, "encoded_batches", real)
    first, encoder.encoded = encoder.encoded, 0
    assert first >= 12
    assert counts(sync_index(index, encoder=encoder)) == {
        "added": 20,
        "unchanged": 16,
        "encoded": 8,
    }
    assert encoder.encoded == 8
    assert_as_fresh(index, photos, tmp_path)


def test_a_death_before_the_commit_costs_no_encoding(index, photos, tmp_path, encoder, monkeypatch):
    paint(photos / "red" / "new.png", "red", 40)
    monkeypatch.setattr(update_module.Update, "apply", lambda *_: sys.exit(1))
    with pytest.raises(SystemExit):
        sync_index(index, encoder=encoder)
    monkeypatch.undo()
    encoder.encoded = 0
    assert counts(sync_index(index, encoder=encoder)) == {"added": 1, "unchanged": 16}
    assert encoder.encoded == 0
    assert_as_fresh(index, photos, tmp_path)


def test_random_lives_equal_a_fresh_index(index, photos, tmp_path, encoder):
    rng, colours = np.random.default_rng(4), list(COLOURS)
    for step in range(6):
        files = sorted(photos.rglob("*.png"))
        for file in rng.permutation(np.array(files, object))[:3]:
            file.unlink()
        for file in rng.permutation(np.array(sorted(photos.rglob("*.png")), object))[:3]:
            file.rename(file.with_name(f"moved-{step}-{file.name}"))
        for number in range(3):
            paint(
                photos / colours[rng.integers(8)] / f"{step}-{number}.png",
                "red",
                3 * step + number + 20,
            )
        sync_index(index, encoder=encoder)
        assert_as_fresh(index, photos, tmp_path)


def test_tables_are_synced_by_their_content(tmp_path, encoder):
    import pandas as pd

    def write(colours):
        rows = [
            {"image": png(square(c, shade=n)), "caption": f"{c} {n}"} for n, c in enumerate(colours)
        ]
        pd.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet")

    write(["red", "green", "blue"])
    build_index(tmp_path / "pairs.parquet", tmp_path / "index", encoder=encoder)
    write(["red", "cyan", "blue", "white"])
    encoder.encoded = 0
    changes = sync_index(tmp_path / "index", encoder=encoder)
    assert counts(changes) == {"added": 1, "changed": 1, "unchanged": 2, "encoded": 2}
    assert encoder.encoded == 2
    assert len(EmbeddingStore.open(tmp_path / "index.store")) == 3  # of no more use to the index


# Indexes of listed images, patterns, tables and tars


def keys_of(index):
    return set(VectorIndex.open(index).keys)


def test_listed_images_alone_are_read_again(photos, tmp_path, encoder):
    listed = [photos / "red" / "red-0.png", photos / "blue" / "blue-1.png", photos / "green"]
    index = build_index(listed, tmp_path / "index", encoder=encoder).path
    before = {"red/red-0.png", "blue/blue-1.png", "green/green-0.png", "green/green-1.png"}
    assert keys_of(index) == before
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 4}
    manifest = (index / "manifest.json").read_text()
    assert counts(sync_index(index, photos, encoder=encoder)) == {"unchanged": 4}
    assert (index / "manifest.json").read_text() == manifest
    paint(photos / "green" / "new.png", "red", 33)
    paint(photos / "red" / "red-0.png", "blue", 34)
    (photos / "blue" / "blue-1.png").unlink()
    changes = sync_index(index, encoder=encoder)
    assert counts(changes) == {"added": 1, "changed": 1, "removed": 1, "unchanged": 2, "encoded": 2}
    assert keys_of(index) == before - {"blue/blue-1.png"} | {"green/new.png"}
    assert counts(sync_index(index, photos / "green", encoder)) == {"unchanged": 3}
    with pytest.raises(ArtifactError, match="photos/cyan is not part of"):
        sync_index(index, photos / "cyan", encoder)
    photos.rename(tmp_path / "moved")
    assert counts(sync_index(index, tmp_path / "moved", encoder)) == {"unchanged": 4}
    shutil.rmtree(tmp_path / "moved" / "green")
    (tmp_path / "moved" / "red" / "red-0.png").unlink()
    with pytest.raises(DataError, match="none of the 3 listed images, folders and patterns"):
        sync_index(index, encoder=encoder)
    assert len(keys_of(index)) == 4


def test_a_pattern_is_expanded_again(photos, tmp_path, encoder):
    (photos / "red" / "red-1.png").unlink()
    photos.rename(tmp_path / "with [brackets]")
    photos = tmp_path / "with [brackets]"
    index = build_index(photos / "*" / "red-*.png", tmp_path / "index", encoder=encoder).path
    assert keys_of(index) == {"red/red-0.png"}
    paint(photos / "more" / "red-7.png", "red", 70)
    paint(photos / "more" / "blue-7.png", "blue", 70)
    assert counts(sync_index(index, encoder=encoder)) == {"added": 1, "unchanged": 1, "encoded": 1}
    assert keys_of(index) == {"red/red-0.png", "more/red-7.png"}


def test_what_is_added_to_listed_images_is_listed(photos, tmp_path, encoder):
    index = build_index(photos / "red" / "red-0.png", tmp_path / "index", encoder=encoder).path
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 1}
    assert counts(add_images(index, photos / "red" / "red-1.png", encoder)) == {
        "added": 1,
        "encoded": 1,
    }
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 2}
    assert keys_of(index) == {"red-0.png", "red-1.png"}
    add_images(index, photos / "red", encoder)
    paint(photos / "red" / "new.png", "red", 50)
    assert counts(sync_index(index, encoder=encoder)) == {"added": 1, "unchanged": 2, "encoded": 1}
    assert roots_of(VectorIndex.open(index).manifest)[0].listed == ()


def test_merged_indexes_list_the_images_of_both(photos, tmp_path, encoder):
    for colour in ("red", "blue"):
        files = [photos / colour / f"{colour}-0.png", photos / "green" / "green-0.png"]
        build_index(files, tmp_path / colour, encoder=encoder)
    index = merge_indexes([tmp_path / "red", tmp_path / "blue"], tmp_path / "both").path
    expected = {"red/red-0.png", "blue/blue-0.png", "green/green-0.png"}
    assert keys_of(index) == expected
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 3}


@pytest.mark.parametrize("form", ["list", "pattern"])
def test_several_tars_are_read_again(tmp_path, encoder, form):
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            data = png(square("red", shade=number))
            member = tarfile.TarInfo("a.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    files = sorted(tmp_path.glob("*.tar")) if form == "list" else tmp_path / "*.tar"
    index = build_index(files, tmp_path / "index", encoder=encoder).path
    assert len(keys_of(index)) == 3
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 3}
    (tmp_path / "2.tar").unlink()
    if form == "list":
        with pytest.raises(DataError, match=r"2\.tar does not exist"):
            sync_index(index, encoder=encoder)
    else:
        assert counts(sync_index(index, encoder=encoder)) == {"removed": 1, "unchanged": 2}


def test_the_columns_of_a_table_are_remembered_and_can_be_changed(photos, tmp_path, encoder):
    table = tmp_path / "table.csv"
    table.write_text("file,caption,title\nred/red-0.png,one,two\nblue/blue-0.png,three,four\n")
    source = open_source(table, image="file", caption="title", image_root=photos, metadata=True)
    index = build_index(source, tmp_path / "index", encoder=encoder).path

    def captions():
        return sorted(VectorIndex.open(index).records()["captions"].to_pylist())

    assert captions() == [["four"], ["two"]]
    assert counts(sync_index(index, encoder=encoder)) == {"unchanged": 2}
    assert counts(sync_index(index, table, caption="caption")) == {"changed": 2}
    assert captions() == [["one"], ["three"]]
    assert counts(sync_index(index)) == {"unchanged": 2}
    with pytest.raises(DataError, match="no column 'none'"):
        sync_index(index, caption="none")


def test_what_was_in_memory_is_not_read_again(tmp_path, photos, encoder):
    pairs = [(square("red", shade=shade), f"caption {shade}") for shade in range(3)]
    index = build_index(pairs, tmp_path / "index", encoder).path
    with pytest.raises(DataError, match="given as Python objects, which cannot be read again"):
        sync_index(index, encoder=encoder)
    with pytest.raises(ArtifactError, match="not part of .*expected one of objects in memory"):
        sync_index(index, pairs, encoder)
    assert counts(add_images(index, pairs, encoder)) == {"added": 3}
    changes = add_images(index, photos, encoder)
    assert (changes.added, changes.prefix) == (16, "photos")
    assert counts(sync_index(index, photos, encoder)) == {"unchanged": 16}
    external = VectorIndex.from_vectors(np.eye(3), ["a", "b", "c"], path=tmp_path / "external")
    with pytest.raises(DataError, match="given as Python objects"):
        sync_index(external)
