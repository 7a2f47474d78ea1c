import json
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from clipkit.artifacts import ModelRef, partial_path
from clipkit.errors import ArtifactError, ModelMismatchError
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.paths import ROOT
from tests.helpers.toys import records, unit_rows

MODEL = ModelRef("toy", "a", "fingerprint-a", 4)
OTHER = ModelRef("toy", "b", "fingerprint-b", 4)


def write(path, count, shard_size=10, model=MODEL):
    vectors = unit_rows(count, model.dim)
    with EmbeddingStore.create(path, model, shard_size=shard_size) as writer:
        writer.append(vectors, records(count))
        return writer.finish({"spec": "made up"})


def test_what_goes_in_comes_out(tmp_path):
    store = write(tmp_path / "store", 25)
    assert (len(store), store.model, store.dim) == (25, MODEL, 4)
    assert store.manifest.source == {"spec": "made up"}
    np.testing.assert_array_equal(store.vectors(), unit_rows(25, 4))
    assert store.records().to_pylist() == records(25)
    assert store.keys == [record["key"] for record in records(25)]
    assert [len(vectors) for vectors, _ in store.shards()] == [10, 10, 5]
    assert all(isinstance(vectors, np.memmap) for vectors, _ in store.shards())


def test_the_files_are_those_of_the_convention_and_nothing_else(tmp_path):
    write(tmp_path / "store", 15)
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == [
        "manifest.json",
        "records-00000.parquet",
        "records-00001.parquet",
        "skipped.jsonl",
        "vectors-00000.npy",
        "vectors-00001.npy",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_rows_appended_in_any_portions_give_the_same_store(tmp_path):
    vectors, rows = unit_rows(25, 4), records(25)
    with EmbeddingStore.create(tmp_path / "store", MODEL, shard_size=10) as writer:
        for start, stop in [(0, 1), (1, 1), (1, 22), (22, 25)]:
            writer.append(vectors[start:stop], rows[start:stop])
        store = writer.finish({})
    np.testing.assert_array_equal(store.vectors(), vectors)
    assert store.records().to_pylist() == rows


def test_an_empty_store_opens(tmp_path):
    store = write(tmp_path / "store", 0)
    assert len(store) == 0
    assert store.vectors().shape == (0, 4)
    assert store.keys == []


def test_skipped_items_are_listed_whatever_their_name(tmp_path):
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        writer.skip("bad.jpg", "truncated")
        writer.skip("caf\udce9.jpg", "name is not UTF-8")
        store = writer.finish({})
    assert list(store.skipped()) == [
        ("bad.jpg", "truncated"),
        ("caf\udce9.jpg", "name is not UTF-8"),
    ]
    assert store.manifest.detail["skipped"] == 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda v: v.astype(np.float64), "float64"),
        (lambda v: v[:, :3], r"\[3, 3\], expected float32 \[3, 4\]"),
        (lambda v: v[:2], r"\[2, 4\], expected float32 \[3, 4\]"),
        (lambda v: v[0], r"\[4\], expected"),
        (lambda v: v * np.array([[1], [1.01], [1]], np.float32), "item-00001.png.*length 1.01"),
        (lambda v: np.where(np.eye(3, 4) > 0, np.float32("nan"), v), "item-00000.png.*nan"),
        (lambda v: np.where(np.eye(3, 4) > 0, np.float32("inf"), v), "item-00000.png.*inf"),
    ],
)
def test_bad_vectors_are_refused_and_nothing_is_added(tmp_path, spoil, said):
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        with pytest.raises(ArtifactError, match=said):
            writer.append(spoil(unit_rows(3, 4)), records(3))
        assert writer.done == {}
        assert len(writer.finish({})) == 0


def test_a_key_comes_once(tmp_path):
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        writer.append(unit_rows(1, 4), records(1))
        with pytest.raises(ArtifactError, match=r"item-00000\.png.* already in"):
            writer.append(unit_rows(1, 4), records(1))


