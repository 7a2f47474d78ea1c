import json
import sys

import numpy as np
import pytest
from gap import gap
from toys import records
from typer import BadParameter

from clipkit.artifacts import ModelRef
from clipkit.cli import main
from clipkit.cli.index import parse_size
from clipkit.errors import ModelError, SpecError
from clipkit.index import tuning as tune
from clipkit.index.exact import search_exact
from clipkit.index.sample_queries import make_questions
from clipkit.index.tuning import Wish, asker, build_tuned, remeasure
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.index import build_index

DIM = 64
MODEL = ModelRef("toy", "a", "fingerprint-a", DIM)
IMAGES, TEXTS = gap(3000, 1200)


class Told:
    """Encodes any captions as the same made-up text vectors, in order."""

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
def questions(store):
    chosen = make_questions((table for _, table in store.shards()), Told().encode_text)
    assert (chosen.source, len(chosen.captions)) == ("captions of the images", len(chosen.rows))
    return chosen


@pytest.fixture
def large(monkeypatch):
    """As if a few thousand images were many."""
    monkeypatch.setattr(tune, "SMALL", 0)


def test_a_small_store_is_searched_exactly(store, questions, tmp_path):
    index = build_tuned(store, tmp_path / "index", questions, Wish())
    assert index.spec == "Flat"
    tuning = index.manifest.detail["tuning"]
    assert (tuning["recall"], tuning["queries"]) == (1, len(questions.captions) // 2)
    assert index.manifest.detail["search"] == {}


def test_the_index_finds_what_its_manifest_says(store, questions, tmp_path, large):
    index = build_tuned(store, tmp_path / "index", questions, Wish(recall=0.9))
    detail = index.manifest.detail
    assert index.spec == "IVF256,PQ32x4fs"
    assert set(detail["search"]) == {"nprobe", "refine"}
    assert detail["tuning"]["recall"] > 0.85
    again = remeasure(index, questions.captions[1::2])
    assert again.recall == pytest.approx(detail["tuning"]["recall"], abs=1e-4)
    # What the tuner asked is what a search asks.
    segment = index.segments[0]
    ask = asker(segment.index, segment.vectors, detail["search"])
    hits = VectorIndex.open(tmp_path / "index").search(TEXTS[:50], 10)
    for found, row in zip(hits, ask(TEXTS[:50], 10), strict=True):
        assert [hit.id for hit in found] == row[row >= 0].tolist()


def test_what_a_changed_index_finds_is_measured_as_it_stands(store, questions, tmp_path, large):
    build_tuned(store, tmp_path / "index", questions, Wish(recall=0.9))
    best = search_exact(TEXTS[:20], [IMAGES], 5)[1]
    gone = sorted({store.keys[n] for n in best.ravel()})
    with IndexWriter(tmp_path / "index") as writer:
        writer.remove(gone)
        index = writer.commit()
    assert remeasure(index, TEXTS[:200]).recall > 0.8
    hits = index.search(TEXTS[:20], 10)
    assert not {hit.key for found in hits for hit in found} & set(gone)


def test_the_next_spec_is_tried_where_one_does_not_reach_the_recall(
    store, questions, tmp_path, large
):
    index = build_tuned(store, tmp_path / "index", questions, Wish(recall=1.0))
    tried = index.manifest.detail["tuning"]["tried"]
    assert index.manifest.detail["tuning"]["recall"] == 1.0
    assert tried[0]["spec"] == "IVF256,PQ32x4fs"
    assert tried[-1]["spec"] == index.spec
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == sorted(
        [
            "manifest.json",
            "questions.npy",
            *(name for s in index.segments for name in s.parts.names),
        ]
    )


def test_the_closest_is_built_where_none_reaches_the_recall(
    store, questions, tmp_path, large, monkeypatch
):
    monkeypatch.setattr(
        "clipkit.index.tuning.candidates", lambda *_: ["PQ32x4fs", "PQ8x4fs", "IVF9999,Flat"]
    )
    index = build_tuned(store, tmp_path / "index", questions, Wish(recall=1.0))
    tuning = index.manifest.detail["tuning"]
    assert [one["spec"] for one in tuning["tried"]] == ["PQ32x4fs", "PQ8x4fs"]
    assert index.spec == "PQ32x4fs"
    assert remeasure(index, questions.captions[1::2]).recall == pytest.approx(
        tuning["recall"], abs=1e-4
    )


def test_too_little_memory_leaves_nothing_behind(store, questions, tmp_path, large):
    with pytest.raises(SpecError, match="raise --memory"):
        build_tuned(store, tmp_path / "index", questions, Wish(memory=1000))
    assert list(tmp_path.iterdir()) == []


def test_a_refine_that_is_no_number_is_refused(store, questions, tmp_path, large):
    build_tuned(store, tmp_path / "index", questions, Wish(recall=0.8))
    file = tmp_path / "index" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["detail"]["search"]["refine"] = "many"
    file.write_text(json.dumps(manifest))
    with pytest.raises(SpecError, match="refine='many'"):
        VectorIndex.open(tmp_path / "index")


def test_auto_takes_captions(store, tmp_path):
    with pytest.raises(ModelError, match=r"what captions find.*load_text"):
        build_index(store.path, tmp_path / "index", spec="auto")
    asked = []
    index = build_index(
        store.path, tmp_path / "index", spec="auto", load_text=lambda m: asked.append(m) or Told()
    )
    assert (index.spec, asked) == ("Flat", [MODEL])


def test_an_empty_store_makes_an_empty_index(tmp_path):
    empty = make_store(tmp_path / "store", 0)
    index = build_index(empty.path, tmp_path / "index", spec="auto", load_text=lambda model: Told())
    assert (index.spec, len(index)) == ("Flat", 0)
    assert index.search(np.ones((1, DIM), np.float32), 3) == [[]]


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
    assert "'much' is no amount of memory" in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("2g", 2 * 10**9), ("7", 7), ("3kib", 3072)],
)
def test_amounts_of_memory(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "1ZB", "1 i", "1e9"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(BadParameter):
        parse_size(text)
