"""Folders and zip archives as people have them: captions, labels, splits, and what is not used."""

import gzip
import json
import os
import struct
import unicodedata
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.data.images import Skipped, find_images
from clipkit.data.open_source import open_source
from clipkit.data.random_access import open_image_reader
from clipkit.errors import DataError
from clipkit.index.hits import EmbeddedImages
from clipkit.index.roots import file_of, roots_of
from clipkit.index.vector_index import VectorIndex
from clipkit.tasks.index import build_index
from clipkit.tasks.sync import sync_index
from tests.helpers.paths import SHARED
from tests.helpers.toys import ColourEncoder, png, square, write_tar

COLOURS = ("red", "green", "blue")
PNGS = {colour: png(square(colour)) for colour in COLOURS}
TEXTS = {colour: f"a {colour} square" for colour in COLOURS}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def photos(root, name="{}.png"):
    for colour, data in PNGS.items():
        put(root / name.format(colour), data)
    return root


def found(source):
    return {row.key: (row.captions, row.label) for row in source.rows}


def expected(name="{}.png", label=None):
    return {name.format(colour): ([text], label) for colour, text in TEXTS.items()}


def csv(header, name="{}.png"):
    rows = [f"{name.format(colour)},{text}" for colour, text in TEXTS.items()]
    return "\n".join([header, *rows])


SIDECARS = {
    "txt": ("{}.txt", str),
    "TXT": ("{}.TXT", str),
    "caption": ("{}.caption", str),
    "double ending": ("{}.png.txt", str),
    "numbered": ("{}.0.txt", str),
    "JSON": ("{}.json", lambda text: json.dumps({"width": 3, "caption": text})),
    "JSON list": ("{}.json", lambda text: json.dumps([text])),
    "UTF-8 with a mark": ("{}.txt", lambda text: text.encode("utf-8-sig")),
    "UTF-16": ("{}.txt", lambda text: text.encode("utf-16")),
    "UTF-16, big end first": ("{}.txt", lambda text: b"\xfe\xff" + text.encode("utf-16-be")),
    "UTF-32": ("{}.txt", lambda text: text.encode("utf-32")),
}


@pytest.mark.parametrize("kind", SIDECARS)
@pytest.mark.parametrize("zipped", [False, True])
def test_sidecars_as_people_have_them(tmp_path, kind, zipped):
    name, content = SIDECARS[kind]
    photos(tmp_path / "in")
    for colour, text in TEXTS.items():
        put(tmp_path / "in" / name.format(colour), content(text))
    if zipped:
        source = open_source(zip_of(tmp_path / "in", tmp_path / "p.zip"))
        assert found(source) == expected("p.zip/{}.png")
    else:
        source = open_source(tmp_path / "in")
        assert (source.kind, found(source)) == ("sidecars", expected())
    assert (source.skipped, source.notes) == ([], [])


def test_a_change_of_a_sidecar_changes_the_fingerprint(tmp_path):
    photos(tmp_path)
    prints = [open_source(tmp_path).fingerprint]
    for name, content in (("red.json", "{}"), ("red.json", '"a"'), ("red.caption", "")):
        put(tmp_path / name, content)
        prints.append(open_source(tmp_path).fingerprint)
    assert len(set(prints)) == 4


def test_captions_go_before_json_and_a_blank_text_does_not_count(tmp_path):
    photos(tmp_path)
    put(tmp_path / "red.txt", "one\ntwo")
    put(tmp_path / "red.json", '{"caption": "no", "label": "warm"}')
    put(tmp_path / "green.txt", " \n")
    put(tmp_path / "green.json", '{"caption": null, "text": "yes"}')
    put(tmp_path / "blue.cls", "cold\n")
    assert found(open_source(tmp_path)) == {
        "blue.png": ([], "cold"),
        "green.png": (["yes"], None),
        "red.png": (["one", "two"], "warm"),
    }
    named = open_source(tmp_path, caption="label")
    assert found(named)["red.png"] == (["warm"], "warm")
    without = open_source(tmp_path, caption="", label="")
    assert (found(without)["red.png"], without.notes) == (([], None), [])


def test_damaged_sidecars_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.data.formats.folders.SIDECAR_LIMIT", 10)
    photos(tmp_path)
    put(tmp_path / "red.json", "{broken")
    put(tmp_path / "green.txt", "x" * 11)
    put(tmp_path / "blue.txt", b"caf\xe9")
    source = open_source(tmp_path)
    assert [(item.key, item.reason.split(":")[0]) for item in source.skipped] == [
        ("blue.png", "a caption of it is not UTF-8 and is left out"),
        ("green.png", "its sidecar cannot be read"),
        ("red.png", "the JSON beside it is damaged and left out"),
    ]


