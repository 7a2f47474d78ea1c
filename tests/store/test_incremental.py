"""Files found again without encoding: by size and time, by content, and in stores of old."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.data.images import content_hash
from clipkit.errors import ArtifactError, ImageError
from clipkit.index.vector_index import VectorIndex
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from tests.helpers.toys import ColourEncoder, png, square, write_squares


@pytest.fixture
def photos(tmp_path):
    write_squares(tmp_path / "photos")
    return tmp_path / "photos"


def assert_as_fresh(store, photos):
    fresh = embed(photos, store.path.with_name("fresh"), ColourEncoder())
    rows, expected = (
        {row["key"]: (row, vector.tolist()) for row, vector in zip(r, v, strict=True)}
        for r, v in ((s.records().to_pylist(), s.vectors()) for s in (store, fresh))
    )
    assert rows == expected


def test_the_hash_is_of_the_content_alone(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 3_000_000)
    other.write_bytes(b"a" * 3_000_000)
    assert content_hash(one) == content_hash(other) == content_hash(one.read_bytes())
    other.write_bytes(b"a" * 2_999_999 + b"b")
    assert content_hash(one) != content_hash(other)
    # XXH3's own value, so that stores of different machines and times agree.
    assert content_hash(b"a") == "a96faf705af16834e6c632b61e964e1f"


def test_what_cannot_be_hashed_says_why(tmp_path):
    (tmp_path / "empty").touch()
    for source, reason in [
        (tmp_path / "empty", "is empty"),
        (tmp_path / "gone", "cannot be opened"),
        (tmp_path, "is a directory"),
    ]:
        with pytest.raises(ImageError, match=reason):
            content_hash(source)


def test_renamed_and_touched_images_are_not_encoded_again(photos, tmp_path):
    encoder = ColourEncoder()
    embed(photos, tmp_path / "store", encoder)
    shutil.move(photos / "red" / "red-0.png", photos / "blue" / "was-red.png")
    shutil.move(photos / "green", photos / "verdant")
    shutil.copyfile(photos / "cyan" / "cyan-0.png", photos / "cyan" / "copy.png")
    os.utime(photos / "white" / "white-0.png", ns=(5, 5))
    store = embed(photos, tmp_path / "store", encoder)
    assert encoder.encoded == 16
    assert_as_fresh(store, photos)


def test_an_image_of_another_content_under_an_old_name_is_encoded(photos, tmp_path):
    encoder = ColourEncoder()
    embed(photos, tmp_path / "store", encoder)
    shutil.move(photos / "red" / "red-0.png", photos / "kept.png")
    square("blue", shade=77).save(photos / "red" / "red-0.png")
    store = embed(photos, tmp_path / "store", encoder)
    assert encoder.encoded == 17
    assert_as_fresh(store, photos)


def table(path, shades):
    images = [{"bytes": png(square("red", shade=shade)), "path": None} for shade in shades]
    columns = {"key": [f"{n}.png" for n in range(len(shades))], "image": images}
    pq.write_table(pa.table(columns), path)
    return path


def test_images_of_a_table_are_told_apart_by_content(tmp_path):
    encoder = ColourEncoder()
    path = table(tmp_path / "table.parquet", [1, 2, 3])
    embed(path, tmp_path / "store", encoder)
    # The second is another picture of the same size in bytes, the third a new row of old content.
    table(path, [1, 4, 3, 2])
    sizes = {len(png(square("red", shade=shade))) for shade in (2, 4)}
    assert len(sizes) == 1
    store = embed(path, tmp_path / "store", encoder)
    assert encoder.encoded == 4
    assert_as_fresh(store, path)


def make_old(path):
    """Take out what clipkit did not write before there were hashes and ways to decode."""
    for file in path.glob("records*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns("content_hash"), file)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("decode", "segments"):
        manifest["detail"].pop(name, None)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_store_of_old_opens_and_gets_its_hashes_without_encoding(photos, tmp_path):
    encoder = ColourEncoder()
    first = embed(photos, tmp_path / "store", encoder, decode="exact")
    make_old(first.path)
    old = EmbeddingStore.open(first.path)
    assert old.decode == "exact"
    assert old.records()["content_hash"].null_count == len(old) == 16
    np.testing.assert_array_equal(old.vectors(), first.vectors())

    index = build_index(old.path, tmp_path / "index")
    make_old(index.path)
    assert VectorIndex.open(index.path).decode == "exact"
    assert VectorIndex.open(index.path).records().num_rows == 16

    store = embed(photos, tmp_path / "store", encoder)
    assert (encoder.encoded, store.decode) == (16, "exact")
    fresh = embed(photos, tmp_path / "fresh", ColourEncoder(), decode="exact")
    rows = [sorted(s.records().to_pylist(), key=lambda row: row["key"]) for s in (store, fresh)]
    assert rows[0] == rows[1]
    shutil.move(photos / "red", photos / "rouge")
    embed(photos, tmp_path / "store", encoder)
    assert encoder.encoded == 16


def test_the_way_pictures_are_read_is_recorded_followed_and_not_mixed(photos, tmp_path):
    encoder = ColourEncoder()
    assert embed(photos, tmp_path / "new", encoder).decode == "exact"
    assert embed(photos, tmp_path / "fast", encoder, decode="fast").decode == "fast"
    assert embed(photos, tmp_path / "fast", encoder).decode == "fast"
    store = embed(photos, tmp_path / "store", encoder, decode="exact")
    assert store.manifest.detail["decode"] == "exact"
    said = r"store was made with --decode exact, asked for is fast; .*another place with --out"
    with pytest.raises(ArtifactError, match=said):
        embed(photos, tmp_path / "store", encoder, decode="fast")
    assert embed(photos, tmp_path / "store", encoder).decode == "exact"
    assert build_index(store.path, tmp_path / "index").decode == "exact"
    made = build_index(photos, tmp_path / "other", encoder=ColourEncoder(), decode="exact")
    assert made.decode == "exact"


class Interrupted(ColourEncoder):
    def encode_images(self, images, batch_size=64):
        if self.encoded:
            raise KeyboardInterrupt
        return super().encode_images(images)


def test_a_half_written_store_is_gone_on_with_in_its_own_way(photos, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(photos, tmp_path / "store", Interrupted(), batch_size=6, decode="exact")
    with pytest.raises(ArtifactError, match=r"half-written store made with --decode exact"):
        embed(photos, tmp_path / "store", ColourEncoder(), decode="fast")
    encoder = ColourEncoder()
    assert embed(photos, tmp_path / "store", encoder).decode == "exact"
    assert encoder.encoded == 10
