"""What is tried, measured and built so that an index finds as much as is asked for."""

import json
import sys

import faiss
import numpy as np
import pytest
from typer import BadParameter

from clipkit.artifacts import ModelRef
from clipkit.cli import main
from clipkit.cli.index import parse_size
from clipkit.errors import SpecError
from clipkit.index import tuning as tune
from clipkit.index.exact import search_exact
from clipkit.index.faiss_factory import new_index, train
from clipkit.index.sample_queries import encode_sample_queries
from clipkit.index.search import rerank
from clipkit.index.tuning import (
    TuningTarget,
    build_tuned,
    candidates,
    choose_search_parameters,
    effort,
    measure,
    recall,
    remeasure,
    search_with,
)
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.index import build_index
from tests.helpers.gap import gap, gap_vectors
from tests.helpers.toys import records, unit_rows


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
    scores, found = rerank(offered, rows, queries, 6)
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
    assert TuningTarget(memory=5).bytes == 5
    assert TuningTarget().bytes > 2**28


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
    parameters = choose_search_parameters(index, vectors, texts, truth, 0.9)
    reached = measure(search_with(index, vectors, parameters), texts, truth)
    assert reached.recall >= 0.9
    assert reached.queries == 200
    assert reached.milliseconds > 0
    name, values = effort(index)
    if name and parameters[name] > values[0]:
        less = parameters | {name: values[values.index(parameters[name]) - 1]}
        assert recall(search_with(index, vectors, less), texts, truth) < 0.9


def test_what_cannot_be_reached_gives_the_most():
    images, texts = gap(3000, 100)
    truth = search_exact(texts, [images], 10)[1]
    index = built("IVF64,PQ8x4fs", images)
    parameters = choose_search_parameters(index, images, texts, truth, 1.0)
    assert parameters == {"rerank": 64, "nprobe": 64}
    index = built("Flat", images)
    assert choose_search_parameters(index, None, texts, truth, 1.0) == {}


def test_reranking_from_disk_equals_faiss_holding_the_vectors(tmp_path):
    images, texts = gap(3000, 50)
    np.save(tmp_path / "vectors.npy", images)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index, refined = built("PQ32x4fs", images), built("PQ32x4fs,RFlat", images)
    refined.k_factor = 8
    ask = search_with(index, mapped, {"rerank": 8})
    np.testing.assert_array_equal(np.sort(ask(texts, 10)), np.sort(refined.search(texts, 10)[1]))


DIM = 64
MODEL = ModelRef("toy", "a", "fingerprint-a", DIM)
IMAGES, TEXTS = gap(3000, 1200)


class Told:
    """Encodes any captions as the same made-up text vectors, in order."""

    model = MODEL

    def encode_text(self, captions):
        return TEXTS[: len(captions)]


def make_store(path, count=3000):
    with EmbeddingStore.create(path, MODEL, shard_size=700) as writer:
        writer.append(IMAGES[:count], records(count))
        return writer.finish({"spec": "made up"})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("auto") / "store")


@pytest.fixture(scope="module")
def queries(store):
    chosen = encode_sample_queries((table for _, table in store.shards()), Told().encode_text)
    assert (chosen.source, len(chosen.captions)) == ("captions of the images", len(chosen.rows))
    return chosen


@pytest.fixture
def large(monkeypatch):
    """As if a few thousand images were many."""
    monkeypatch.setattr(tune, "SMALL", 0)