def test_files_that_are_not_used_are_counted(tmp_path):
    photos(tmp_path, "images/{}.png")
    photos(tmp_path, "captions/{}.txt")
    for name in ("notes.md", "more.md", "LICENSE", ".hidden", "Thumbs.db", "__MACOSX/._a.png"):
        put(tmp_path / name, b"")
    source = open_source(tmp_path)
    assert source.notes == [
        f"{tmp_path}: files that were not used: 3 .txt, 2 .md, 1 without ending; captions are read "
        "from a.txt, a.caption or a.json in the folder of a.jpg"
    ]


def test_sidecars_without_a_caption_are_counted(tmp_path):
    photos(tmp_path)
    put(tmp_path / "red.json", '{"kind": "fox", "worte": "hallo"}')
    source = open_source(tmp_path)
    assert source.notes == [
        f"{tmp_path}: the sidecars of 1 images hold no caption; the fields of the JSON are kind, "
        "worte"
    ]
    assert found(open_source(tmp_path, caption="worte"))["red.png"] == (["hallo"], None)


def test_files_of_file_managers_are_ignored(tmp_path):
    photos(tmp_path)
    junk = ["._red.png", "@eaDir/SYNOPHOTO_THUMB_M.png", "__MACOSX/a.png", "$RECYCLE.BIN/b.png"]
    for name in junk:
        put(tmp_path / name, PNGS["red"])
    assert find_images(tmp_path) == (["blue.png", "green.png", "red.png"], [])


