"""Suites of sets on the hub, whole, with its loader led to directories packaged as there."""

import json
import sys
import warnings

import datasets
import pytest

import clipkit
from clipkit.cli import main
from clipkit.data.open_source import open_source
from clipkit.evaluation.suite import read_suite
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from clipkit.tasks.suite import evaluate_suite
from tests.helpers.colours import COLOURS, picture
from tests.helpers.toys import png, write_tar

LABELS = list(COLOURS)
SUITE = """
[[set]]
name = "classes"
data = "hf:org/photos:test"
task = "zero-shot"

[[set]]
name = "words"
data = "hf:org/photos:test"
task = "zero-shot"
labels = "labels.txt"
templates = "simple"

[[set]]
name = "captions"
data = "hf:org/captioned/en:validation"
task = "retrieval"
equal_captions = "apart"

[[set]]
name = "shards"
data = "wds"
split = "dev"
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The same twelve pictures with classes, with captions, as class folders and as tars."""
    items, folder = [], tmp_path / "captioned"
    folder.mkdir()
    for place in range(12):
        name, content = LABELS[place % 3], png(picture(LABELS[place % 3], place))
        items.append((name, f"picture {place} is {name}", content))
        (tmp_path / "albums" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "albums" / name / f"{place:02}.png").write_bytes(content)
        (folder / f"{place:02}.png").write_bytes(content)
        (folder / f"{place:02}.txt").write_text(items[-1][1])
    images = [{"bytes": content, "path": None} for _, _, content in items]
    image = {"image": datasets.Image()}
    classes = datasets.Features(image | {"label": datasets.ClassLabel(names=LABELS)})
    texts = datasets.Features(image | {"caption": datasets.Value("string")})
    labels = [LABELS.index(name) for name, _, _ in items]
    for file, features, column in (
        ("org/photos/data/test-00000-of-00001.parquet", classes, {"label": labels}),
        (
            "org/captioned/en/validation-00000-of-00001.parquet",
            texts,
            {"caption": [one[1] for one in items]},
        ),
    ):
        packed = datasets.Dataset.from_dict({"image": images, **column}, features)
        (tmp_path / "hub" / file).parent.mkdir(parents=True)
        packed.to_parquet(tmp_path / "hub" / file)
    members = [
        (f"{place:02}.{end}", content)
        for place, (_, text, png_bytes) in enumerate(items)
        for end, content in (("png", png_bytes), ("txt", text.encode()))
    ]
    write_tar(tmp_path / "wds" / "dev" / "0.tar", members)
    (tmp_path / "wds" / "dev" / "nshards.txt").write_text("1\n")
    (tmp_path / "wds" / "dataset_type.txt").write_text("retrieval\n")
    (tmp_path / "labels.txt").write_text("blue: blue, azure\nred\ngreen\n")
    (tmp_path / "suite.toml").write_text(SUITE)
    load = datasets.load_dataset
    loaded = []

    def local(name, config, *, split, streaming):
        loaded.append((name, config, split))
        return load(str(tmp_path / "hub" / name / (config or "")), split=split, streaming=streaming)

    monkeypatch.setattr("datasets.load_dataset", local)
    return loaded


def test_a_suite_of_hub_sets_measures_what_the_same_pictures_in_folders_do(
    hub, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    words = ["eval", "suite", tmp_path / "suite.toml", "--model", tiny_checkpoint]
    words += ["--out", tmp_path / "results", "--json"]
    monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    found = {one["set"]: one for one in map(json.loads, printed.out.splitlines())}
    assert set(hub) == {("org/photos", None, "test"), ("org/captioned", "en", "validation")}

    encoder = clipkit.load_model(tiny_checkpoint)
    albums, captioned = (open_source(tmp_path / name) for name in ("albums", "captioned"))
    labels = clipkit.data.prompts.read_labels(str(tmp_path / "labels.txt"))
    simple = clipkit.data.prompts.read_templates("simple")
    apart = evaluate_retrieval(captioned, encoder, equal_captions="apart", progress=False)
    wanted = {
        "classes": evaluate_zero_shot(albums, encoder, sorted(LABELS), progress=False),
        "words": evaluate_zero_shot(albums, encoder, labels, simple, progress=False),
        "captions": apart,
        "shards": evaluate_retrieval(captioned, encoder, progress=False),
    }
    assert list(found) == list(wanted)
    for name, report in wanted.items():
        values = {metric: one["value"] for metric, one in found[name]["metrics"].items()}
        assert values == pytest.approx(report.metrics, abs=1e-6, nan_ok=True), name
        assert found[name]["counts"]["images"] == 12
    assert found["captions"]["data"] == "hf:org/captioned/en:validation"


def test_a_hub_set_that_is_there_is_not_measured_again(hub, tiny_checkpoint, tmp_path, monkeypatch):
    encoder, lines = clipkit.load_model(tiny_checkpoint), []
    sets = read_suite(tmp_path / "suite.toml")
    out, report = tmp_path / "out", lines.append
    first = evaluate_suite(sets, encoder, out, root=tmp_path, report=report, progress=False)
    monkeypatch.setattr("clipkit.tasks.suite.evaluate_zero_shot", None)
    monkeypatch.setattr("clipkit.tasks.suite.evaluate_retrieval", None)
    file = tmp_path / "suite.toml"
    again = evaluate_suite(str(file), encoder, out, report=report, progress=False)
    assert again == first
    assert [line.split(": ")[1] for line in lines] == ["evaluated"] * 4 + ["already evaluated"] * 4
    frame = first.to_pandas()
    assert list(frame["set"].unique()) == ["classes", "words", "captions", "shards"]
    top1 = frame[(frame["set"] == "words") & (frame["metric"] == "top1")]
    assert top1["value"].item() == first[1].estimates["top1"].value
    assert "captions" in first._repr_html_()
    json.dumps(first.to_dict(), allow_nan=True)
