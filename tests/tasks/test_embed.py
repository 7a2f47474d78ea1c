import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from clipkit.artifacts import partial_path
from clipkit.data.images import content_hash
from clipkit.data.open_source import open_source
from clipkit.errors import ArtifactError, DataError, ModelMismatchError, SkipLimitError
from clipkit.store import incremental
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.embed import embed
from tests.helpers.paths import ROOT
from tests.helpers.toys import COLOURS, ColourEncoder, png, square, write_squares


def by_key(store):
    return dict(zip(store.keys, store.vectors(), strict=True))


def assert_same(store, expected):
    assert store.records().to_pylist() == expected.records().to_pylist()
    np.testing.assert_array_equal(store.vectors(), expected.vectors())


def test_each_image_gets_its_vector_and_its_record(tmp_path):
    keys = write_squares(tmp_path / "photos")
    encoder = ColourEncoder()
    store = embed(str(tmp_path / "photos"), tmp_path / "store", encoder, batch_size=5, workers=2)
    assert store.keys == keys
    expected = encoder.encode_images(
        [square(key.split("/")[0], shade=10 * int(key[-5])) for key in keys]
    )
    np.testing.assert_allclose(store.vectors(), expected, atol=1e-6)
    status = (tmp_path / "photos" / keys[3]).stat()
    assert store.records().to_pylist()[3] == {
        "key": "blue/blue-1.png",
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "captions": [],
        "label": "blue",
        "content_hash": content_hash(tmp_path / "photos" / keys[3]),
    }
    assert store.model == encoder.model
    assert store.manifest.source["spec"] == str(tmp_path / "photos")
    assert store.manifest.source["fingerprint"]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_workers_and_batch_size_change_nothing(tmp_path, workers, batch_size):
    write_squares(tmp_path / "photos")
    encoder = ColourEncoder()
    one = embed(tmp_path / "photos", tmp_path / "one", encoder)
    other = embed(
        tmp_path / "photos", tmp_path / "two", encoder, batch_size=batch_size, workers=workers
    )
    assert_same(other, one)


def test_captions_are_kept(tmp_path):
    (tmp_path / "photos").mkdir()
    square("red").save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a red square\nsomething red\n")
    square("blue").save(tmp_path / "photos" / "b.png")
    store = embed(tmp_path / "photos", tmp_path / "store", ColourEncoder())
    captions = {row["key"]: row["captions"] for row in store.records().to_pylist()}
    assert captions == {"a.png": ["a red square", "something red"], "b.png": []}


def write_table(path, colours):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": png(square(colour)), "path": None} for colour in colours]
    columns = {"key": [f"{n}.png" for n in range(len(colours))], "image": images}
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_a_table_are_known_by_key_and_size(tmp_path, streaming):
    write_table(tmp_path / "table.parquet", COLOURS)
    encoder = ColourEncoder()

    def run():
        source = open_source(tmp_path / "table.parquet", streaming=streaming)
        return embed(source, tmp_path / "store", encoder)

    store = run()
    sizes = [len(png(square(colour))) for colour in COLOURS]
    assert [(row["size"], row["mtime_ns"]) for row in store.records().to_pylist()] == [
        (size, 0) for size in sizes
    ]
    vectors = store.vectors()
    np.testing.assert_array_equal(run().vectors(), vectors)
    assert encoder.encoded == len(COLOURS)


def test_bad_images_are_left_out_and_listed(tmp_path):
    keys = write_squares(tmp_path / "photos")
    (tmp_path / "photos" / "red" / "red-0.png").write_bytes(b"")
    (tmp_path / "photos" / "blue" / "blue-1.png").write_bytes(png(square("blue"))[:40])
    (tmp_path / "photos" / "green" / "trap.jpg").mkdir()
    store = embed(tmp_path / "photos", tmp_path / "store", ColourEncoder())
    skipped = dict(store.skipped())
    assert sorted(skipped) == ["blue/blue-1.png", "green/trap.jpg", "red/red-0.png"]
    assert "empty" in skipped["red/red-0.png"]
    assert store.keys == [key for key in keys if key not in skipped]
    assert store.manifest.detail["skipped"] == 3


