import json
import subprocess
import sys

import faiss
import numpy as np
import pytest

from clipkit.artifacts import ModelRef
from clipkit.errors import ArgumentError, ArtifactError, SpecError
from clipkit.index.faiss_factory import new_index
from clipkit.index.hits import Hit
from clipkit.index.vector_index import VectorIndex
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.toys import records, unit_rows

DIM = 16
MODEL = ModelRef("toy", "a", "fingerprint-a", DIM)


def make_store(path, vectors, shard_size=300):
    with EmbeddingStore.create(path, MODEL, shard_size=shard_size) as writer:
        writer.append(vectors, records(len(vectors)))
        return writer.finish({"spec": "made up"})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("index") / "store", unit_rows(1000, DIM))


def slow_search(queries, vectors, k):
    """The obvious way: all inner products, sorted; equal ones in row order."""
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    keys = [record["key"] for record in records(len(vectors))]
    return [
        [Hit(keys[n], float(row[n])) for n in best] for row, best in zip(scores, order, strict=True)
    ]


def keys_of(answers):
    return [[hit.key for hit in hits] for hits in answers]


@pytest.mark.parametrize("spec", ["Flat", "IDMap,Flat", "IDMap2,Flat", "IVF16,Flat", "RR16,Flat"])
def test_exact_specs_equal_the_sorted_product(store, tmp_path, spec):
    queries = unit_rows(50, DIM, seed=1)
    answers = VectorIndex.build(store, tmp_path / "index", spec).search_vectors(queries, 10)
    expected = slow_search(queries, store.vectors(), 10)
    assert keys_of(answers) == keys_of(expected)
    scores, wanted = (
        [[hit.score for hit in hits] for hits in all_] for all_ in (answers, expected)
    )
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        ("HNSW16", 0.97),
        ("HNSW16,SQ8", 0.95),
        ("IDMap2,HNSW16", 0.97),
        ("SQ8", 0.95),
        ("SQfp16", 0.99),
        ("PQ8x4", 0.5),
        ("PQ8x4fs,RFlat", 0.97),
        ("IVF64,Flat", 0.9),
        ("IVF64_HNSW8,Flat", 0.9),
        ("IVF16,PQ8x4fs,RFlat", 0.97),
        ("OPQ8_16,IVF16,PQ8x4", 0.5),
        ("IVF16,SQ8,Refine(SQfp16)", 0.97),
    ],
)
def test_approximate_specs_find_most_of_it(store, tmp_path, spec, least):
    queries = unit_rows(50, DIM, seed=1)
    VectorIndex.build(store, tmp_path / "index", spec)
    answers = VectorIndex.open(tmp_path / "index").search_vectors(queries, 10)
    expected = keys_of(slow_search(queries, store.vectors(), 10))
    found = [len({*a} & {*b}) for a, b in zip(keys_of(answers), expected, strict=True)]
    assert np.sum(found) / 500 >= least
    for hits in answers:
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_search_settings_are_recorded_and_applied(store, tmp_path):
    path = tmp_path / "index"
    built = VectorIndex.build(store, path, "IDMap2,IVF64,SQ8")
    detail = dict(built.manifest.detail)
    (segment,) = detail.pop("segments")
    assert segment["rows"] == 1000
    assert detail == {
        "spec": "IDMap2,IVF64,SQ8",
        "search": {"nprobe": 32},
        "trained_on": 1000,
        "generation": 0,
        "next_id": 1000,
        "decode": "exact",
    }
    assert (built.spec, built.model, len(built)) == ("IDMap2,IVF64,SQ8", MODEL, 1000)
    assert built.manifest.source == {"spec": "made up", "store": str(store.path)}
    query = unit_rows(1, DIM, seed=1)
    assert len(built.search_vectors(query, 1000)[0]) < 1000
    change(path, {"search": {"nprobe": 64}})
    assert len(VectorIndex.open(path).search_vectors(query, 1000)[0]) == 1000
    change(path, {"search": {"nprobes": 64}})
    with pytest.raises(SpecError, match="nprobes=64"):
        VectorIndex.open(path)


def change(path, detail=None, **fields):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["detail"].update(detail or {})
    (path / "manifest.json").write_text(json.dumps(manifest | fields))


def test_k_beyond_the_index_gives_what_there_is(tmp_path):
    vectors = unit_rows(5, DIM)
    store = make_store(tmp_path / "store", vectors)
    for spec in ("Flat", "IVF2,Flat", "HNSW8", "SQ8"):
        index = VectorIndex.build(store, tmp_path / "index", spec, replace=True)
        (hits,) = index.search_vectors(vectors[:1], 100)
        assert hits[0].key == "item-00000.png"
        assert sorted(hit.key for hit in hits) == store.keys


