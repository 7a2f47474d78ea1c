import json
import multiprocessing

import pytest

from clipkit.artifacts import (
    MANIFEST,
    ArtifactWriter,
    Manifest,
    ModelRef,
    partial_path,
    read_manifest,
)
from clipkit.errors import ArtifactError, ModelMismatchError

MODEL = ModelRef("tiny", "", "a" * 64, 3)


def write(path, content="1", **options):
    with ArtifactWriter(path, "store", **options) as writer:
        (writer.temp / "content").write_text(content)
        writer.finish(Manifest("store", MODEL, 1, {"path": "x"}, {"note": "é"}))


def test_a_finished_directory_reads_back(tmp_path):
    write(tmp_path / "store")
    manifest = read_manifest(tmp_path / "store", "store")
    assert manifest.model == MODEL
    assert (manifest.count, manifest.source, manifest.detail) == (1, {"path": "x"}, {"note": "é"})
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_nothing_is_left_after_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), ArtifactWriter(tmp_path / "store", "store") as writer:
        (writer.temp / "content").write_text("1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_resumable_writer_leaves_its_sibling_and_says_so(tmp_path):
    path = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(path, "store", resume=True) as writer:
        (writer.temp / "content").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match="only half-written"):
        read_manifest(path)
    with ArtifactWriter(path, "store", resume=True) as writer:
        assert (writer.temp / "content").read_text() == "half"


def test_replacing_is_one_step_and_only_on_request(tmp_path):
    path = tmp_path / "store"
    write(path)
    with pytest.raises(ArtifactError, match="already holds a clipkit store"):
        write(path, "2")
    write(path, "2", replace=True)
    assert (path / "content").read_text() == "2"
    assert not partial_path(path).exists()


def test_strangers_are_refused(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="is not a clipkit store"):
        write(photos, replace=True)
    assert (photos / "a.jpg").read_bytes() == b"x"
    with pytest.raises(ArtifactError, match="has no manifest.json"):
        read_manifest(photos)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_manifest(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ("{}", "not a clipkit manifest"),
        ('{"format": 99, "clipkit": "9.0"}', "upgrade clipkit"),
    ],
)
def test_damaged_manifests(tmp_path, content, sentence):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=sentence):
        read_manifest(tmp_path)


def test_another_kind_is_refused(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(ArtifactError, match="holds a clipkit store, expected a clipkit index"):
        read_manifest(tmp_path / "store", "index")


def test_manifest_is_plain_json(tmp_path):
    write(tmp_path / "store")
    raw = json.loads((tmp_path / "store" / MANIFEST).read_text(encoding="utf-8"))
    assert raw["kind"] == "store"
    assert raw["model"]["fingerprint"] == "a" * 64


def _hold(path, ready, release):
    with ArtifactWriter(path, "store"):
        ready.set()
        release.wait(30)


def test_two_writers_are_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "store", ready, release))
    process.start()
    try:
        assert ready.wait(30)
        with pytest.raises(ArtifactError, match="another process is writing"):
            write(tmp_path / "store")
    finally:
        release.set()
        process.join(30)
    write(tmp_path / "store")


def test_mismatch_names_both_models():
    other = ModelRef("other", "tag", "b" * 64, 3)
    MODEL.require(ModelRef("renamed", "", "a" * 64, 3), what="it", repair="-")
    with pytest.raises(ModelMismatchError, match=r"tiny \(a{12}\).*other/tag \(b{12}\).*mend"):
        MODEL.require(other, what="the index", repair="mend")
