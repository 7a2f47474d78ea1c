"""What `clipkit index check` tells of an index."""

import json
import subprocess
import sys

import faiss
import numpy as np
import pytest

from clipkit.artifacts import ModelRef
from clipkit.cli import main
from clipkit.index import tuning as tune
from clipkit.index.sample_queries import SampleQueries, write_sample_queries
from clipkit.index.tuning import TuningTarget, build_tuned
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks import check_index as module
from clipkit.tasks.check_index import check_index
from tests.helpers.gap import gap
from tests.helpers.indexes import DIM, POOL, make_store, old_index, table
from tests.helpers.toys import records, unit_rows


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(300, DIM)), path, "IVF16,SQ8")
    return path


def test_a_sound_index_has_nothing_to_tell(index):
    with IndexWriter(index) as writer:
        writer.remove(["item-00003.png"])
        writer.append(POOL[:5], table(["a", "b", "c", "d", "e"]))
        writer.commit()
    report = check_index(index)
    assert (report.problems, report.advice) == ([], [])
    assert (report.vectors, report.segments) == (304, 2)
    assert report.removed == pytest.approx(1 / 305)
    assert report.later == pytest.approx(5 / 304)
    assert report.found == 1
    assert report.recall > 0.95


def test_recall_is_that_of_counting_by_hand(index):
    detail = json.loads((index / "manifest.json").read_text())
    detail["detail"]["search"]["nprobe"] = 1
    (index / "manifest.json").write_text(json.dumps(detail))
    opened = VectorIndex.open(index)
    vectors = np.concatenate([rows for rows, _ in opened.shards()])
    chosen = np.sort(np.random.default_rng(0).choice(300, 200, replace=False))
    best = np.argsort(-(vectors[chosen] @ vectors.T), axis=1)[:, :10]
    hits = [[hit.id for hit in hits] for hits in opened.search_vectors(vectors[chosen], 10)]
    expected = np.mean([len({*a} & {*b}) / 10 for a, b in zip(hits, best.tolist(), strict=True)])
    report = check_index(index)
    assert report.recall == pytest.approx(expected)
    assert report.recall < 0.9
    assert any("finds" in advice and "trains it again" in advice for advice in report.advice)


def test_a_flipped_byte_is_found(index):
    for name in ("vectors.npy", "records.parquet", "index.faiss"):
        data = bytearray((index / name).read_bytes())
        at = 400 if name != "records.parquet" else 20
        data[at] ^= 1
        (index / name).write_bytes(data)
        report = check_index(index)
        assert [name in problem for problem in report.problems].count(True) == 1
        assert "build the index again" in report.advice[0]
        data[at] ^= 1
        (index / name).write_bytes(data)
    assert not check_index(index).problems


