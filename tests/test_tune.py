import faiss
import numpy as np
import pytest
from gap import gap, gap_vectors
from toys import unit_rows

from clipkit.errors import SpecError
from clipkit.index import tuning as tune
from clipkit.index.exact import search_exact
from clipkit.index.faiss_factory import new_index, train
from clipkit.index.search import rescored
from clipkit.index.tuning import Wish, asker, candidates, choose_knobs, effort, measure, recall


def test_made_up_vectors_have_the_gap_of_real_ones():
    images, texts = gap(4000, 500, dim=256, topics=200)
    for rows in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    means = images.mean(0), texts.mean(0)
    found = [means[0] @ means[0], means[1] @ means[1], means[0] @ means[1]]
    np.testing.assert_allclose(found, [0.54, 0.74, 0.19], atol=0.02)


def test_made_up_vectors_are_drawn_in_any_blocks_of_one_size():
    world = gap_vectors.GapVectors(32, 10)
    whole, part = (np.concatenate([*world.images(n, block=100)]) for n in (250, 120))
    np.testing.assert_array_equal(whole[:120], part)


def test_the_gap_shows_in_recall():
    """Knobs at which images find images find far less for texts."""
    images, texts = gap(4000, 300)
    index = new_index("IVF64,Flat", 64, 4000)
    train(index, images)
    index.add(images)
    index.nprobe = 4
    found = []
    for queries in (images[:300], texts):
        truth = search_exact(queries, [images], 10)[1]
        found.append(recall(lambda q, k: index.search(q, k)[1], queries, truth))
    assert found[0] > found[1] + 0.1


def test_recall_equals_counting():
    random = np.random.default_rng(0)
    truth = np.stack([random.permutation(30)[:10] for _ in range(20)])
    found = np.stack([random.permutation(30)[:10] for _ in range(20)])
    found[3, 5:] = -1
    slow = np.mean(
        [len({*a} & {*b}) / 10 for a, b in zip(truth.tolist(), found.tolist(), strict=True)]
    )
    assert recall(lambda queries, k: found, np.zeros((20, 1)), truth) == pytest.approx(slow)


def test_rescored_candidates_are_the_best_of_them():
    rows, queries = unit_rows(200, 8), unit_rows(5, 8, seed=1)
    offered = np.stack([np.random.default_rng(n).permutation(200)[:20] for n in range(5)])
    offered[2, 3:] = -1
    scores, found = rescored(offered, rows, queries, 6)
    for query, candidates_, score, row in zip(queries, offered, scores, found, strict=True):
        among = [n for n in candidates_.tolist() if n >= 0]
        exact = {n: float(np.float32(rows[n].astype(np.float64) @ query)) for n in among}
        best = sorted(among, key=lambda n: (-exact[n], n))[:6]
        assert row.tolist() == best + [-1] * (6 - len(best))
        np.testing.assert_allclose(score[: len(best)], [exact[n] for n in best], atol=1e-7)


@pytest.mark.parametrize(
    ("count", "dim", "memory", "first"),
    [
        (10_000, 512, 2**30, "Flat"),
        (10_000, 512, 2**24, "IVF512,PQ256x4fs"),
        (1_000_000, 512, 2**30, "IVF4096,PQ256x4fs"),
        (1_000_000, 512, 10**8, "IVF4096,PQ128x4fs"),
        (1_000_000, 512, 6 * 10**7, "IVF4096,PQ64x4fs"),
        (10_000_000, 768, 2**32, "IVF16384,PQ384x4fs"),
    ],
)
def test_what_is_tried_first(count, dim, memory, first):
    assert candidates(count, dim, memory)[0] == first


def test_too_little_memory_is_refused():
    with pytest.raises(SpecError, match=r"at least 48 MiB.*but 10 MiB are allowed.*--memory"):
        candidates(1_000_000, 512, 10 * 2**20)
    assert Wish(memory=5).bytes == 5
    assert Wish().bytes > 2**28


def test_what_is_tried_fits_the_memory(monkeypatch):
    monkeypatch.setattr(tune, "SMALL", 0)
    rows = unit_rows(5000, 64)
    for memory in (200_000, 400_000, 2_000_000, 10**8):
        for spec in candidates(5000, 64, memory):
            index = new_index(spec, 64, 5000)
            train(index, rows)
            index.add(rows)
            assert len(faiss.serialize_index(index)) <= 1.05 * memory, spec


def built(spec, images):
    index = new_index(spec, images.shape[1], len(images))
    if not index.is_trained:
        train(index, images)
    index.add(images)
    return index


@pytest.mark.parametrize("spec", ["IVF64,PQ32x4fs", "PQ32x4fs", "HNSW8", "SQ8", "IVF64,Flat"])
def test_knobs_reach_the_recall_and_less_does_not(spec):
    images, texts = gap(3000, 200)
    truth = search_exact(texts, [images], 10)[1]
    index = built(spec, images)
    vectors = None if spec in ("HNSW8", "IVF64,Flat") else images
    knobs = choose_knobs(index, vectors, texts, truth, 0.9)
    reached = measure(asker(index, vectors, knobs), texts, truth)
    assert reached.recall >= 0.9
    assert reached.queries == 200
    assert reached.milliseconds > 0
    name, values = effort(index)
    if name and knobs[name] > values[0]:
        less = knobs | {name: values[values.index(knobs[name]) - 1]}
        assert recall(asker(index, vectors, less), texts, truth) < 0.9


def test_what_cannot_be_reached_gives_the_most():
    images, texts = gap(3000, 100)
    truth = search_exact(texts, [images], 10)[1]
    index = built("IVF64,PQ8x4fs", images)
    knobs = choose_knobs(index, images, texts, truth, 1.0)
    assert knobs == {"refine": 64, "nprobe": 64}
    index = built("Flat", images)
    assert choose_knobs(index, None, texts, truth, 1.0) == {}


def test_refinement_from_disk_equals_faiss_holding_the_vectors(tmp_path):
    images, texts = gap(3000, 50)
    np.save(tmp_path / "vectors.npy", images)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index, refined = built("PQ32x4fs", images), built("PQ32x4fs,RFlat", images)
    refined.k_factor = 8
    ask = asker(index, mapped, {"refine": 8})
    np.testing.assert_array_equal(np.sort(ask(texts, 10)), np.sort(refined.search(texts, 10)[1]))