TABLES = {
    "metadata.csv": csv("file_name,text"),
    "metadata.jsonl": "\n".join(
        json.dumps({"file_name": f"{colour}.png", "prompt": text}) for colour, text in TEXTS.items()
    ),
    "captions.csv": csv("image,caption"),
    "captions.txt": csv("image,caption"),
    "list.tsv": csv("image,caption").replace(",", "\t"),
    "prompts.csv": csv("image,prompt"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_one_table_beside_the_images_is_read(tmp_path, name):
    photos(tmp_path)
    put(tmp_path / name, TABLES[name])
    put(tmp_path / "prices.csv", "fruit,price\napple,3")
    source = open_source(tmp_path)
    assert (source.kind, source.root, found(source)) == ("metadata", tmp_path, expected())
    *said, count = source.notes
    assert count == f"{tmp_path}: files that were not used: 1 .csv"
    if name.startswith("metadata"):
        assert said == []
    else:
        reason, read = said
        assert "prices.csv has no image column among: fruit, price" in reason
        assert reason.endswith("(the file is not used as a table of the images beside it)")
        assert read == f"{tmp_path}: captions are read from {name}"
    assert source.skipped == []


def test_parquet_metadata_is_read(tmp_path):
    photos(tmp_path)
    columns = {"file_name": [f"{colour}.png" for colour in TEXTS], "text": list(TEXTS.values())}
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    assert found(open_source(tmp_path)) == expected()


def test_a_table_of_names_in_a_sub_folder_is_read(tmp_path):
    photos(tmp_path / "in" / "Images")
    put(tmp_path / "in" / "captions.txt", csv("image,caption"))
    source = open_source(tmp_path / "in")
    assert (source.root, found(source)) == (tmp_path / "in", expected("Images/{}.png"))
    assert found(open_source(tmp_path / "in", streaming=True)) == expected("Images/{}.png")
    index = build_index(tmp_path / "in", tmp_path / "index", encoder=ColourEncoder())
    roots = roots_of(index.manifest)
    assert file_of(roots, "Images/red.png") == tmp_path / "in" / "Images" / "red.png"
    sync_index(tmp_path / "index", encoder=ColourEncoder())
    hits = VectorIndex.open(tmp_path / "index").search(np.eye(3)[0], k=1)
    assert [record["captions"] for record in hits.records()] == [["a red square"]]


def test_two_tables_of_the_images_are_asked_about(tmp_path):
    photos(tmp_path)
    put(tmp_path / "a.csv", csv("image,caption"))
    put(tmp_path / "b.csv", csv("image,caption"))
    with pytest.raises(
        DataError, match=r"several tables of its images, a.csv and b.csv; name one.*or all"
    ):
        open_source(tmp_path)
    put(tmp_path / "metadata.csv", csv("file_name,text"))
    assert found(open_source(tmp_path)) == expected()
    put(tmp_path / "metadata.jsonl", TABLES["metadata.jsonl"])
    with pytest.raises(DataError, match=r"several tables .* metadata.csv and metadata.jsonl"):
        open_source(tmp_path)


def test_images_that_a_table_does_not_name_are_counted(tmp_path):
    photos(tmp_path)
    put(tmp_path / "captions.csv", "image,caption\nred.png,a red square")
    source = open_source(tmp_path)
    assert found(source) == {"red.png": (["a red square"], None)}
    assert source.notes[-1] == (
        f"{tmp_path}: 2 images are not in captions.csv and were not used, such as blue.png"
    )


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_normalisation_of_names_does_not_matter(tmp_path, forms):
    on_disk, in_table = (unicodedata.normalize(form, "café") for form in forms)
    photos(tmp_path, on_disk + "/{}.png")
    put(tmp_path / "metadata.csv", csv("file_name,text", in_table + "/{}.png"))
    source = open_source(tmp_path)
    assert found(source) == expected(on_disk + "/{}.png")
    assert all(os.path.isfile(row.image.path) for row in source.rows)


def test_splits_with_metadata_are_joined_or_named(tmp_path):
    photos(tmp_path / "train")
    put(tmp_path / "train" / "metadata.csv", csv("file_name,text"))
    put(tmp_path / "test" / "cyan.png", png(square("cyan")))
    put(tmp_path / "test" / "metadata.csv", "file_name,text\ncyan.png,a cyan square")
    source = open_source(tmp_path)
    cyan = {"test/cyan.png": (["a cyan square"], None)}
    assert found(source) == {**cyan, **expected("train/{}.png")}
    assert (source.kind, source.root) == ("metadata", tmp_path)
    assert source.notes == [
        f"{tmp_path}: all splits are read, test (1 images), train (3 images); name one as "
        f"{tmp_path}:test"
    ]
    train = open_source(f"{tmp_path}:train")
    assert (found(train), train.root) == (expected(), tmp_path / "train")
    assert train.spec == str(tmp_path / "train")
    put(tmp_path / "test" / "metadata.csv", "file_name,text,size\ncyan.png,a cyan square,3")
    assert open_source(tmp_path).count == 4
    with pytest.raises(DataError, match="have different columns; open the sub-folders one by one"):
        open_source(tmp_path, metadata=True)


def test_splits_are_not_labels(tmp_path):
    photos(tmp_path, "train/warm/{}.png")
    photos(tmp_path, "val/cold/{}.png")
    source = open_source(tmp_path)
    assert source.kind == "classes"
    assert {label for _, label in found(source).values()} == {"warm", "cold"}
    assert "all splits are read, train (3 images), val (3 images)" in source.notes[0]
    val = open_source(f"{tmp_path}:val")
    assert {(key, label) for key, (_, label) in found(val).items()} == {
        (f"cold/{colour}.png", "cold") for colour in COLOURS
    }
    photos(tmp_path / "flat", "train/{}.png")
    assert open_source(tmp_path / "flat").kind == "folder"


def test_images_without_an_ending_are_found_by_content(tmp_path):
    photos(tmp_path, "{}")
    put(tmp_path / "red.txt", TEXTS["red"])
    put(tmp_path / "README", "no image")
    source = open_source(tmp_path)
    assert {key: captions for key, (captions, _) in found(source).items()} == {
        "blue": [],
        "green": [],
        "red": [TEXTS["red"]],
    }
    assert source.notes == [
        f"{tmp_path}: 3 images were recognised by their content",
        f"{tmp_path}: files that were not used: 1 without ending",
    ]


# Folders of tars, tables and archives


def fill(kind, folder):
    """A folder of shards with the three colours, and the expected keys in order."""
    folder.mkdir()
    if kind == "img2dataset":
        for shard, (colour, data) in enumerate(PNGS.items()):
            name = f"{shard:05}"
            members = [(f"{name}0.jpg", data), (f"{name}0.txt", TEXTS[colour].encode())]
            write_tar(folder / f"{name}.tar", members)
            pq.write_table(pa.table({"caption": [TEXTS[colour]]}), folder / f"{name}.parquet")
            put(folder / f"{name}_stats.json", "{}")
        return [f"{n:05}.tar/{n:05}0.jpg" for n in range(3)]
    if kind == "compressed tars":
        for colour, data in PNGS.items():
            write_tar(folder / "x", [(f"{colour}.png", data), (f"{colour}.txt", b"a")])
            put(folder / "deep" / f"{colour}.tar.gz", gzip.compress((folder / "x").read_bytes()))
            os.remove(folder / "x")
        return [f"{colour}.tar.gz/{colour}.png" for colour in sorted(COLOURS)]
    if kind == "zip archives":
        for colour, data in PNGS.items():
            photo = folder.parent / "one" / colour
            put(photo / f"{colour}.png", data)
            zip_of(photo, folder / f"{colour}.zip")
        return [f"{colour}.zip/{colour}.png" for colour in sorted(COLOURS)]
    for n, colour in enumerate(COLOURS):
        columns = {"image": [PNGS[colour]], "text": [TEXTS[colour]]}
        pq.write_table(pa.table(columns), folder / f"train-{n}.parquet")
    return ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["img2dataset", "compressed tars", "zip archives", "Parquet"])
def test_folders_of_shards(tmp_path, kind):
    keys = fill(kind, tmp_path / "shards")
    source = open_source(tmp_path / "shards")
    rows = {row.key: row.image.data for row in source.rows}
    assert list(rows) == keys
    assert set(rows.values()) == set(PNGS.values())
    beside = ["files that were not used: 3 .parquet, 3 .json"] if kind == "img2dataset" else []
    assert [note.partition(": ")[2] for note in source.notes] == beside
    index = build_index(tmp_path / "shards", tmp_path / "index", encoder=ColourEncoder())
    inside = EmbeddedImages(roots_of(index.manifest))
    for key, data in rows.items():
        assert inside.hold(key)
        assert inside.read(key) == data
    assert inside.read("none") is None


def test_a_folder_of_json_lines_is_one_table(tmp_path):
    photos(tmp_path / "img")
    (tmp_path / "lists").mkdir()
    for colour in COLOURS:
        line = json.dumps({"image": str(tmp_path / "img" / f"{colour}.png"), "text": TEXTS[colour]})
        put(tmp_path / "lists" / f"{colour}.jsonl", line)
    rows = [row.captions for row in open_source(tmp_path / "lists").rows]
    assert sorted(rows) == sorted([text] for text in TEXTS.values())


def test_shards_of_several_splits_or_kinds_are_asked_about(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        (tmp_path / "a").mkdir(exist_ok=True)
        write_tar(tmp_path / "a" / f"{name}.tar", [("a.png", PNGS["red"])])
    with pytest.raises(DataError, match=r"the splits test, train; name one, as '.*/a/test\*.tar'"):
        open_source(tmp_path / "a")
    for split in ("train", "val"):
        (tmp_path / "b" / split).mkdir(parents=True)
        write_tar(tmp_path / "b" / split / "0.tar", [("a.png", PNGS["red"])])
    with pytest.raises(DataError, match=r"the splits train, val; name one, as .*/b:train"):
        open_source(tmp_path / "b")
    assert [row.key for row in open_source(f"{tmp_path}/b:val").rows] == ["0.tar/a.png"]
    put(tmp_path / "c" / "a.csv", "image,text\na,b")
    put(tmp_path / "c" / "b.parquet", b"")
    with pytest.raises(DataError, match="no images but tables of several kinds, 1 csv and 1 parq"):
        open_source(tmp_path / "c")


def test_a_store_is_not_taken_for_tables(tmp_path):
    photos(tmp_path / "in")
    build_index(tmp_path / "in", tmp_path / "index", encoder=ColourEncoder())
    with pytest.raises(DataError, match="index is a clipkit index, expected images or a table"):
        open_source(tmp_path / "index")


# Zip archives


def zip_of(folder, file, **options):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder).as_posix())
    return file


