"""Each notebook runs from top to bottom, with small parameters."""

import json
import shutil

import pytest
from PIL import Image

from tests.helpers.paths import NOTEBOOKS

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def run(name, folder, **parameters):
    """Outputs of a notebook run in ``folder``: its data by kind of content, cell by cell."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    (place,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for key in parameters:
        assert f"\n{key} = " in f"\n{place.source}", f"{name} has no parameter {key}"
    place.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    ).execute()
    return [
        output["data"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output
    ]


def count(outputs, kind, text=""):
    return sum(text in str(data.get(kind, "")) for data in outputs if kind in data)


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.name)
def test_notebooks_are_kept_without_outputs(file):
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_search_photos(colour_folder, tiny_checkpoint, tmp_path):
    pytest.importorskip("openTSNE")
    outputs = run(
        "01_search_photos.ipynb",
        tmp_path,
        PHOTOS=str(colour_folder),
        MODEL=str(tiny_checkpoint),
        WORDS=["a red picture", "a blue picture"],
    )
    assert count(outputs, "text/html", "encoder ") == 1
    assert count(outputs, "text/html", "data:image/jpeg;base64,") == 4
    assert count(outputs, "image/png") == 2
    assert count(outputs, "text/plain", "unchanged=12") == 1
    assert (tmp_path / "search_photos" / "map.html").is_file()


def test_zero_shot(colour_folder, tiny_checkpoint, tmp_path):
    for file in colour_folder.glob("*.png"):
        album = tmp_path / "albums" / file.stem.split("-")[0]
        album.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, album)
    outputs = run(
        "02_zero_shot.ipynb", tmp_path, ALBUMS=str(tmp_path / "albums"), MODEL=str(tiny_checkpoint)
    )
    assert count(outputs, "text/html", "data:image/jpeg;base64,") == 1
    assert count(outputs, "text/html", "95 % interval") == 1
    assert count(outputs, "image/png") == 1


def test_pretrain_small(colour_folder, tmp_path):
    outputs = run(
        "03_pretrain_small.ipynb",
        tmp_path,
        TRAIN=str(colour_folder),
        UNSEEN=str(colour_folder),
        MINUTES=0.02,
        WORDS=["a red picture"],
    )
    assert count(outputs, "text/html", "finished") == 1
    assert count(outputs, "text/html", "text_to_image_r1") == 2
    assert count(outputs, "text/html", "data:image/jpeg;base64,") == 1
    assert count(outputs, "image/png") == 1
    assert (tmp_path / "pretrain_small" / "run" / "manifest.json").is_file()


def test_update_and_filter(colour_folder, tiny_checkpoint, tmp_path):
    pytest.importorskip("pandas")
    files = sorted(colour_folder.glob("*.png"))
    rows = [
        f"{file},{file.with_suffix('.txt').read_text().strip()},{2020 + number}"
        for number, file in enumerate(files)
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath,title,year", *rows]))
    (tmp_path / "more").mkdir()
    for file in files[:2]:
        with Image.open(file) as image:
            image.rotate(90, expand=True).save(tmp_path / "more" / file.name)
    outputs = run(
        "04_update_and_filter.ipynb",
        tmp_path,
        PAIRS=str(tmp_path / "pairs.csv"),
        MORE=str(tmp_path / "more"),
        MODEL=str(tiny_checkpoint),
        WORDS="a red picture",
        MINUS="a blue picture",
        WHERE="year >= 2026",
    )
    assert count(outputs, "text/html", "data:image/jpeg;base64,") == 2
    assert count(outputs, "text/html", "<table") >= 1  # the hits as a data frame
    assert count(outputs, "text/plain", "added=2") == 1
