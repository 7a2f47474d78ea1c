import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from clipkit.artifacts import MANIFEST, ModelRef
from clipkit.cli import main
from clipkit.errors import ArtifactError
from clipkit.index.calibration import Logistic, calibrate
from clipkit.index.sample_queries import encode_sample_queries, generic_captions
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.index import calibrate_index
from tests.helpers.gap import gap
from tests.helpers.toys import records, soft

DIM = 32
MODEL = ModelRef("toy", "a", "fingerprint-a", DIM)
IMAGES, _ = gap(900, 1, dim=DIM, topics=30)


class Told:
    """``caption N`` is a blurred image N; what has no number is noise."""

    model, dim = MODEL, DIM

    def __init__(self, match=1.0):
        self.match = match

    def encode_text(self, captions):
        random = np.random.default_rng(0)
        found = random.normal(size=(len(captions), DIM)).astype(np.float32)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        middle = IMAGES.mean(0)
        for row, caption in zip(found, captions, strict=True):
            if caption.startswith("caption"):
                row += 2 * self.match * (IMAGES[int(caption.split()[1])] - middle)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture
def index(tmp_path):
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        writer.append(IMAGES, records(len(IMAGES)))
        return VectorIndex.build(writer.finish({}), tmp_path / "index").path


def test_a_calibrated_index_states_probabilities(index):
    assert VectorIndex.open(index).calibration is None
    before = json.loads((index / MANIFEST).read_text())
    found = calibrate_index(index, Told())
    assert found.calibration.gives_probabilities
    assert found.source == "captions of the images"
    assert found.calibration.grading == "other images rarely match"
    assert found.measured.recall == 1
    after = json.loads((index / MANIFEST).read_text())
    assert after["detail"].pop("calibration") == found.calibration.to_dict()
    assert after["detail"].pop("measured") == found.measured.to_dict()
    assert after == before
    opened = VectorIndex.open(index)
    hits = opened.with_encoder(Told()).search("caption 8", k=5)
    query = Told().encode_text(["caption 8"])[0]
    expected = opened.calibration.assess(query, np.array([hit.score for hit in hits], np.float32))
    assert [hit.probability for hit in hits] == pytest.approx(expected.probabilities.tolist())
    assert (hits.any_match, hits.matched) == (expected.any_match, True)
    assert hits[0].probability > 0.4
    assert (hits[1:].any_match, hits[1:].matched) == (hits.any_match, True)
    other = opened.with_encoder(Told()).search("?")
    assert other[0].probability < 0.2
    assert other.any_match < 0.5
    assert other.matched is False
    image = opened.search(IMAGES[0])
    assert (image[0].probability, image.any_match, image.matched) == (None, None, None)


def test_the_captions_of_hits_grade_them(tmp_path):
    # Images 2n and 2n + 1 have the same captions, and almost the same vector.
    twins = IMAGES.repeat(2, axis=0)[: len(IMAGES)] + np.float32(0.001) * IMAGES
    twins /= np.linalg.norm(twins, axis=1, keepdims=True)
    rows = records(len(twins))
    for number, record in enumerate(rows):
        record["captions"] = [f"caption {number // 2}", f"caption {number // 2} again"]
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        writer.append(twins[:500], rows[:500])
        writer.append(twins[500:], rows[500:])
        path = VectorIndex.build(writer.finish({}), tmp_path / "index").path
    with IndexWriter(path) as writer:  # rows are counted without the removed ones
        writer.remove([record["key"] for record in rows[:100]])
        writer.commit()
    found = calibrate_index(path, Told())
    assert found.calibration.grading == "other images graded by their captions"
    hits = VectorIndex.open(path, encoder=Told()).search("caption 80", k=10)
    assert {hit.key for hit in hits[:2]} == {"item-00160.png", "item-00161.png"}
    assert min(hit.probability for hit in hits[:2]) > 0.5
    assert max(hit.probability for hit in hits[2:]) < 0.2


def test_without_captions_only_no_good_match_is_said(tmp_path):
    bare = [record | {"captions": []} for record in records(len(IMAGES))]
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        writer.append(IMAGES, bare)
        path = VectorIndex.build(writer.finish({}), tmp_path / "index").path

    class Generic(Told):
        def encode_text(self, captions):
            known = {text: f"caption {n}" for n, text in enumerate(generic_captions())}
            return super().encode_text([known.get(text, text) for text in captions])

    found = calibrate_index(path, Generic())
    assert found.source == "generic captions"
    assert found.to_dict()["hit"] is None
    opened = VectorIndex.open(path, encoder=Generic())
    hits = opened.search("caption 8")
    assert (hits[0].probability, hits.any_match, hits.matched) == (None, None, None)
    hits = opened.search("?")
    assert (hits[0].probability, hits.any_match, hits.matched) == (None, None, False)


def test_an_older_calibration_is_refused_until_the_index_is_calibrated_again(index):
    file = index / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["detail"]["calibration"] = {"background": "", "weights": [9, -5], "auroc": 0.9}
    file.write_text(json.dumps(manifest))
    opened = VectorIndex.open(index, encoder=Told())
    assert opened.search(IMAGES[0])[0].probability is None
    with pytest.raises(ArtifactError, match=f"`clipkit index calibrate {index}`"):
        opened.search("caption 8")
    calibrate_index(index, Told())
    assert VectorIndex.open(index, encoder=Told()).search("caption 8")[0].probability > 0