def zipped(file, members):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file


def test_a_zip_is_read_as_a_folder_is(tmp_path):
    photos(tmp_path / "in", "photos/warm/{}.png")
    put(tmp_path / "in" / "__MACOSX" / "photos" / "._red.png", b"junk")
    put(tmp_path / "in" / "photos" / "captions.txt", "x")
    source = open_source(zip_of(tmp_path / "in", tmp_path / "p.zip"))
    assert (source.kind, source.streaming) == ("zip", True)
    assert found(source) == {
        f"p.zip/photos/warm/{colour}.png": ([], "warm") for colour in sorted(COLOURS)
    }
    assert source.notes == [
        f"{tmp_path / 'p.zip'}: files that were not used: 1 .txt; captions are read from a.txt, "
        "a.caption or a.json in the folder of a.jpg",
        f"{tmp_path / 'p.zip'}: tables in archives are not read; unpack it first",
    ]
    held = open_source(tmp_path / "p.zip", streaming=False)
    assert found(held) == found(source)
    pictures = open_image_reader(str(tmp_path / "p.zip"))
    for row in source.rows:
        assert pictures.read(row.key) == row.image.data
    for key in ("p.zip/photos/captions.txt", "p.zip", "p.zip/", "p.zip/../in/photos/warm/red.png"):
        assert pictures.read(key) is None