def test_cells_that_are_not_searched_give_fewer_hits_and_no_strangers(store, tmp_path):
    index = VectorIndex.build(store, tmp_path / "index", "IVF64,Flat")
    change(tmp_path / "index", {"search": {"nprobe": 1}})
    index = VectorIndex.open(tmp_path / "index")
    for hits in index.search_vectors(unit_rows(50, DIM, seed=1), 500):
        assert 0 < len(hits) < 500
        assert len({hit.key for hit in hits}) == len(hits)


def test_equal_scores_come_in_row_order(tmp_path):
    twins = np.repeat(unit_rows(1, DIM), 6, axis=0)
    index = VectorIndex.build(make_store(tmp_path / "store", twins), tmp_path / "index")
    (hits,) = index.search_vectors(twins[:1], 6)
    assert [hit.key for hit in hits] == [record["key"] for record in records(6)]


def test_an_empty_store_makes_an_empty_index(tmp_path):
    empty = make_store(tmp_path / "store", np.empty((0, DIM), np.float32))
    index = VectorIndex.build(empty, tmp_path / "index")
    assert len(index) == 0
    assert index.search_vectors(unit_rows(2, DIM), 5) == [[], []]
    with pytest.raises(SpecError, match="needs at least 4 vectors to train on, but there are 0"):
        VectorIndex.build(empty, tmp_path / "other", "IVF4,Flat")


def test_no_queries_no_answers(store, tmp_path):
    index = VectorIndex.build(store, tmp_path / "index")
    assert index.search_vectors(np.empty((0, DIM), np.float32), 5) == []


@pytest.mark.parametrize(
    ("queries", "k", "said"),
    [
        (np.ones((2, DIM + 1), np.float32), 5, r"shape \[2, 17\], expected \[n, 16\].*toy/a"),
        (np.ones(DIM, np.float32), 5, r"shape \[16\]"),
        (np.full((1, DIM), np.nan, np.float32), 5, "NaN"),
        (np.full((1, DIM), np.inf, np.float32), 5, "infinite"),
        (np.ones((1, DIM), np.float32), 0, "k is 0"),
        (np.ones((1, DIM), np.float32), -3, "k is -3"),
    ],
)
def test_bad_queries_are_refused(store, tmp_path, queries, k, said):
    index = VectorIndex.build(store, tmp_path / "index")
    with pytest.raises((ArtifactError, ArgumentError), match=said):
        index.search_vectors(queries, k)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("Bogus", r"could not parse index string Bogus.*use for example Flat"),
        ("", "could not parse"),
        ("Flat,,", "could not parse"),
        ("IVF4,HNSW16", "could not parse code description HNSW16"),
        ("PQ5x4", "multiple of the number of subquantizers"),
        ("PQ8x40", "nbits larger than 24"),
        ("IVF2000,Flat", "at least 2000 vectors to train on, but there are 1000"),
        ("IDMap2,IVF2000,Flat", "at least 2000 vectors"),
        ("PQ8x12", "at least 4096 vectors"),
        ("IVF4,PQ8x12", "at least 4096 vectors"),
        ("IVF40(PQ4x8),Flat", "at least 256 vectors|number of clusters"),
        ("IVF0,Flat", "IVF0, expected a number from 1"),
        ("IVF99999999999,Flat", "IVF99999999999, expected"),
        ("HNSW1", "HNSW1, expected a number from 2"),
        ("HNSW99999", "HNSW99999, expected"),
        ("LSH", "METRIC_L2"),
        ("IMI2x2,Flat", "not implemented for inner prod"),
        ("HNSW8_PQ4x4", "L2 distance only"),
        ("IDMap,HNSW8_PQ4x4", "L2 distance only"),
        ("HNSW8_PQ4x4,RFlat", "L2 distance only"),
        ("PCA8,Flat", "centres the vectors"),
        ("PCA8,IVF4,Flat,RFlat", "centres the vectors"),
        ("NSG16,Flat", "incremental addition"),
    ],
)
def test_impossible_specs_are_refused_and_nothing_is_left(store, tmp_path, spec, said):
    with pytest.raises(SpecError, match=said) as caught:
        VectorIndex.build(store, tmp_path / "index", spec)
    assert "faiss::" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_opq_needs_256_vectors_before_any_work():
    with pytest.raises(SpecError, match="at least 256 vectors to train on, but there are 255"):
        new_index("OPQ8_16,IVF4,PQ8x4", DIM, 255)
    assert not new_index("OPQ8_16,IVF4,PQ8x4", DIM, 256).is_trained


def test_a_spec_is_checked_before_the_count_is_known():
    assert new_index("IVF2000,Flat", DIM, None).d == DIM
    with pytest.raises(SpecError):
        new_index("PQ5x4", DIM, None)