def test_scores_that_say_nothing_give_no_probability(index):
    found = calibrate_index(index, Told(match=0))
    assert not found.calibration.informative
    hits = VectorIndex.open(index, encoder=Told(match=0)).search("caption 8")
    assert {hit.probability for hit in hits} == {None}


def test_an_empty_index_is_refused(tmp_path):
    with EmbeddingStore.create(tmp_path / "store", MODEL) as writer:
        empty = VectorIndex.build(writer.finish({}), tmp_path / "index")
    with pytest.raises(ArtifactError, match="is empty"):
        calibrate_index(empty.path, Told())


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    return capsys.readouterr()


def test_the_commands(monkeypatch, capsys, colour_folder, tiny_checkpoint, tmp_path):
    words = ("--out", tmp_path / "index", "--model", tiny_checkpoint)
    command(monkeypatch, capsys, "index", "build", colour_folder, *words)
    out, _ = command(monkeypatch, capsys, "index", "calibrate", tmp_path / "index", "--json")
    told = json.loads(out)
    assert set(told) == {
        *("recall", "milliseconds", "queries", "informative", "auroc", "captions", "source"),
        *("grading", "hit", "any_match"),
    }
    assert (told["source"], told["hit"], told["any_match"]) == ("generic captions", None, None)
    out, _ = command(monkeypatch, capsys, "index", "calibrate", tmp_path / "index")
    assert "recall@10      1.000 of 240 generic captions" in out
    assert "probabilities  none" in out

    # Constants that make every hit certain, then none.
    for constant, shown in ((50, "100%"), (-50, "0%")):
        file = tmp_path / "index" / MANIFEST
        manifest = json.loads(file.read_text())
        sure = Logistic(1.0, constant, 0.02, ()).to_dict()
        manifest["detail"]["calibration"] |= {"auroc": 0.9, "hit": sure, "any_match": sure}
        file.write_text(json.dumps(manifest))
        out, err = command(monkeypatch, capsys, "search", tmp_path / "index", "red", "-k", "2")
        header, *rows = (line.split() for line in out.splitlines())
        assert header == ["rank", "probability", "score", "key"]
        assert [row[1] for row in rows] == [shown, shown]
        said = "no good match: the ten best hits hold one with a probability of 0%"
        assert (said in err) == (constant < 0)
        out, _ = command(monkeypatch, capsys, "search", tmp_path / "index", "red", "--json")
        hit = json.loads(out.splitlines()[0])
        assert hit["probability"] == pytest.approx(float(constant > 0), abs=1e-6)

    manifest["detail"]["calibration"] |= {"noise": 2.0, "hit": None, "any_match": None}
    file.write_text(json.dumps(manifest))
    _, err = command(monkeypatch, capsys, "search", tmp_path / "index", "red")
    assert "no good match: random words score as high" in err


def test_the_command_says_how_well_the_probabilities_hold(monkeypatch, capsys, index):
    monkeypatch.setattr("clipkit.index.vector_index.VectorIndex.text_encoder", Told())
    out, _ = command(monkeypatch, capsys, "index", "calibrate", index)
    shown = dict(line.split("  ", 1) for line in out.splitlines())
    calibration = VectorIndex.open(index).calibration
    assert shown["evidence"].strip() == ("600 captions of the images, other images rarely match")
    error = f"calibration error {calibration.hit.error:.3f}"
    assert shown["probability of a hit"].strip() == error
    error = f"calibration error {calibration.any_match.error:.3f}"
    assert shown["probability of any match"].strip() == error


def test_an_untrained_network_gives_no_probability(tiny_checkpoint):
    from PIL import Image

    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint)
    images = encoder.encode_images([Image.fromarray(soft(40, 30, seed)) for seed in range(100)])
    told = encode_sample_queries([], encoder.encode_text)
    assert not calibrate(told, lambda: [images], lambda rows: {}).informative
    texts = [f"{text} and more" for text in generic_captions()[:100]]
    own = replace(
        told, texts=texts, captions=encoder.encode_text(texts), rows=np.arange(len(texts))
    )
    found = calibrate(own, lambda: [images], lambda rows: {int(n): [texts[n]] for n in rows})
    assert not found.informative


def test_a_page_shows_reliability_diagrams(index, tmp_path, monkeypatch, capsys):
    found = calibrate_index(index, Told())
    monkeypatch.setattr("clipkit.tasks.index.calibrate_index", lambda path: found)
    monkeypatch.setattr(
        sys, "argv", ["clipkit", "index", "calibrate", str(index), "--html", f"{tmp_path}/p.html"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr().err
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert f"a hit matches: calibration error {found.calibration.hit.error:.3f}" in page
    assert f"calibration error {found.calibration.any_match.error:.3f}" in page
    assert found._repr_html_() in page
    without = replace(found.calibration, hit=None, any_match=None)
    assert "no captions to calibrate" in replace(found, calibration=without)._repr_html_()