def test_a_zip_resumes_anywhere(tmp_path):
    members = [(f"{n:03}.png", b"image %d" % n) for n in range(50)]
    zipped(tmp_path / "p.zip", members)
    source = open_source(tmp_path / "p.zip")
    (shard,) = source.rows.shards
    passed = list(source.rows.rows(shard))
    assert [row.image.data for row, _ in passed] == [data for _, data in members]
    for at in (0, 15, 16, 48):
        rest = [row for row, _ in source.rows.rows(shard, passed[at][1])]
        assert rest == [row for row, _ in passed[at + 1 :]]


def test_what_a_zip_may_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.data.formats.folders.IMAGE_LIMIT", 1000)
    members = [("../out.png", b"1"), ("/root.png", b"2"), ("a/../in.png", b"3")]
    members += [("in.png", b"4"), ("large.png", bytes(1001)), ("good.png", b"5")]
    zipped(tmp_path / "p.zip", members)
    source = open_source(tmp_path / "p.zip")
    assert {row.key: row.image.data for row in source.rows} == {
        "p.zip/good.png": b"5",
        "p.zip/in.png": b"3",
    }
    assert source.skipped == [
        Skipped("p.zip/../out.png", "has a path that leads out of the archive"),
        Skipped("p.zip//root.png", "has a path that leads out of the archive"),
        Skipped("p.zip/in.png", "repeats the name of an earlier file in the archive"),
        Skipped("p.zip/large.png", "cannot be read: it has 1001 bytes, over 1000"),
    ]


def flagged(file, bits):
    """Set the flags of all files in an archive, in their local and their central headers."""
    whole = bytearray(file.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = whole.find(mark)
        while at >= 0:
            flags = struct.unpack_from("<H", whole, at + place)[0]
            struct.pack_into("<H", whole, at + place, flags | bits)
            at = whole.find(mark, at + 4)
    file.write_bytes(whole)


def test_zips_that_cannot_be_read_are_refused(tmp_path):
    zipped(tmp_path / "p.zip", [("a.png", PNGS["red"])])
    whole = (tmp_path / "p.zip").read_bytes()
    flagged(tmp_path / "p.zip", 1)
    with pytest.raises(DataError, match="p.zip is encrypted; unpack it with its password"):
        open_source(tmp_path / "p.zip")
    (tmp_path / "p.zip").write_bytes(whole[:-10])
    with pytest.raises(DataError, match="holds no image .* p.zip is damaged or missing: File is"):
        open_source(tmp_path / "p.zip")
    zipped(tmp_path / "p.zip", [("a.csv", "x")])
    with pytest.raises(DataError, match="p.zip holds no image that can be used"):
        open_source(tmp_path / "p.zip")


def test_a_zip_with_a_damaged_image(tmp_path):
    zipped(tmp_path / "p.zip", [("a.png", b"a" * 50), ("b.png", b"b" * 50)])
    whole = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "p.zip").write_bytes(whole.replace(b"a" * 50, b"x" * 50))
    source = open_source(tmp_path / "p.zip")
    assert [row.key for row in source.rows] == ["p.zip/b.png"]
    assert source.skipped[0].key == "p.zip/a.png"
    assert source.skipped[0].reason.startswith("cannot be read: Bad CRC-32")
    with pytest.raises(DataError, match=r"cannot read .*p.zip: Bad CRC-32"):
        open_image_reader(str(tmp_path / "p.zip")).read("p.zip/a.png")


def test_names_in_zips_of_macos_are_utf8(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("cafXX.png", PNGS["red"])
    whole = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "p.zip").write_bytes(whole.replace(b"cafXX", "café".encode()))
    assert [row.key for row in open_source(tmp_path / "p.zip").rows] == ["p.zip/café.png"]


CASES = SHARED.parent / "cases" / "folders"
CAPTIONS = {"noext": 0, "split": 0, "sep": 0, "emptyside": 0, "stem": 48}
IMAGES = {"i2d": 24, "stem": 48}
NAMES = "TXT caption jpgtxt json hfmeta hfmetapq othercsv k8 hfsplit split prompts metanfd noext "
NAMES += "junk u16 i2d stem emptyside sep"


@pytest.mark.parametrize("name", NAMES.split())
def test_cases_as_people_have_them(name):
    if not CASES.exists():
        pytest.skip("the shared cases are not here")
    source = open_source(CASES / name)
    rows = list(source.rows)
    assert len(rows) == IMAGES.get(name, 24)
    assert sum(len(row.captions) for row in rows) == CAPTIONS.get(name, len(rows))
    assert source.skipped == []
    if name in ("split", "hfsplit"):
        assert len(open_source(f"{CASES / name}:train").rows) == 12
