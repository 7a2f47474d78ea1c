"""Whatever is done to an index, it answers as one built afresh of what it should hold."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clipkit.artifacts import MANIFEST
from clipkit.errors import ArtifactError, SpecError
from clipkit.index import vector_index
from clipkit.index.hits import Hit
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.indexes import DIM, MODEL, POOL, QUERIES, make_store, old_index, table
from tests.helpers.toys import records, unit_rows

# Of the ten best, the share that each spec finds at least; the exact ones in order.
LEAST = {
    "Flat": 1,
    "IDMap2,Flat": 1,
    "IVF4,Flat": 1,
    "HNSW16": 0.98,
    "SQ8": 0.95,
    "IVF4,SQ8": 0.95,
    "HNSW16,SQ8": 0.95,
    "PQ8x4fs": 0.5,
    "PQ8x4fs,RFlat": 0.98,
}


class Model:
    """What an index should hold: vector and id by key, in order."""

    def __init__(self, vectors):
        keys = [record["key"] for record in records(len(vectors))]
        self.vectors = dict(zip(keys, vectors, strict=True))
        self.ids = dict(zip(keys, range(len(vectors)), strict=True))
        self.next_id = len(vectors)

    def search(self, queries, k):
        if not self.vectors:
            return [[] for _ in queries]
        keys, rows = list(self.vectors), np.stack(list(self.vectors.values()))
        scores = queries @ rows.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [Hit(keys[n], float(row[n]), self.ids[keys[n]]) for n in best]
            for row, best in zip(scores, order, strict=True)
        ]


def assert_answers(index, model, least):
    assert len(index) == len(model.vectors)
    assert dict(zip(index.keys, index.records()["id"].to_pylist(), strict=True)) == model.ids
    expected, answers = model.search(QUERIES, 10), index.search_vectors(QUERIES, 10)
    same = 0
    for query, found, wanted in zip(QUERIES, answers, expected, strict=True):
        assert len(found) == len(wanted)
        # Whatever is found is alive, under its own id, with its exact score.
        assert [hit.id for hit in found] == [model.ids[hit.key] for hit in found]
        scores = [float(query @ model.vectors[hit.key]) for hit in found]
        np.testing.assert_allclose([hit.score for hit in found], scores, atol=1e-6)
        assert scores == sorted(scores, reverse=True)
        same += len({hit.key for hit in found} & {hit.key for hit in wanted})
        if least == 1:
            assert [hit.key for hit in found] == [hit.key for hit in wanted]
    assert same >= least * sum(map(len, expected))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(0, 99)),
        st.tuples(st.just("remove"), st.integers(1, 60), st.integers(0, 99)),
        st.tuples(st.just("replace"), st.integers(1, 20), st.integers(0, 99)),
        st.tuples(st.just("compact"), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


def take_step(path, model, kind, count, seed):
    rng = np.random.default_rng(seed)
    held = list(model.vectors)
    with IndexWriter(path) as writer:
        if kind == "compact":
            writer.commit(compact=True)
            return
        vectors = POOL[rng.choice(len(POOL), count, replace=False)]
        if kind == "add":
            keys = [f"new-{model.next_id + n}" for n in range(count)]
            writer.append(vectors, table(keys))
            model.ids |= {key: model.next_id + n for n, key in enumerate(keys)}
            model.next_id += count
        else:
            keys = [held[n] for n in rng.permutation(len(held))[:count]]
            writer.remove(keys)
            old = {key: (model.vectors.pop(key), model.ids[key]) for key in keys}
            if kind == "replace":
                vectors = vectors[: len(keys)]
                writer.append(vectors, table(keys, id=[old[key][1] for key in keys]))
            else:
                for key in keys:
                    del model.ids[key]
                keys, vectors = [], []
        model.vectors |= dict(zip(keys, vectors, strict=True))
        writer.commit()


@pytest.mark.parametrize("spec", LEAST)
@given(steps=STEPS)
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_sequence_of_changes_equals_a_fresh_index(tmp_path_factory, spec, steps):
    folder = tmp_path_factory.mktemp("life")
    vectors = unit_rows(100, DIM)
    VectorIndex.build(make_store(folder / "store", vectors), folder / "index", spec)
    model = Model(vectors)
    for step in steps:
        if step[0] == "compact" and len(model.vectors) < 16:
            continue  # too few to train on, which has a test of its own
        take_step(folder / "index", model, *step)
        assert_answers(VectorIndex.open(folder / "index"), model, LEAST[spec])


def test_a_base_too_small_to_train_is_left_as_it_is(tmp_path):
    store = make_store(tmp_path / "store", unit_rows(100, DIM))
    VectorIndex.build(store, tmp_path / "index", "IVF64,Flat")
    with IndexWriter(tmp_path / "index") as writer:
        writer.remove(store.keys[:50])
        index = writer.commit()
        with pytest.raises(SpecError, match="at least 64 vectors to train on, but there are 50"):
            writer.commit(compact=True)
    after = VectorIndex.open(tmp_path / "index")
    assert after.manifest == index.manifest
    assert after.search_vectors(QUERIES, 5) == index.search_vectors(QUERIES, 5)


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_what_is_added_costs_its_own_size_and_segments_stay_few(tmp_path):
    store, path = make_store(tmp_path / "store", unit_rows(300, DIM)), tmp_path / "index"
    VectorIndex.build(store, path, "HNSW8")
    base = {name: (path / name).stat().st_ino for name in ("index.faiss", "records.parquet")}
    for number in range(40):
        with IndexWriter(path) as writer:
            writer.append(POOL[number : number + 1], table([f"one-{number}"]))
            index = writer.commit()
        sizes = [segment.rows for segment in index.segments]
        assert sum(sizes) == 301 + number
        # Each later segment has more than twice the rows of the one that follows it.
        assert all(sizes[n] > 2 * sizes[n + 1] for n in range(1, len(sizes) - 1))
        assert len(sizes) <= 5
        assert len(names(path)) == 1 + 2 * len(sizes)
    assert base == {name: (path / name).stat().st_ino for name in base}
    with IndexWriter(path) as writer:
        index = writer.commit(compact=True)
    assert [segment.rows for segment in index.segments] == [340]
    assert len(names(path)) == 3


def test_ids_are_never_given_twice(tmp_path):
    store, path = make_store(tmp_path / "store", unit_rows(10, DIM)), tmp_path / "index"
    VectorIndex.build(store, path)
    with IndexWriter(path) as writer:
        writer.remove(store.keys)
        assert len(writer.commit()) == 0
        assert writer.commit(compact=True).search_vectors(QUERIES, 3) == [[]] * len(QUERIES)
        writer.append(POOL[:2], table(["a", "b"]))
        index = writer.commit()
    assert index.records()["id"].to_pylist() == [10, 11]


def test_columns_of_the_source_survive_whatever_is_done(tmp_path):
    store, path = make_store(tmp_path / "store", unit_rows(20, DIM)), tmp_path / "index"
    VectorIndex.build(store, path, "SQ8")
    with IndexWriter(path) as writer:
        writer.append(POOL[:2], table(["a", "b"], year=[1999, 2024], place=["Rome", None]))
        writer.commit()
        writer.append(POOL[2:3], table(["c"], year=[2025.5]))
        writer.commit()
        writer.remove(["b"])
        index = writer.commit(compact=True)
    rows = {row["key"]: (row["year"], row["place"]) for row in index.records().to_pylist()}
    assert (rows["a"], rows["c"]) == ((1999, "Rome"), (2025.5, None))
    assert rows["item-00000.png"] == (None, None)
    with IndexWriter(path) as writer, pytest.raises(ArtifactError, match="two types"):
        writer.append(POOL[:1], table(["d"], year=[[2024, 2025]]))
        writer.commit(compact=True)
    assert len(VectorIndex.open(path)) == 22


def test_columns_of_a_store_come_to_the_index(tmp_path):
    years = [1999, None, 2024, 2025]
    with EmbeddingStore.create(tmp_path / "store", MODEL, shard_size=2) as writer:
        rows = [row | {"year": y} for row, y in zip(records(4), years, strict=True)]
        del rows[1]["year"]
        writer.append(POOL[:4], rows)
        writer.append(POOL[4:5], records(1, start=4))
        store = writer.finish({})
    assert store.records()["year"].to_pylist() == [*years, None]
    index = VectorIndex.build(store, tmp_path / "index", "SQ8")
    assert index.records()["year"].to_pylist() == [*years, None]
    mixed = [row | {"year": y} for row, y in zip(records(2), (1, "x"), strict=True)]
    with (
        pytest.raises(ArtifactError, match="columns year .*one type"),
        EmbeddingStore.create(tmp_path / "other", MODEL) as writer,
    ):
        writer.append(POOL[:2], mixed)
        writer.finish({})


@pytest.mark.parametrize("spec", ["Flat", "HNSW8", "SQ8"])
def test_an_index_of_format_1_opens_and_lives_on(tmp_path, spec):
    vectors = unit_rows(50, DIM)
    path = old_index(tmp_path / "old", vectors, spec)
    before = VectorIndex.open(path)
    fresh = VectorIndex.build(make_store(tmp_path / "store", vectors), tmp_path / "new", "Flat")
    wanted = [[hit.key for hit in hits] for hits in fresh.search_vectors(QUERIES, 3)]
    if spec != "SQ8":
        assert [[hit.key for hit in hits] for hits in before.search(QUERIES, 3)] == wanted
    with IndexWriter(path) as writer:
        writer.remove("item-00007.png")
        writer.append(vectors[7:8], table(["seven"], id=[7]))
        writer.commit()
    index = VectorIndex.open(path)
    assert index.search_vectors(vectors[7:8], 1)[0][0].key == "seven"
    assert sorted(index.records()["id"].to_pylist()) == list(range(50))
    with IndexWriter(path) as writer:
        if spec == "SQ8":
            with pytest.raises(ArtifactError, match="older clipkit.*build the index again"):
                writer.commit(compact=True)
        else:
            writer.commit(compact=True)
            assert "index.faiss" not in names(path)
    assert VectorIndex.open(path).search_vectors(vectors[7:8], 1)[0][0] == Hit(
        "seven", pytest.approx(1)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.remove(["item-00003.pn"]), "no item 'item-00003.pn'.*mean 'item-00003.png'"),
        (
            lambda w: w.append(POOL[:1], table(["item-00003.png"])),
            "'item-00003.png' would .* twice",
        ),
        (lambda w: w.append(POOL[:2], table(["a", "a"])), "'a' would occur twice"),
        (lambda w: w.append(POOL[:2], table(["a"])), "one row per record"),
        (lambda w: w.append(np.full((1, DIM), np.nan, np.float32), table(["a"])), "length nan"),
        (lambda w: w.append(POOL[:1] * 2, table(["a"])), "unit length"),
        (lambda w: w.append(POOL[:1, :5], table(["a"])), r"expected float32 \[1, 16\]"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(tmp_path, change, said):
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(20, DIM)), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ArtifactError, match=said), IndexWriter(path) as writer:
        change(writer)
        writer.commit()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert names(tmp_path) == ["index", "store"]


def test_a_key_may_move_to_other_vectors_within_one_commit(tmp_path):
    store, path = make_store(tmp_path / "store", unit_rows(20, DIM)), tmp_path / "index"
    VectorIndex.build(store, path)
    with IndexWriter(path) as writer:
        writer.remove(["item-00003.png"])
        writer.append(POOL[:1], table(["item-00003.png"]))
        index = writer.commit()
    assert index.search_vectors(POOL[:1], 1)[0] == [Hit("item-00003.png", pytest.approx(1))]
    assert len(index) == 20


def test_two_writers_are_refused_and_so_is_building_meanwhile(tmp_path):
    store, path = make_store(tmp_path / "store", unit_rows(20, DIM)), tmp_path / "index"
    VectorIndex.build(store, path)
    with IndexWriter(path):
        with pytest.raises(ArtifactError, match="another process is writing"):
            IndexWriter(path)
        with pytest.raises(ArtifactError, match="another process is writing"):
            VectorIndex.build(store, path, "SQ8", replace=True)
        assert len(VectorIndex.open(path)) == 20
    with IndexWriter(path) as writer:
        writer.remove(store.keys[:1])
        writer.commit()
    assert VectorIndex.build(store, path, "SQ8", replace=True).spec == "SQ8"


def test_a_reader_keeps_what_it_opened(tmp_path):
    store, path = make_store(tmp_path / "store", unit_rows(60, DIM)), tmp_path / "index"
    VectorIndex.build(store, path, "SQ8")
    reader, twin = VectorIndex.open(path), VectorIndex.open(path)
    answers = twin.search_vectors(QUERIES, 5)
    with IndexWriter(path) as writer:
        writer.remove(store.keys[:50])
        writer.commit(compact=True)
    VectorIndex.build(store, path, "Flat", replace=True)
    # Nothing of it was read before its files were deleted.
    assert reader.search_vectors(QUERIES, 5) == answers
    assert reader.keys == store.keys
    assert np.concatenate([rows for rows, _ in reader.shards()]).shape == (60, DIM)


@pytest.mark.parametrize("change", ["compact", "build"])
def test_what_changes_while_it_is_opened_is_opened_as_it_is_then(tmp_path, monkeypatch, change):
    store, path = make_store(tmp_path / "store", unit_rows(60, DIM)), tmp_path / "index"
    VectorIndex.build(store, path, "SQ8")
    other = make_store(tmp_path / "other", POOL[:30])
    real, times = vector_index._open_segments, []

    def changing(place, manifest, held=None):
        """Open, but let another writer come after the manifest was read."""
        times.append(manifest.count)
        if len(times) == 1:
            monkeypatch.setattr(vector_index, "_open_segments", real)
            if change == "build":
                VectorIndex.build(other, path, "SQ8", replace=True)
            else:
                with IndexWriter(path) as writer:
                    writer.remove(store.keys[30:])
                    writer.commit(compact=True)
            monkeypatch.setattr(vector_index, "_open_segments", changing)
        return real(place, manifest, held)

    monkeypatch.setattr(vector_index, "_open_segments", changing)
    index = VectorIndex.open(path)
    assert times == [60, 30]
    assert len(index) == len(index.keys) == 30
    wanted = POOL[:30] if change == "build" else unit_rows(60, DIM)[:30]
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in index.shards()]), wanted)


@pytest.mark.parametrize("name", ["vectors.npy", "dead-000001-0.bin", "index-000002.faiss"])
@pytest.mark.parametrize("damage", ["remove", "cut", "empty"])
def test_damaged_parts_are_a_sentence(tmp_path, name, damage):
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(40, DIM)), path, "SQ8")
    with IndexWriter(path) as writer:
        writer.remove(["item-00000.png"])
        writer.commit()
        writer.append(POOL[:1], table(["a"]))
        writer.commit()
    file = path / name
    data = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes(data[: len(data) - 1] if damage == "cut" else b"")
    with pytest.raises(ArtifactError, match=rf"{name}.*build the index again"):
        VectorIndex.open(path)


@pytest.mark.parametrize("segments", [[], [{}], [{"rows": 1, "index": "../x"}], "x", [{"row": 1}]])
def test_a_manifest_that_was_tampered_with_is_a_sentence(tmp_path, segments):
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(40, DIM)), path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["detail"]["segments"] = segments
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="build the index again"):
        VectorIndex.open(path)


def test_only_vectors_of_images_are_named_npy(tmp_path):
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(40, DIM)), path, "SQ8")
    np.save(path / "questions.npy", unit_rows(5, DIM))  # captions, by an older version
    with IndexWriter(path) as writer:
        writer.remove(["item-00000.png"])
        writer.commit()
    assert (path / "dead-000001-0.bin").is_file()
    assert [file.name for file in path.glob("*.npy")] == ["vectors.npy"]
    assert np.load(path / "vectors.npy").shape == (40, DIM)


def test_removed_rows_of_an_older_version_are_read(tmp_path):
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(40, DIM)), path, "SQ8")
    with IndexWriter(path) as writer:
        writer.remove(["item-00007.png"])
        writer.commit()
    new, old = "dead-000001-0.bin", "dead-000001-0.npy"
    (path / new).rename(path / old)
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace(new, old))
    assert "item-00007.png" not in VectorIndex.open(path).keys
    with IndexWriter(path) as writer:
        writer.remove(["item-00008.png"])
        writer.commit()
    assert not (path / old).exists()
    assert len(VectorIndex.open(path)) == 38
