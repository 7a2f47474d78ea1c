"""The images of a table are found wherever its paths and the files have drifted apart."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.config import parse_config
from clipkit.data.open_source import open_source
from clipkit.errors import DataError
from clipkit.index.roots import file_of, roots_of
from clipkit.tasks.check_data import check_data
from clipkit.tasks.index import build_index
from clipkit.tasks.sync import sync_index
from clipkit.training.data import open_training_data
from tests.helpers.toys import ColourEncoder

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


def images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), COLOURS[Path(name).stem]).save(root / name, "PNG")


def table(path, *paths):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{image},caption {number}\n" for number, image in enumerate(paths)]
    path.write_text("image,caption\n" + "".join(rows), encoding="utf-8")
    return path


def keys(source):
    """The keys, after the colours of the files behind them have been checked."""
    found = [row.key for row in source.rows]
    for row in source.rows:
        assert row.read_image().getpixel((0, 0)) == COLOURS[Path(row.key.partition("#")[0]).stem]
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_urls_home_and_absolute_paths_in_one_table(tmp_path, monkeypatch, streaming):
    images(tmp_path, "in/x y/a.png", "in/b.png", "home/c.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    url = f"file://{tmp_path}/in/x%20y/a.png"
    paths = ["x y\\a.png", ".\\b.png", url, "~/c.png", f"{tmp_path}/in/b.png"]
    source = open_source(table(tmp_path / "in" / "t.csv", *paths), streaming=streaming)
    expected = ["x y/a.png", "b.png", "x y/a.png", f"{tmp_path}/home/c.png", "b.png"]
    assert keys(source) == (expected if streaming else [*expected[:2], expected[3]])
    assert source.notes == []


def test_a_backslash_may_be_part_of_a_name(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "a.png").rename(tmp_path / "x\\a.png")
    source = open_source(table(tmp_path / "t.csv", "x\\a.png"))
    assert [row.key for row in source.rows] == ["x\\a.png"]
    assert source.rows[0].read_image().getpixel((0, 0)) == COLOURS["a"]


def test_the_one_folder_that_has_the_images_is_found(tmp_path):
    images(tmp_path, "deep/photos/a.png", "deep/photos/b.png", "other/c.png")
    source = open_source(table(tmp_path / "t.csv", "a.png", "b.png"))
    assert keys(source) == ["a.png", "b.png"]
    folder = tmp_path / "deep" / "photos"
    assert source.root == folder
    assert source.notes == [
        f"the images of the table are in {folder}; choose another folder with --image-root "
        "(image_root=)"
    ]


def test_two_folders_that_have_the_images_are_named(tmp_path):
    images(tmp_path, "x/a.png", "y/a.png")
    path = table(tmp_path / "t.csv", "a.png", "b.png")
    source = open_source(path)
    assert source.root == tmp_path
    assert source.notes == [
        f"none of the first 2 images is in {tmp_path}, such as a.png; 2 folders have images of "
        f"these names: {tmp_path / 'x'}, {tmp_path / 'y'}; name the folder of the images with "
        "--image-root (image_root=)"
    ]
    chosen = open_source(path, image_root=tmp_path / "y")
    assert chosen.rows[0].image.path == str(tmp_path / "y" / "a.png")
    assert chosen.notes == []


@pytest.mark.parametrize(
    ("paths", "dropped"),
    [
        (["C:\\Users\\me\\img\\a.png", "C:\\Users\\me\\img\\b.png"], "C:/Users/me/"),
        (["/home/me/img/a.png", "/home/me/img/b.png"], "/home/me/"),
        (["data/img/a.png", "data/img/b.png"], "data/"),
        (["\\\\server\\img\\a.png", "\\\\server\\img\\b.png"], "//server/"),
    ],
)
def test_paths_of_another_machine(tmp_path, paths, dropped):
    images(tmp_path, "img/a.png", "img/b.png")
    source = open_source(table(tmp_path / "t.csv", *paths))
    assert keys(source) == ["img/a.png", "img/b.png"]
    assert source.notes == [
        f"there is no file {paths[0]}: {tmp_path} is read in place of {dropped}; choose another "
        "folder with --image-root (image_root=)"
    ]
    (tmp_path / "t.csv").rename(tmp_path / "img" / "t.csv")
    (tmp_path / "img").rename(tmp_path / "moved")
    source = open_source(tmp_path / "moved" / "t.csv", image_root=tmp_path / "moved")
    assert keys(source) == ["a.png", "b.png"]


def test_paths_of_another_machine_without_their_files(tmp_path):
    source = open_source(table(tmp_path / "t.csv", "C:\\Users\\me\\a.png"))
    assert source.notes == [
        "the paths of the table are another machine's, such as C:\\Users\\me\\a.png; name the "
        "folder of the images with --image-root (image_root=)"
    ]


def test_names_without_suffix(tmp_path):
    images(tmp_path, "img/a.png", "img/b.PNG")
    (tmp_path / "img" / "a.txt").write_text("no image")
    source = open_source(table(tmp_path / "t.csv", "img/a", "img/b"))
    assert keys(source) == ["img/a.png", "img/b.PNG"]
    (tmp_path / "img" / "a.jpg").write_bytes(b"which of the two?")
    source = open_source(tmp_path / "t.csv")
    assert [row.key for row in source.rows] == ["img/a", "img/b.PNG"]


def test_names_with_the_number_of_a_caption(tmp_path):
    images(tmp_path, "img/a.png", "img/b.png")
    source = open_source(table(tmp_path / "t.csv", "a.png#0", "a.png#1", "b.png#0"))
    assert keys(source) == ["a.png", "b.png"]
    assert [row.captions for row in source.rows] == [["caption 0", "caption 1"], ["caption 2"]]


def test_images_that_exist_are_left_where_they_are(tmp_path):
    images(tmp_path, "a.png", "sub/b.png")
    source = open_source(table(tmp_path / "t.csv", "a.png", "b.png"))
    assert (source.root, source.notes) == (tmp_path, [])
    assert [row.image.path for row in source.rows] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_table_takes_an_image_root(tmp_path, suffix):
    images(tmp_path, "photos/a.png", "photos/b.png")
    path = tmp_path / "tables" / f"t{suffix}"
    path.parent.mkdir()
    rows = {"image": ["a.png", "b.png"], "caption": ["one", "two"]}
    if suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    elif suffix == ".jsonl":
        lines = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, lines)))
    else:
        table(path, *rows["image"])
    for root in (tmp_path / "photos", str(tmp_path / "photos")):
        source = open_source(path, image_root=root)
        assert (source.root, keys(source)) == (tmp_path / "photos", ["a.png", "b.png"])
    report = check_data(path, image_root=tmp_path / "photos")
    assert (report.images, report.notes) == (2, [])
    with pytest.raises(DataError, match="none of the first 2 images is in .*, such as a.png"):
        open_source(path, image_root=tmp_path / "tables")
    with pytest.raises(DataError, match="the image root .*nowhere is not a folder"):
        open_source(path, image_root=tmp_path / "nowhere")


def test_folders_say_that_they_have_no_use_for_an_image_root(tmp_path):
    images(tmp_path, "a.png")
    source = open_source(tmp_path, image_root=tmp_path)
    assert source.notes == [f"{tmp_path} is not a table, so the image root is not used"]


def test_a_training_configuration_names_the_image_root(tmp_path):
    images(tmp_path, "photos/a.png", "photos/b.png", "photos/c.png")
    path = table(tmp_path / "tables" / "t.csv", "a.png", "b.png", "c.png")
    root = str(tmp_path / "photos")
    data = {"train": str(path), "val": str(path), "image_root": root}
    training, validation = open_training_data(parse_config({"data": data}).data, 0)
    assert keys(training) == keys(validation) == ["a.png", "b.png", "c.png"]


def test_an_index_finds_the_images_again(tmp_path, monkeypatch):
    images(tmp_path, "photos/a.png", "photos/b.png")
    table(tmp_path / "tables" / "t.csv", "a.png", "b.png")
    monkeypatch.chdir(tmp_path / "tables")
    source = open_source("t.csv", image_root="../photos", metadata=True)
    index = build_index(source, tmp_path / "index", ColourEncoder())
    monkeypatch.chdir("/")
    roots = roots_of(index.manifest)
    assert file_of(roots, "a.png") == tmp_path / "photos" / "a.png"
    images(tmp_path, "photos/c.png")
    table(tmp_path / "tables" / "t.csv", "a.png", "b.png", "c.png")
    changes = sync_index(tmp_path / "index", encoder=ColourEncoder())
    assert (changes.added, changes.unchanged) == (1, 2)