def test_building_says_nothing_on_standard_error(store, tmp_path, capfd):
    for spec in ("IVF64,PQ8x4", "OPQ8_16,IVF64,PQ8x4fs", "RQ2x4", "IVF64(PQ8x4),Flat"):
        VectorIndex.build(store, tmp_path / "index", spec, replace=True)
    assert capfd.readouterr().err == ""


def test_training_takes_a_bounded_sample(store, tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.index.build.TRAINING_ROWS", 100)
    seen = []
    monkeypatch.setattr(
        "clipkit.index.build.train",
        lambda index, rows: seen.append(rows) or index.train(rows),
    )
    index = VectorIndex.build(store, tmp_path / "index", "SQ8")
    (rows,) = seen
    assert index.manifest.detail["trained_on"] == len(rows) == 100
    whole = {row.tobytes(): number for number, row in enumerate(store.vectors())}
    picked = [whole[row.tobytes()] for row in rows]
    assert picked == sorted(set(picked))
    assert picked[0] < 300 < 900 < picked[-1]


def _truncate(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])


def _foreign(file, make):
    faiss.write_index(make, str(file))


@pytest.mark.parametrize("spec", ["Flat", "IVF16,PQ8x4fs,RFlat", "HNSW16,SQ8"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_index_is_a_sentence(store, tmp_path, spec, share):
    VectorIndex.build(store, tmp_path / "index", spec)
    _truncate(tmp_path / "index" / "index.faiss", share)
    with pytest.raises(ArtifactError, match=r"index\.faiss as a FAISS index.*build the index"):
        VectorIndex.open(tmp_path / "index")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "index.faiss").write_text("not an index"), "as a FAISS index"),
        (lambda path: (path / "index.faiss").unlink(), "as a FAISS index"),
        (lambda path: _foreign(path / "index.faiss", faiss.IndexFlatL2(DIM)), "metric 1"),
        (lambda path: _foreign(path / "index.faiss", faiss.IndexFlatIP(8)), "dimension 8"),
        (lambda path: _foreign(path / "index.faiss", faiss.IndexFlatIP(DIM)), "0 vectors"),
        (lambda path: _truncate(path / "records.parquet", 0.9), "cannot read .*records.parquet"),
        (lambda path: (path / "records.parquet").unlink(), "cannot read .*records.parquet"),
        (lambda path: change(path, count=999), "1000 vectors.*999"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest"),
        (lambda path: change(path, kind="store"), "holds a clipkit store"),
    ],
)
def test_a_damaged_or_foreign_index_is_a_sentence(store, tmp_path, damage, said):
    VectorIndex.build(store, tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(ArtifactError, match=said):
        VectorIndex.open(tmp_path / "index")


def test_a_header_that_claims_terabytes_allocates_nothing(store, tmp_path):
    VectorIndex.build(store, tmp_path / "index")
    file = tmp_path / "index" / "index.faiss"
    data = bytearray(file.read_bytes())
    at = data.index((1000 * DIM).to_bytes(8, "little"))
    data[at : at + 8] = (2**37).to_bytes(8, "little")
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="as a FAISS index"):
        VectorIndex.open(tmp_path / "index")


def test_an_index_is_replaced_only_on_demand(store, tmp_path):
    VectorIndex.build(store, tmp_path / "index")
    with pytest.raises(ArtifactError, match="already holds a clipkit index"):
        VectorIndex.build(store, tmp_path / "index", "SQ8")
    assert VectorIndex.build(store, tmp_path / "index", "SQ8", replace=True).spec == "SQ8"
    with pytest.raises(ArtifactError, match="already holds a clipkit store"):
        VectorIndex.build(store, store.path, replace=True)


def test_records_are_those_of_the_store(store, tmp_path):
    index = VectorIndex.build(store, tmp_path / "index")
    expected = [record | {"id": number} for number, record in enumerate(records(1000))]
    assert index.records().to_pylist() == expected


SEARCH_WITHOUT_TORCH = """
import sys
import clipkit.store.embedding_store, clipkit.index.vector_index
from clipkit.index.vector_index import VectorIndex
assert "torch" not in sys.modules
index = VectorIndex.open(sys.argv[1])
import numpy as np
query = np.zeros(index.dim, np.float32)
query[0] = 1
print([hit.key for hit in index.search(query, k=3)])
assert "torch" not in sys.modules
"""


def test_searching_with_a_vector_never_loads_torch(store, tmp_path):
    VectorIndex.build(store, tmp_path / "index")
    command = [sys.executable, "-c", SEARCH_WITHOUT_TORCH, tmp_path / "index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = slow_search(np.eye(1, DIM, dtype=np.float32), store.vectors(), 3)
    assert done.stdout.strip() == str(keys_of(expected)[0])
