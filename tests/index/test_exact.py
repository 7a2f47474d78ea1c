import tracemalloc

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.artifacts import ModelRef
from clipkit.errors import ArgumentError, ArtifactError
from clipkit.index import exact
from clipkit.index import search as flat
from clipkit.index.exact import search_exact, search_float16, take_rows
from clipkit.index.search import plain_rows, search_index
from clipkit.index.vector_index import VectorIndex
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.toys import records, unit_rows

DIM = 16


def slow_search(queries, rows, k):
    """All inner products, rounded once to float32, sorted; equal ones in row order."""
    scores = (queries[:, None] * rows.astype(np.float64)).sum(axis=2).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def whole(count, dim, seed):
    """Small whole numbers, whose products are exact, so that many scores are equal."""
    return np.random.default_rng(seed).integers(-3, 4, (count, dim)).astype(np.float32)


def cut(rows, places):
    return np.split(rows, places)


@pytest.mark.parametrize("k", [1, 7, 400, 3000])
@pytest.mark.parametrize("queries", [1, 3, 130])
def test_it_equals_the_sorted_product_ties_included(queries, k, monkeypatch):
    monkeypatch.setattr(exact, "ROWS", 512)
    monkeypatch.setattr(exact, "SCORES", 2**12)
    monkeypatch.setattr(exact, "QUERIES", 100)
    rows, asked = whole(2500, 6, 0), whole(queries, 6, 1)
    scores, found = search_exact(asked, cut(rows, [3, 900, 900, 2000]), k)
    wanted, order = slow_search(asked, rows, k)
    np.testing.assert_array_equal(found, order)
    np.testing.assert_array_equal(scores, wanted)
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_few_queries_meet_the_rows_on_several_threads(count, queries, monkeypatch):
    monkeypatch.setattr(exact, "OWN_THREAD", 1)
    monkeypatch.setattr(faiss, "omp_get_max_threads", lambda: 5)
    rows, asked = unit_rows(count, DIM), unit_rows(queries, DIM, 1)
    scores, found = search_exact(asked, cut(rows, [count // 3]), 9)
    wanted, order = slow_search(asked, rows, 9)
    np.testing.assert_array_equal(found, order)
    np.testing.assert_array_equal(scores, wanted)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes(data):
    count, queries, k = (data.draw(st.integers(low, 60)) for low in (0, 0, 1))
    rows, asked = whole(count, 4, count), whole(queries, 4, 99)
    places = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    _, found = search_exact(asked, cut(rows, places), k)
    np.testing.assert_array_equal(found, slow_search(asked, rows, k)[1])


@pytest.mark.parametrize("queries", [1, 2, 7, 64])
def test_equal_rows_are_equal_wherever_they_stand(queries):
    rows, asked = unit_rows(3001, 100), unit_rows(queries, 100, seed=1)
    rows[[5, 6, 7, 998, 1000, 2999, 3000]] = asked[0] / np.linalg.norm(asked[0])
    scores, found = search_exact(asked, cut(rows, [7, 1001]), 7)
    assert found[0].tolist() == [5, 6, 7, 998, 1000, 2999, 3000]
    assert len(set(scores[0].tolist())) == 1
    np.testing.assert_array_equal(search_exact(asked[:1], [rows], 7)[0], scores[:1])


@pytest.mark.parametrize("direction", [1, -1])
def test_rows_that_get_ever_better_or_worse(direction, monkeypatch):
    monkeypatch.setattr(exact, "ROWS", 256)
    monkeypatch.setattr(exact, "SCORES", 2**9)
    rows = np.arange(3000, dtype=np.float32)[::direction, None].copy()
    scores, found = search_exact(np.array([[1], [-1]], np.float32), [rows], 5)
    np.testing.assert_array_equal(found, slow_search(np.array([[1], [-1]]), rows, 5)[1])
    np.testing.assert_array_equal(scores[0], [2999, 2998, 2997, 2996, 2995])


@pytest.mark.parametrize("queries", [1, 64])
def test_it_equals_faiss_flat(queries):
    rows, asked = unit_rows(20000, DIM), unit_rows(queries, DIM, seed=1)
    theirs = faiss.IndexFlatIP(DIM)
    theirs.add(rows)
    wanted, ids = theirs.search(asked, 10)
    for scores, found in (search_exact(asked, [rows], 10), search_index(theirs, asked, 10)):
        np.testing.assert_array_equal(found, ids)
        np.testing.assert_allclose(scores, wanted, atol=1e-6)


def test_scores_of_halves_are_exact_where_the_best_lie_apart_and_where_they_do_not():
    rows = unit_rows(5000, DIM)
    rows[100:400] = rows[7] + 1e-5 * unit_rows(300, DIM, seed=2)  # closer than float16 can tell
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    asked = np.concatenate([unit_rows(30, DIM, seed=1), rows[7:8]])
    halves = rows.astype(np.float16)
    assert (search_exact(asked, [halves], 10)[1] != slow_search(asked, rows, 10)[1]).any()
    scores, found = search_float16(asked, cut(halves, [1000]), rows, 10)
    wanted, order = slow_search(asked, rows, 10)
    np.testing.assert_array_equal(scores, wanted)
    np.testing.assert_array_equal(found, order)


def test_a_batch_is_exact_in_an_index_of_halves(tmp_path):
    rows = unit_rows(3000, DIM)
    rows[100:400] = rows[7] + 1e-5 * unit_rows(300, DIM, seed=2)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with EmbeddingStore.create(tmp_path / "store", ModelRef("a", "b", "c", DIM)) as writer:
        writer.append(rows, records(len(rows)))
        index = VectorIndex.build(writer.finish({}), tmp_path / "index", "SQfp16")
    asked = np.concatenate([unit_rows(flat.CONVERTED, DIM, seed=1), rows[7:8]])
    wanted, order = slow_search(asked, rows, 10)
    for hits, scores, numbers in zip(index.search_vectors(asked, 10), wanted, order, strict=True):
        assert [hit.id for hit in hits] == numbers.tolist()
        assert [hit.score for hit in hits] == scores.tolist()
    (one,) = index.search_vectors(asked[:1], 10)
    assert [hit.score for hit in one] == pytest.approx(wanted[0].tolist(), abs=1e-3)


def test_halves_fewer_than_k():
    rows = unit_rows(6, DIM)
    scores, found = search_float16(rows[:2], [rows.astype(np.float16)], rows, 10)
    assert found[:, 0].tolist() == [0, 1]
    assert scores.shape == (2, 6)


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "ROWS", 512)
    monkeypatch.setattr(exact, "SCORES", 2**15)
    asked, peaks = unit_rows(64, 64, seed=1), []
    for count in (4000, 40000):
        np.save(tmp_path / "rows.npy", unit_rows(count, 64))
        rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
        tracemalloc.start()
        search_exact(asked, [rows], 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 2**21


@pytest.mark.parametrize("spec", ["Flat", "SQfp16"])
def test_plain_rows_are_seen_as_they_are_held(spec):
    rows, asked = unit_rows(500, DIM), unit_rows(70, DIM, seed=1)
    index = faiss.index_factory(DIM, spec, faiss.METRIC_INNER_PRODUCT)
    assert plain_rows(index) is None
    index.add(rows)
    held = plain_rows(index)
    np.testing.assert_array_equal(held, rows if spec == "Flat" else rows.astype(np.float16))
    wanted, ids = index.search(asked, 10)
    scores, found = search_index(index, asked, 10)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_allclose(scores, wanted, atol=1e-6)


@pytest.mark.parametrize("spec", ["IDMap,Flat", "IDMap2,SQfp16"])
def test_ids_of_plain_rows(spec):
    rows, asked = unit_rows(500, DIM), unit_rows(70, DIM, seed=1)
    index = faiss.index_factory(DIM, spec, faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(rows, 3 * np.arange(500)[::-1])
    wanted, ids = index.search(asked, 10)
    scores, found = search_index(index, asked, 10)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_allclose(scores, wanted, atol=1e-6)


@pytest.mark.parametrize("spec", ["SQ8", "IVF4,Flat", "HNSW8", "SQbf16"])
def test_other_indexes_answer_themselves(spec):
    rows = unit_rows(500, DIM)
    index = faiss.index_factory(DIM, spec, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    assert plain_rows(index) is None
    np.testing.assert_array_equal(search_index(index, rows[:9], 3)[1], index.search(rows[:9], 3)[1])


def test_rows_of_another_width_and_no_hits_are_refused():
    with pytest.raises(ArtifactError, match=r"shape \[5, 8\], expected \[n, 16\]"):
        search_exact(unit_rows(2, DIM), [unit_rows(5, DIM), unit_rows(5, 8)], 3)
    with pytest.raises(ArgumentError, match="k is 0"):
        search_exact(unit_rows(2, DIM), [unit_rows(5, DIM)], 0)


def test_rows_are_taken_by_number_from_whichever_block():
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    rows = np.array([49, 0, 7, 7, 20, 19, 33])
    for cuts in ([], [20], [1, 20, 20, 49]):
        np.testing.assert_array_equal(take_rows(np.split(vectors, cuts), rows), vectors[rows])
