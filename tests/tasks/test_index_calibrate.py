import json
import sys

import numpy as np
import pytest

from clipkit.artifacts import MANIFEST, ModelRef
from clipkit.cli import main
from clipkit.errors import ArtifactError
from clipkit.index.calibration import calibrate
from clipkit.index.sample_queries import encode_sample_queries, generic_captions
from clipkit.index.vector_index import VectorIndex
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


def test_a_calibrated_index_tells_probabilities(index):
    assert VectorIndex.open(index).calibration is None
    before = json.loads((index / MANIFEST).read_text())
    found = calibrate_index(index, Told())
    assert found.calibration.informative
    assert (found.source, found.measured.recall) == ("captions of the images", 1)
    after = json.loads((index / MANIFEST).read_text())
    assert after["detail"].pop("calibration") == found.calibration.to_dict()
    assert after["detail"].pop("measured") == found.measured.to_dict()
    assert after == before
    opened = VectorIndex.open(index)
    hits = opened.with_encoder(Told()).search("caption 8", k=5)
    chances = opened.calibration.probabilities(
        Told().encode_text(["caption 8"])[0], np.array([hit.score for hit in hits], np.float32)
    )
    assert [hit.probability for hit in hits] == pytest.approx(chances.tolist())
    assert hits[0].probability > 0.5 > opened.with_encoder(Told()).search("?")[0].probability
    assert opened.search(IMAGES[0])[0].probability is None


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
    assert set(json.loads(out)) == {
        *("recall", "milliseconds", "queries", "auroc", "error", "captions", "source")
    }
    out, _ = command(monkeypatch, capsys, "index", "calibrate", tmp_path / "index")
    assert "recall@10      1.000 of 240 generic captions" in out

    # Weights that make every hit certain, then none.
    for constant, said in ((50, "100%"), (-50, "0%")):
        file = tmp_path / "index" / MANIFEST
        manifest = json.loads(file.read_text())
        manifest["detail"]["calibration"] |= {"weights": [1, constant], "auroc": 0.9}
        file.write_text(json.dumps(manifest))
        out, err = command(monkeypatch, capsys, "search", tmp_path / "index", "red", "-k", "2")
        header, *rows = (line.split() for line in out.splitlines())
        assert header == ["rank", "match", "score", "key"]
        assert [row[1] for row in rows] == [said, said]
        assert ("no good match" in err) == (constant < 0)
        out, _ = command(monkeypatch, capsys, "search", tmp_path / "index", "red", "--json")
        assert json.loads(out.splitlines()[0])["probability"] == pytest.approx(
            float(constant > 0), abs=1e-6
        )


def test_an_untrained_network_gives_no_probability(tiny_checkpoint):
    from PIL import Image

    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint)
    images = encoder.encode_images([Image.fromarray(soft(40, 30, seed)) for seed in range(100)])
    told = encode_sample_queries([], encoder.encode_text)
    asked = told.captions, told.rows, told.nonsense
    assert not calibrate(*asked, lambda: [images], told.source).informative
    own = encoder.encode_text([f"{text} and more" for text in generic_captions()[:100]])
    assert not calibrate(own, np.arange(100), told.nonsense, lambda: [images], "").informative