def test_a_small_store_is_searched_exactly(store, queries, tmp_path):
    index = build_tuned(store, tmp_path / "index", queries, TuningTarget())
    assert index.spec == "Flat"
    tuning = index.manifest.detail["tuning"]
    assert (tuning["recall"], tuning["queries"]) == (1, len(queries.captions) // 2)
    assert index.manifest.detail["search"] == {}


def test_the_index_finds_what_its_manifest_says(store, queries, tmp_path, large):
    index = build_tuned(store, tmp_path / "index", queries, TuningTarget(recall=0.9))
    detail = index.manifest.detail
    assert index.spec == "IVF256,PQ32x4fs"
    assert set(detail["search"]) == {"nprobe", "rerank"}
    assert detail["tuning"]["recall"] > 0.85
    again = remeasure(index, queries.captions[1::2])
    assert again.recall == pytest.approx(detail["tuning"]["recall"], abs=1e-4)
    # What the tuner asked is what a search asks.
    segment = index.segments[0]
    ask = search_with(segment.index, segment.vectors, detail["search"])
    hits = VectorIndex.open(tmp_path / "index").search_vectors(TEXTS[:50], 10)
    for found, row in zip(hits, ask(TEXTS[:50], 10), strict=True):
        assert [hit.id for hit in found] == row[row >= 0].tolist()


def test_what_a_changed_index_finds_is_measured_as_it_stands(store, queries, tmp_path, large):
    build_tuned(store, tmp_path / "index", queries, TuningTarget(recall=0.9))
    best = search_exact(TEXTS[:20], [IMAGES], 5)[1]
    gone = sorted({store.keys[n] for n in best.ravel()})
    with IndexWriter(tmp_path / "index") as writer:
        writer.remove(gone)
        index = writer.commit()
    assert remeasure(index, TEXTS[:200]).recall > 0.8
    hits = index.search_vectors(TEXTS[:20], 10)
    assert not {hit.key for found in hits for hit in found} & set(gone)


def test_the_next_spec_is_tried_where_one_does_not_reach_the_recall(
    store, queries, tmp_path, large
):
    index = build_tuned(store, tmp_path / "index", queries, TuningTarget(recall=1.0))
    tried = index.manifest.detail["tuning"]["tried"]
    assert index.manifest.detail["tuning"]["recall"] == 1.0
    assert tried[0]["spec"] == "IVF256,PQ32x4fs"
    assert tried[-1]["spec"] == index.spec
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == sorted(
        [
            "manifest.json",
            "sample_queries.bin",
            *(name for s in index.segments for name in s.parts.names),
        ]
    )


def test_the_closest_is_built_where_none_reaches_the_recall(
    store, queries, tmp_path, large, monkeypatch
):
    monkeypatch.setattr(
        "clipkit.index.tuning.candidates", lambda *_: ["PQ32x4fs", "PQ8x4fs", "IVF9999,Flat"]
    )
    index = build_tuned(store, tmp_path / "index", queries, TuningTarget(recall=1.0))
    tuning = index.manifest.detail["tuning"]
    assert [one["spec"] for one in tuning["tried"]] == ["PQ32x4fs", "PQ8x4fs"]
    assert index.spec == "PQ32x4fs"
    assert remeasure(index, queries.captions[1::2]).recall == pytest.approx(
        tuning["recall"], abs=1e-4
    )


def test_too_little_memory_leaves_nothing_behind(store, queries, tmp_path, large):
    with pytest.raises(SpecError, match="raise --memory"):
        build_tuned(store, tmp_path / "index", queries, TuningTarget(memory=1000))
    assert list(tmp_path.iterdir()) == []


def test_a_rerank_factor_must_be_a_number(store, queries, tmp_path, large):
    build_tuned(store, tmp_path / "index", queries, TuningTarget(recall=0.8))
    file = tmp_path / "index" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["detail"]["search"]["rerank"] = "many"
    file.write_text(json.dumps(manifest))
    with pytest.raises(SpecError, match="rerank='many'"):
        VectorIndex.open(tmp_path / "index")


def test_auto_encodes_captions_with_the_encoder(store, tmp_path):
    index = build_index(store, tmp_path / "index", Told(), spec="auto")
    assert (index.spec, index.model) == ("Flat", MODEL)


def test_an_empty_store_makes_an_empty_index(tmp_path):
    empty = make_store(tmp_path / "store", 0)
    index = build_index(empty.path, tmp_path / "index", Told(), spec="auto")
    assert (index.spec, len(index)) == ("Flat", 0)
    assert index.search_vectors(np.ones((1, DIM), np.float32), 3) == [[]]


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, *capsys.readouterr()


def test_the_command(monkeypatch, capsys, colour_folder, tiny_checkpoint, tmp_path):
    words = ("index", "build", colour_folder, "--model", tiny_checkpoint, "--out", tmp_path / "i")
    code, out, _ = command(monkeypatch, capsys, *words, "--spec", "auto", "--memory", "1MB")
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert (code, facts["spec"]) == (0, "Flat")
    assert facts["recall@10"] == "1.000 of 120 generic captions, 0.95 wanted"
    tuning = VectorIndex.open(tmp_path / "i").manifest.detail["tuning"]
    assert (tuning["wanted"], tuning["memory"]) == (0.95, 10**6)
    code, _, err = command(monkeypatch, capsys, *words, "--recall", "0.9")
    assert code == 2
    assert "--spec auto" in err
    code, _, err = command(monkeypatch, capsys, *words, "--spec", "auto", "--memory", "much")
    assert code == 2
    assert "expected a size such as 500MB, found 'much'" in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("2g", 2 * 10**9), ("7", 7), ("3kib", 3072)],
)
def test_amounts_of_memory(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "1ZB", "1 i", "1e9"])
def test_malformed_amounts_of_memory_are_refused(text):
    with pytest.raises(BadParameter):
        parse_size(text)