def test_an_exception_keeps_the_rows_and_the_next_writer_goes_on(tmp_path):
    path, vectors, rows = tmp_path / "store", unit_rows(25, 4), records(25)
    with suppress(KeyboardInterrupt), EmbeddingStore.create(path, MODEL, shard_size=10) as writer:
        writer.append(vectors[:13], rows[:13])
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(ArtifactError, match="half-written"):
        EmbeddingStore.open(path)
    with EmbeddingStore.create(path, MODEL, shard_size=10) as writer:
        assert list(writer.done) == [row["key"] for row in rows[:13]]
        writer.append(vectors[13:], rows[13:])
        store = writer.finish({})
    np.testing.assert_array_equal(store.vectors(), vectors)
    assert store.records().to_pylist() == rows


def test_an_exception_before_any_row_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), EmbeddingStore.create(tmp_path / "store", MODEL):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def interrupted(path, count=25, shard_size=10):
    """Leave behind a half-written store of `count` rows, as a killed process would."""
    writer = EmbeddingStore.create(path, MODEL, shard_size=shard_size)
    writer.append(unit_rows(count, 4), records(count))
    writer._shards.wait()
    writer._artifact._lock.release()
    writer._skipped.close()
    return partial_path(path)


def test_a_half_written_store_of_another_model_is_refused_with_both_names(tmp_path):
    interrupted(tmp_path / "store")
    with pytest.raises(ModelMismatchError, match=r"toy/a .*toy/b ") as caught:
        EmbeddingStore.create(tmp_path / "store", OTHER)
    assert "remove" in str(caught.value)
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        assert len(writer.done) == 20


@pytest.mark.parametrize(
    "tear",
    [
        lambda half: (half / "records-00001.parquet").unlink(),
        lambda half: _truncate(half / "vectors-00001.npy"),
        lambda half: _truncate(half / "records-00001.parquet"),
        lambda half: (half / "vectors-00001.npy").write_bytes(b""),
        lambda half: np.save(half / "vectors-00001.npy", unit_rows(9, 4)),
        lambda half: np.save(half / "vectors-00001.npy", unit_rows(10, 5)),
        lambda half: (half / ".vectors-00002.npy.tmp").write_bytes(b"torn"),
        lambda half: (half / "manifest.json").write_text("{}"),
    ],
)
def test_a_torn_last_shard_is_written_again(tmp_path, tear):
    path, vectors, rows = tmp_path / "store", unit_rows(25, 4), records(25)
    tear(interrupted(path))
    with EmbeddingStore.create(path, MODEL, shard_size=10) as writer:
        held = len(writer.done)
        assert held in (10, 20)
        writer.append(vectors[held:], rows[held:])
        store = writer.finish({})
    np.testing.assert_array_equal(store.vectors(), vectors)
    assert store.records().to_pylist() == rows
    assert not list(path.glob(".*"))


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def test_a_half_written_store_of_unknown_origin_is_not_trusted(tmp_path):
    half = interrupted(tmp_path / "store")
    (half / "partial.json").unlink()
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        assert writer.done == {}


def test_forgotten_rows_are_gone_even_when_the_renewing_run_was_interrupted(tmp_path):
    path, vectors, rows = tmp_path / "store", unit_rows(25, 4), records(25)
    interrupted(path)
    renewed = rows[3] | {"size": 999}
    with suppress(KeyboardInterrupt), EmbeddingStore.create(path, MODEL) as writer:
        writer.forget(rows[3]["key"])
        writer.append(vectors[24:], [renewed])
        raise KeyboardInterrupt
    with EmbeddingStore.create(path, MODEL) as writer:
        for row in rows[10:20]:
            writer.forget(row["key"])
        store = writer.finish({})
    expected = [*range(3), *range(4, 10)]
    np.testing.assert_array_equal(store.vectors(), vectors[[*expected, 24]])
    assert store.records().to_pylist() == [*(rows[n] for n in expected), renewed]