def test_what_piles_up_is_told(index, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_LATER", 50)
    with IndexWriter(index) as writer:
        writer.remove([f"item-{n:05d}.png" for n in range(100)])
        writer.append(POOL[:100], table([f"new-{n}" for n in range(100)]))
        writer.commit()
    advice = " ".join(check_index(index).advice)
    assert "25% of its rows are removed" in advice
    assert "33% of its images came after IVF16,SQ8 was trained" in advice
    with IndexWriter(index) as writer:
        writer.commit(compact=True)
    assert not check_index(index).advice


def test_empty_and_old_indexes_are_examined(tmp_path):
    empty = make_store(tmp_path / "store", np.empty((0, DIM), np.float32))
    VectorIndex.build(empty, tmp_path / "empty")
    report = check_index(tmp_path / "empty")
    assert (report.vectors, report.recall, report.problems, report.advice) == (0, None, [], [])
    old_index(tmp_path / "old", unit_rows(30, DIM), "Flat")
    assert check_index(tmp_path / "old").recall == 1
    old_index(tmp_path / "lossy", unit_rows(30, DIM), "SQ8")
    report = check_index(tmp_path / "lossy")
    assert report.recall is None
    assert "without exact vectors" in report.advice[0]


def test_the_command_prints_and_its_exit_code_says_whether_all_is_well(index, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipkit", "index", "check", str(index), *words])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().out

    code, out = run("--json")
    assert code == 0
    assert json.loads(out)["vectors"] == 300
    assert json.loads(out)["problems"] == []
    faiss_index = faiss.read_index(str(index / "index.faiss"))
    faiss_index.nprobe = 7
    faiss.write_index(faiss_index, str(index / "index.faiss"))
    code, out = run()
    assert code == 1
    assert "wrong" in out
    assert "index.faiss" in out


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SMALL", 0)
    images, texts = gap(2000, 600)
    model = ModelRef("toy", "a", "fingerprint-a", images.shape[1])
    with EmbeddingStore.create(tmp_path / "tuned-store", model) as writer:
        writer.append(images, records(len(images)))
        store = writer.finish({})
    nothing = np.empty(0, np.int64)
    queries = SampleQueries([], texts, nothing, texts[:5], "captions")
    build_tuned(store, tmp_path / "tuned", queries, TuningTarget(recall=0.9))
    return tmp_path / "tuned", images, texts[1::2]


def by_hand(path, rows, texts):
    """Recall@10 as counted with sets."""
    best = np.argsort(-(texts @ rows.T), axis=1)[:, :10]
    keys = VectorIndex.open(path).keys
    hits = VectorIndex.open(path).search_vectors(texts, 10)
    pairs = zip(hits, best, strict=True)
    return np.mean([len({h.key for h in found} & {keys[n] for n in b}) / 10 for found, b in pairs])


def test_captions_are_asked_again_without_a_model(tuned):
    path, images, texts = tuned
    recorded = VectorIndex.open(path).manifest.detail["measured"]
    report = check_index(path)
    assert report.text_recall == pytest.approx(by_hand(path, images, texts))
    assert report.text_recall == pytest.approx(recorded["recall"], abs=1e-4)
    assert report.recorded_recall == recorded["recall"]
    assert report.recorded_milliseconds == recorded["milliseconds"]
    assert report.milliseconds > 0 < report.exact_milliseconds
    assert (report.advice, report.not_measured) == ([], None)


def test_a_changed_index_is_measured_as_it_stands(tuned):
    path, images, texts = tuned
    with IndexWriter(path) as writer:
        writer.remove([f"item-{n:05d}.png" for n in range(500)])
        more = table([f"new-{n}" for n in range(40)])
        writer.append(images[:40], more)
        writer.commit()
    rows = np.concatenate([images[500:], images[:40]])
    assert check_index(path).text_recall == pytest.approx(by_hand(path, rows, texts))


def test_recall_that_has_dropped_calls_for_training_anew(tuned):
    path, images, texts = tuned
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["detail"]["search"]["rerank"] > 1
    manifest["detail"]["search"]["rerank"] = 1
    (path / "manifest.json").write_text(json.dumps(manifest))
    report = check_index(path)
    assert report.text_recall == pytest.approx(by_hand(path, images, texts))
    assert report.text_recall < report.recorded_recall - 0.02
    (advice,) = [advice for advice in report.advice if "captions find" in advice]
    assert f"{report.text_recall:.1%}" in advice
    assert "trains it again" in advice


def test_why_captions_are_not_asked_is_said(index, tuned):
    report = check_index(index)
    assert report.text_recall is None
    assert "no captions are stored" in report.not_measured
    path, _, _ = tuned
    (path / "sample_queries.bin").write_bytes(b"\x93NUMPY")
    report = check_index(path)
    assert (report.text_recall, report.problems) == (None, [])
    assert "sample_queries.bin" in report.not_measured
    assert report.recorded_recall is not None


def test_captions_that_other_tools_take_for_vectors_are_replaced(tuned):
    path, _, texts = tuned
    np.save(path / "questions.npy", texts)
    assert any("questions.npy" in advice for advice in check_index(path).advice)
    write_sample_queries(path, texts)
    assert not (path / "questions.npy").exists()
    assert not any("questions.npy" in advice for advice in check_index(path).advice)


def test_no_torch_is_needed(tuned):
    path, _, _ = tuned
    code = (
        "import sys\nfrom clipkit.tasks.check_index import check_index\n"
        f"assert check_index({str(path)!r}).text_recall\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_figures_are_shown_as_what_they_are(tuned, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clipkit", "index", "check", str(tuned[0])])
    with pytest.raises(SystemExit):
        main()
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["text recall"].strip().endswith("%")
    assert float(shown["milliseconds"]) >= 0
    assert "not measured" not in shown


def test_what_a_killed_writer_left_is_swept_away_and_captions_stay(tuned):
    path, _, _ = tuned
    (path / ".sample_queries.bin.tmp").write_bytes(b"half")
    with IndexWriter(path) as writer:
        writer.remove(["item-00000.png"])
        writer.commit(compact=True)
    assert not (path / ".sample_queries.bin.tmp").exists()
    assert check_index(path).text_recall is not None