def test_more_bad_images_than_allowed_stop_the_run(tmp_path):
    keys = write_squares(tmp_path / "photos")
    for key in keys[: len(keys) // 2]:
        (tmp_path / "photos" / key).write_bytes(b"")
    embed(tmp_path / "photos", tmp_path / "store", ColourEncoder())
    (tmp_path / "photos" / keys[-1]).write_bytes(b"no picture")
    with pytest.raises(SkipLimitError, match=r"9 of 16 images.*black-0\.png: is empty.*50%"):
        embed(tmp_path / "photos", tmp_path / "other", ColourEncoder())
    store = embed(tmp_path / "photos", tmp_path / "other", ColourEncoder(), skip_limit=0.6)
    assert len(store) == 7


def test_all_bad_is_said_whatever_is_allowed(tmp_path):
    for key in write_squares(tmp_path / "photos"):
        (tmp_path / "photos" / key).write_bytes(b"no picture")
    with pytest.raises(SkipLimitError, match="all 16 images"):
        embed(tmp_path / "photos", tmp_path / "store", ColourEncoder(), skip_limit=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_large_source_is_given_up_early(tmp_path, monkeypatch):
    monkeypatch.setattr(incremental, "EARLIEST_STOP", 5)
    keys = write_squares(tmp_path / "photos", per_colour=20)
    for key in keys[:90]:
        (tmp_path / "photos" / key).write_bytes(b"")
    encoder = ColourEncoder()
    with pytest.raises(SkipLimitError, match="at least 81 of 160 images"):
        embed(tmp_path / "photos", tmp_path / "store", encoder)
    assert encoder.encoded == 0


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError):
        embed(tmp_path / "photos", tmp_path / "store", ColourEncoder())


def test_only_new_and_changed_images_are_encoded_again(tmp_path):
    photos, encoder = tmp_path / "photos", ColourEncoder()
    keys = write_squares(photos)
    embed(photos, tmp_path / "store", encoder)
    assert encoder.encoded == 16
    embed(photos, tmp_path / "store", encoder)
    assert encoder.encoded == 16

    (photos / "red" / "red-0.png").unlink()
    square("magenta", shade=99).save(photos / "blue" / "blue-0.png")
    os.utime(photos / "blue" / "blue-0.png", ns=(1, 1))
    square("cyan", shade=99).save(photos / "green" / "new.png")
    (photos / "white" / "white-1.png").write_bytes(b"spoilt")
    store = embed(photos, tmp_path / "store", encoder)
    assert encoder.encoded == 18
    fresh = embed(photos, tmp_path / "fresh", ColourEncoder())
    assert set(store.keys) == {*keys, "green/new.png"} - {"red/red-0.png", "white/white-1.png"}
    assert by_key(store).keys() == by_key(fresh).keys()
    for key, vector in by_key(store).items():
        np.testing.assert_array_equal(vector, by_key(fresh)[key])
    assert list(store.skipped()) == list(fresh.skipped())


def test_unchanged_images_get_their_new_captions(tmp_path):
    photos, encoder = tmp_path / "photos", ColourEncoder()
    photos.mkdir()
    square("red").save(photos / "a.png")
    (photos / "a.txt").write_text("red")
    embed(photos, tmp_path / "store", encoder)
    (photos / "a.txt").write_text("very red")
    store = embed(photos, tmp_path / "store", encoder)
    assert store.records()["captions"].to_pylist() == [["very red"]]
    assert encoder.encoded == 1


def test_a_store_of_another_model_is_refused_and_stays(tmp_path):
    write_squares(tmp_path / "photos")
    before = embed(tmp_path / "photos", tmp_path / "store", ColourEncoder("one"))
    with pytest.raises(ModelMismatchError, match=r"one/toy.*two/toy.*another place") as caught:
        embed(tmp_path / "photos", tmp_path / "store", ColourEncoder("two"))
    assert "--out" in str(caught.value)
    assert EmbeddingStore.open(tmp_path / "store").manifest == before.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "store"]


def test_a_directory_of_something_else_is_refused(tmp_path):
    write_squares(tmp_path / "photos")
    with pytest.raises(ArtifactError, match="is not a clipkit store"):
        embed(tmp_path / "photos", tmp_path / "photos" / "red", ColourEncoder())
    assert (tmp_path / "photos" / "red" / "red-0.png").exists()


class Interrupted(ColourEncoder):
    """Presses Ctrl-C at its second batch."""

    def encode_images(self, images, batch_size=64):
        if self.encoded:
            raise KeyboardInterrupt
        return super().encode_images(images)