def test_an_existing_store_is_replaced_only_on_demand_and_in_one_step(tmp_path):
    path = tmp_path / "store"
    old = write(path, 12)
    with pytest.raises(ArtifactError, match="already holds a clipkit store"):
        EmbeddingStore.create(path, MODEL)
    with EmbeddingStore.create(path, MODEL, replace=True) as writer:
        writer.append(*[part[:3] for part in (old.vectors(), records(3))])
        assert len(EmbeddingStore.open(path)) == 12
        writer.finish({})
    assert len(EmbeddingStore.open(path)) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_two_writers_are_refused(tmp_path):
    with (
        EmbeddingStore.create(tmp_path / "store", MODEL),
        pytest.raises(ArtifactError, match="another process is writing"),
    ):
        EmbeddingStore.create(tmp_path / "store", MODEL)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: _truncate(path / "vectors-00001.npy"),
        lambda path: _truncate(path / "records-00001.parquet"),
        lambda path: (path / "records-00001.parquet").unlink(),
        lambda path: (path / "records-00001.parquet").write_text("key,size\n"),
        lambda path: np.save(path / "vectors-00001.npy", np.array([{"a": 1}], object)),
        lambda path: np.save(path / "vectors-00001.npy", unit_rows(10, 4).astype(np.float16)),
    ],
)
def test_a_damaged_shard_is_named_in_a_sentence(tmp_path, damage):
    write(tmp_path / "store", 25)
    damage(tmp_path / "store")
    store = EmbeddingStore.open(tmp_path / "store")
    with pytest.raises(ArtifactError, match=r"-00001\.\w+ is damaged .*rebuild it"):
        store.vectors()


def test_missing_shards_and_rows_are_noticed(tmp_path):
    path = tmp_path / "store"
    write(path, 25)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"count": 26}))
    with pytest.raises(ArtifactError, match="holds 25 rows, its manifest says 26"):
        EmbeddingStore.open(path).vectors()
    (path / "vectors-00002.npy").unlink()
    with pytest.raises(ArtifactError, match="holds 2 shards of vectors, its manifest says 3"):
        EmbeddingStore.open(path)


WRITE_UNDER_A_LIMIT = """
import resource, sys
from tests.helpers.toys import records, unit_rows
from clipkit.artifacts import ModelRef
from clipkit.errors import ArtifactError
from clipkit.store.embedding_store import EmbeddingStore
model = ModelRef("toy", "a", "fingerprint-a", 4)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    with EmbeddingStore.create(sys.argv[1], model, shard_size=100) as writer:
        writer.append(unit_rows(100, 4), records(100))
        writer.shard_size = 10_000
        writer.append(unit_rows(900, 4), records(900, start=100))
        writer.finish({})
except ArtifactError as error:
    print(error)
"""


def test_a_full_disk_is_a_sentence_and_finished_shards_stay(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WRITE_UNDER_A_LIMIT, tmp_path / "store"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "cannot be written" in done.stdout, done.stderr
    assert "make room" in done.stdout
    assert not (tmp_path / "store").exists()
    assert not list(partial_path(tmp_path / "store").glob("*.tmp"))
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        assert len(writer.done) == 100


WRITE_AND_DIE = """
import os, signal, sys
from tests.helpers.toys import records, unit_rows
from clipkit.artifacts import ModelRef
from clipkit.store.embedding_store import EmbeddingStore
model = ModelRef("toy", "a", "fingerprint-a", 4)
with EmbeddingStore.create(sys.argv[1], model, shard_size=10) as writer:
    held = len(writer.done)
    vectors, rows = unit_rows(45, 4), records(45)
    for number in range(held, 45):
        if number == held + 17:
            writer._shards.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        writer.append(vectors[number:number + 1], rows[number:number + 1])
    writer.finish({})
"""


def test_kill_9_loses_at_most_the_open_shard(tmp_path):
    command = [sys.executable, "-c", WRITE_AND_DIE, tmp_path / "store"]
    codes = [subprocess.run(command, cwd=ROOT).returncode for _ in range(4)]
    # Each life adds ten rows: a whole shard, while the seven rows of the open one are lost.
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0]
    store = EmbeddingStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.vectors(), unit_rows(45, 4))
    assert store.records().to_pylist() == records(45)