def test_ctrl_c_keeps_what_is_encoded_and_says_how_to_go_on(tmp_path, capsys):
    write_squares(tmp_path / "photos")
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "photos", tmp_path / "store", Interrupted(), batch_size=6)
    said = capsys.readouterr().err
    assert "6 encoded images are saved" in said
    assert "run the same command again" in said
    encoder = ColourEncoder()
    store = embed(tmp_path / "photos", tmp_path / "store", encoder)
    assert encoder.encoded == 10
    assert_same(store, embed(tmp_path / "photos", tmp_path / "fresh", ColourEncoder()))


def test_what_changed_while_interrupted_is_not_kept(tmp_path):
    photos = tmp_path / "photos"
    write_squares(photos)
    with pytest.raises(KeyboardInterrupt):
        embed(photos, tmp_path / "store", Interrupted(), batch_size=6)
    (photos / "black" / "black-0.png").unlink()
    square("yellow", size=9).save(photos / "black" / "black-1.png")
    store = embed(photos, tmp_path / "store", ColourEncoder())
    fresh = embed(photos, tmp_path / "fresh", ColourEncoder())
    assert len(store) == len(by_key(store)) == 15
    assert by_key(store).keys() == by_key(fresh).keys()
    for key, vector in by_key(store).items():
        np.testing.assert_array_equal(vector, by_key(fresh)[key])


def test_what_became_unusable_while_interrupted_is_not_kept(tmp_path):
    photos = tmp_path / "photos"
    keys = write_squares(photos)
    with pytest.raises(KeyboardInterrupt):
        embed(photos, tmp_path / "store", Interrupted(), batch_size=6)
    (photos / "black" / "black-0.png").unlink()
    (photos / "black" / "black-0.png").mkdir()
    store = embed(photos, tmp_path / "store", ColourEncoder())
    assert store.keys == keys[1:]
    assert [key for key, _ in store.skipped()] == ["black/black-0.png"]


def test_an_update_of_a_store_can_be_interrupted_too(tmp_path):
    photos = tmp_path / "photos"
    write_squares(photos)
    embed(photos, tmp_path / "store", ColourEncoder())
    for number in range(20):
        square("green", shade=50 + number).save(photos / "green" / f"more-{number:02d}.png")
    with pytest.raises(KeyboardInterrupt):
        embed(photos, tmp_path / "store", Interrupted(), batch_size=8)
    assert len(EmbeddingStore.open(tmp_path / "store")) == 16
    encoder = ColourEncoder()
    store = embed(photos, tmp_path / "store", encoder)
    assert encoder.encoded == 12
    fresh = embed(photos, tmp_path / "fresh", ColourEncoder())
    assert by_key(store).keys() == by_key(fresh).keys()
    assert not partial_path(tmp_path / "store").exists()


EMBED_AND_DIE = """
import os, signal, sys, time
from pathlib import Path
from tests.helpers.paths import ROOT
from tests.helpers.toys import ColourEncoder
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.embed import embed

class Dying(ColourEncoder):
    def encode_images(self, images, batch_size=64):
        if self.encoded >= 24:
            # Shards are written in the background: until the second one stands.
            second = Path(sys.argv[2]).parent / ".store.partial" / "records-00001.parquet"
            while not second.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(images)

create = EmbeddingStore.create
EmbeddingStore.create = lambda path, model, **rest: create(path, model, shard_size=10, **rest)
embed(Path(sys.argv[1]), Path(sys.argv[2]), Dying(), batch_size=6)
"""


def test_a_killed_run_goes_on_and_ends_as_if_never_killed(tmp_path):
    write_squares(tmp_path / "photos", per_colour=5)
    command = [sys.executable, "-c", EMBED_AND_DIE, tmp_path / "photos", tmp_path / "store"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    encoder = ColourEncoder()
    store = embed(tmp_path / "photos", tmp_path / "store", encoder)
    # 24 were encoded: two shards of ten stand, the four in the open shard are lost.
    assert encoder.encoded == 20
    assert_same(store, embed(tmp_path / "photos", tmp_path / "fresh", ColourEncoder()))


def test_a_moved_folder_keeps_its_vectors(tmp_path):
    encoder = ColourEncoder()
    write_squares(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "store", encoder)
    shutil.move(tmp_path / "photos", tmp_path / "pictures")
    embed(tmp_path / "pictures", tmp_path / "store", encoder)
    assert encoder.encoded == 16
