import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data import source as rows_module
from clipkit.data.formats.webdataset import expand
from clipkit.data.images import Skipped
from clipkit.data.open_source import open_source
from clipkit.errors import DataError, ImageError
from tests.helpers.paths import SHARED
from tests.helpers.toys import write_tar

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(name):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), COLOURS[name]).save(stream, "PNG")
    return stream.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def images(root, *keys):
    for key in keys:
        put(root / key, png(Path(key).stem))


def told(source):
    """Everything but the pixels, which are checked on the way."""
    found = []
    for row in source.rows:
        assert (row.image.data is None) != (row.image.path is None)
        assert row.metadata is None
        found.append((row.key, row.captions, row.label))
    return found


def colours(source):
    return [row.read_image().getpixel((0, 0)) for row in source.rows]


def refusal(spec, **options):
    with pytest.raises(DataError) as caught:
        open_source(spec, **options)
    return str(caught.value)


# Folders


def test_a_single_image(tmp_path):
    images(tmp_path, "a.png")
    source = open_source(tmp_path / "a.png")
    assert (source.kind, source.root, source.streaming) == ("image", tmp_path, False)
    assert told(source) == [("a.png", [], None)]
    assert colours(source) == [COLOURS["a"]]


def test_a_plain_folder(tmp_path):
    images(tmp_path, "b.png", "deep/er/a.png")
    source = open_source(str(tmp_path))
    assert source.kind == "folder"
    assert told(source) == [("b.png", [], None), ("deep/er/a.png", [], None)]
    assert colours(source) == [COLOURS["b"], COLOURS["a"]]


def test_class_folders(tmp_path):
    images(tmp_path, "red fox/a.png", "cat/deep/b.png", "cat/c.png")
    source = open_source(tmp_path)
    assert source.kind == "classes"
    assert told(source) == [
        ("cat/c.png", [], "cat"),
        ("cat/deep/b.png", [], "cat"),
        ("red fox/a.png", [], "red fox"),
    ]


def test_sidecars(tmp_path):
    images(tmp_path, "x/a.png", "x/b.png", "x/c.png")
    put(tmp_path / "x/a.txt", "\ufeffone\r\n\n  zwei äöü  \n")
    put(tmp_path / "x/b.txt", b"caf\xe9\n")
    source = open_source(tmp_path)
    assert source.kind == "sidecars"
    assert told(source) == [
        ("x/a.png", ["one", "zwei äöü"], None),
        ("x/b.png", [], None),
        ("x/c.png", [], None),
    ]
    assert source.skipped == [
        Skipped("x/b.png", "a caption of it is not UTF-8 and is left out"),
    ]


def test_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    images(tmp_path / "in", "a.png")
    monkeypatch.chdir(tmp_path)
    source = open_source("in")
    monkeypatch.chdir("/")
    assert colours(source) == [COLOURS["a"]]


def test_an_empty_folder(tmp_path):
    assert "holds no images, expected a folder of images" in refusal(tmp_path)
    put(tmp_path / "a.pdf", b"%PDF")
    assert "holds 1 files but no images (a.pdf), expected" in refusal(tmp_path)
    (tmp_path / "x.jpg").symlink_to("nowhere")
    assert "x.jpg cannot be opened: no such file or directory" in refusal(tmp_path)


def test_a_spec_that_does_not_exist(tmp_path):
    (tmp_path / "photos").mkdir()
    assert f"did you mean {tmp_path / 'photos'}" in refusal(tmp_path / "fotos")
    assert f"did you mean {tmp_path / 'photos'}" in refusal(tmp_path / "phots" / "deep" / "x.csv")
    assert "is written hf:org/name:split" in refusal("some/where")
    assert "no-{000..003}.tar does not exist" in refusal(tmp_path / "no-{000..003}.tar")


def test_an_unknown_form(tmp_path):
    put(tmp_path / "a.pdf", b"%PDF")
    assert "has the form .pdf, expected images" in refusal(tmp_path / "a.pdf")


def test_a_path_that_is_not_utf8(tmp_path):
    assert "caf\\xe9 is not UTF-8" in refusal(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))


def test_the_fingerprint_follows_the_content(tmp_path):
    images(tmp_path, "x/a.png", "x/b.png")
    put(tmp_path / "t.csv", "image,text\nx/a.png,hi\n")
    prints = [open_source(tmp_path / name).fingerprint for name in ("x", "t.csv")]
    assert prints == [open_source(tmp_path / name).fingerprint for name in ("x", "t.csv")]
    put(tmp_path / "x/a.txt", "hello")
    put(tmp_path / "t.csv", "image,text\nx/a.png,ho!\n")
    after = [open_source(tmp_path / name).fingerprint for name in ("x", "t.csv")]
    assert not set(prints) & set(after)
    os.utime(tmp_path / "x/a.txt", ns=(1, 1))
    assert open_source(tmp_path / "x").fingerprint not in (prints[0], after[0])
    other = open_source(tmp_path / "t.csv", caption="").fingerprint
    assert other != after[1]


# Text tables


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "header",
    [
        ("filepath", "title", "label"),
        (" Image_Path ", "CAPTION", "Class"),
        ("img", "alt", "category"),
    ],
)
def test_csv_separators_and_usual_names(tmp_path, separator, header):
    images(tmp_path, "img/a.png", "img/b.png")
    lines = [header, ("img/a.png", '"a, cat; ""x"" |\t!"', "cat"), ("./img/b.png", "ä dog", "")]
    put(tmp_path / "t.csv", "\ufeff" + "\r\n".join(separator.join(line) for line in lines))
    source = open_source(tmp_path / "t.csv")
    assert source.kind == "csv"
    assert told(source) == [
        ("img/a.png", ['a, cat; "x" |\t!'], "cat"),
        ("img/b.png", ["ä dog"], None),
    ]
    assert colours(source) == [COLOURS["a"], COLOURS["b"]]


def test_rows_of_one_image_are_merged(tmp_path):
    images(tmp_path, "a.png", "b.png")
    put(tmp_path / "t.tsv", "image\ttext\na.png\t1\nb.png\t2\n./a.png\t3\na.png\t \n")
    source = open_source(tmp_path / "t.tsv")
    assert told(source) == [("a.png", ["1", "3"], None), ("b.png", ["2"], None)]
    assert source.skipped == [Skipped("a.png", "one of its rows has no caption")]


def test_neighbours_are_merged_in_a_stream(tmp_path):
    put(tmp_path / "t.csv", "image,text\na.png,1\na.png,2\nb.png,3\na.png,4\n")
    source = open_source(tmp_path / "t.csv", streaming=True)
    assert source.streaming
    assert told(source) == [
        ("a.png", ["1", "2"], None),
        ("b.png", ["3"], None),
        ("a.png", ["4"], None),
    ]


def test_columns_can_be_named(tmp_path):
    put(tmp_path / "t.csv", "image,bild,text,worte,label,art\nx,a.png,no,ja,no,tier\n")
    options = {"image": "bild", "caption": "worte", "label": "art"}
    assert told(open_source(tmp_path / "t.csv", **options)) == [("a.png", ["ja"], "tier")]
    without = open_source(tmp_path / "t.csv", caption="", label="")
    assert told(without) == [("x", [], None)]


def test_missing_columns(tmp_path):
    put(tmp_path / "t.csv", "bild,worte\na.png,hallo\n")
    found = refusal(tmp_path / "t.csv")
    assert "no image column among: bild, worte" in found
    assert "choose one with --image-column (image=)" in found
    found = refusal(tmp_path / "t.csv", image="bild")
    assert "no caption column among: bild, worte" in found
    assert "choose one with --caption-column (caption=), or '' for none" in found
    found = refusal(tmp_path / "t.csv", image="bilt")
    assert "no column 'bilt' among: bild, worte; name another image column" in found


def test_a_table_of_images_alone(tmp_path):
    put(tmp_path / "t.csv", "path\na.png\n")
    assert told(open_source(tmp_path / "t.csv")) == [("a.png", [], None)]


def test_csv_with_bad_rows(tmp_path):
    table = b"image,text\na.png,caf\xe9\na.png,good\nb.png\n\nc.png,\n,lost\nd\xff.png,x\n"
    put(tmp_path / "t.csv", table)
    source = open_source(tmp_path / "t.csv", encoding="utf-8")
    assert told(source) == [("a.png", ["good"], None), ("c.png", [], None)]
    assert source.skipped == [
        Skipped("t.csv:4", "has 1 fields, its header has 2"),
        Skipped("a.png", "a caption of it is not UTF-8 and is left out"),
        Skipped("row 3", "names no image"),
        Skipped("d\ufffd.png", "its path is not UTF-8"),
        Skipped("a.png", "one of its rows has no caption"),
    ]


def test_csv_that_is_none(tmp_path):
    put(tmp_path / "t.csv", "")
    assert "holds no rows" in refusal(tmp_path / "t.csv")
    put(tmp_path / "t.csv", "image,text\na.png\n")
    assert "holds no rows (t.csv:2 has 1 fields, its header has 2)" in refusal(tmp_path / "t.csv")


def test_keys_of_paths_elsewhere(tmp_path):
    images(tmp_path, "far/a.png", "near/b.png")
    lines = ["../far/a.png", str(tmp_path / "near" / "b.png"), str(tmp_path / "far" / "c.png")]
    put(tmp_path / "near" / "t.csv", "\n".join(["path", *lines]))
    source = open_source(tmp_path / "near" / "t.csv")
    assert [key for key, _, _ in told(source)] == ["../far/a.png", "b.png", lines[2]]
    found = [source.rows[index].read_image().getpixel((0, 0)) for index in range(2)]
    assert found == [COLOURS["a"], COLOURS["b"]]
    with pytest.raises(ImageError, match="no such file"):
        source.rows[2].read_image()


def test_jsonl(tmp_path):
    images(tmp_path, "a.png", "b.png")
    lines = [
        json.dumps({"image": "a.png", "captions": ["one", "", None, "zwei"], "label": 3}),
        json.dumps({"image": "b.png", "captions": "three", "other": {"x": []}}),
        json.dumps({"image": "b.png", "captions": "bad \ud800"}),
        "[1]",
        "{broken",
        "",
        json.dumps({"captions": "no image"}),
    ]
    put(tmp_path / "t.jsonl", "\n".join(lines))
    source = open_source(tmp_path / "t.jsonl")
    assert told(source) == [("a.png", ["one", "zwei"], "3"), ("b.png", ["three"], None)]
    assert [(item.key, item.reason.split(":")[0]) for item in source.skipped] == [
        ("t.jsonl:4", "is not a JSON object"),
        ("t.jsonl:5", "is not JSON"),
        ("a.png", "one of its captions is empty"),
        ("b.png", "a caption of it is not UTF-8 and is left out"),
        ("row 3", "names no image"),
        ("b.png", "one of its rows has no caption"),
    ]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_metadata(tmp_path, name):
    images(tmp_path, "in/a.png", "b.png")
    content = "file_name,text\nin/a.png,hello\n"
    if name.endswith("jsonl"):
        content = json.dumps({"file_name": "in/a.png", "text": "hello"})
    put(tmp_path / name, content)
    source = open_source(tmp_path)
    assert source.kind == "metadata"
    assert told(source) == [("in/a.png", ["hello"], None)]
    assert colours(source) == [COLOURS["a"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("t.csv", "image,text\n,lost"), ("t.jsonl", '{"image": "", "text": "lost"}')],
)
def test_a_source_without_one_image_is_refused(tmp_path, streaming, name, content):
    put(tmp_path / name, content)
    found = refusal(tmp_path / name, streaming=streaming)
    assert f"{name} holds no image that can be used: row 0 names no image" in found


# Parquet


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_image_structs(tmp_path, streaming):
    images(tmp_path, "a.png")
    parts = [{"bytes": None, "path": "a.png"}, {"bytes": png("b"), "path": "a.png"}, None]
    parts += [{"bytes": png("c"), "path": None}]
    columns = {"image": parts, "filename": list("wxyz"), "key": ["k", "l", "m", None]}
    parquet(tmp_path / "t.parquet", {**columns, "captions": [["1", ""], ["2", "3"], ["4"], None]})
    source = open_source(tmp_path / "t.parquet", streaming=streaming)
    assert source.streaming is streaming
    assert told(source) == [("a.png", ["1"], None), ("l", ["2", "3"], None), ("3", [], None)]
    assert colours(source) == [COLOURS[name] for name in "abc"]
    assert set(source.skipped) == {
        Skipped("a.png", "one of its captions is empty"),
        Skipped("row 2", "names no image"),
    }


def test_parquet_with_raw_bytes_numbers_its_rows(tmp_path):
    columns = {"image": [png("a")] * 11, "text": [str(number) for number in range(11)]}
    parquet(tmp_path / "t.parquet", columns, row_group_size=4)
    expected = [(f"{number:02d}", [str(number)], None) for number in range(11)]
    for streaming in (False, True):
        assert told(open_source(tmp_path / "t.parquet", streaming=streaming)) == expected


def test_parquet_with_paths(tmp_path):
    images(tmp_path, "a.png", "b.png")
    paths = pa.array(["a.png", "b.png", "a.png"]).dictionary_encode()
    parquet(tmp_path / "t.parquet", {"image": paths, "text": ["1", "2", "3"], "id": [7, 8, 9]})
    source = open_source(tmp_path / "t.parquet")
    assert told(source) == [("a.png", ["1", "3"], None), ("b.png", ["2"], None)]
    assert colours(source) == [COLOURS["a"], COLOURS["b"]]


def test_parquet_duplicate_keys_of_different_images(tmp_path):
    columns = {"image": [png("a"), png("b"), png("c")], "key": ["k", "k", "l"]}
    parquet(tmp_path / "t.parquet", columns)
    source = open_source(tmp_path / "t.parquet")
    assert told(source) == [("k", [], None), ("l", [], None)]
    assert colours(source) == [COLOURS["a"], COLOURS["c"]]
    assert source.skipped == [Skipped("k", "its key is taken by an earlier image")]


def test_several_parquet_files(tmp_path):
    for index, name in enumerate("abc"):
        parquet(tmp_path / f"p-{index}.parquet", {"image": [png(name)], "text": [name]})
    expected = [("0", ["a"], None), ("1", ["b"], None), ("2", ["c"], None)]
    for spec in ("p-*.parquet", "p-{0..2}.parquet"):
        assert told(open_source(tmp_path / spec)) == expected
    stream = open_source(tmp_path / "p-*.parquet", streaming=True)
    assert len(stream.rows.shards) == 3
    assert colours(stream) == [COLOURS[name] for name in "abc"]


def test_a_column_of_images_goes_before_one_of_names(tmp_path):
    columns = {"mask": [png("b")], "filename": ["x.png"], "image": [png("a")], "text": ["x"]}
    parquet(tmp_path / "t.parquet", columns)
    assert colours(open_source(tmp_path / "t.parquet")) == [COLOURS["a"]]


def test_numbered_caption_columns(tmp_path):
    columns = {"image": [png("a")], "caption_0": ["x"], "caption_1": ["y"], "width": [3]}
    parquet(tmp_path / "t.parquet", columns)
    assert told(open_source(tmp_path / "t.parquet")) == [("0", ["x", "y"], None)]


def test_parquet_damage(tmp_path):
    put(tmp_path / "t.parquet", b"PAR1 not really")
    assert "is not an intact Parquet file" in refusal(tmp_path / "t.parquet")
    parquet(tmp_path / "t.parquet", {"image": [1, 2], "text": ["a", "b"]})
    assert "holds int64, expected paths, or images" in refusal(tmp_path / "t.parquet")
    columns = {"image": [os.urandom(5000)] * 6, "text": ["a"] * 6}
    parquet(tmp_path / "t.parquet", columns, row_group_size=2, use_dictionary=False)
    whole = bytearray((tmp_path / "t.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0).data_page_offset
    whole[start : start + 40] = b"\xff" * 40
    put(tmp_path / "t.parquet", bytes(whole))
    source = open_source(tmp_path / "t.parquet")
    assert [key for key, _, _ in told(source)] == ["0", "1", "4", "5"]
    assert "row group 1 cannot be read from row 2 on" in source.skipped[0].reason


def test_what_is_large_streams(tmp_path, monkeypatch):
    parquet(tmp_path / "t.parquet", {"image": [png("a")], "text": ["x"]})
    assert not open_source(tmp_path / "t.parquet").streaming
    monkeypatch.setattr("clipkit.data.formats.tables.MEMORY_LIMIT", 100)
    assert open_source(tmp_path / "t.parquet").streaming
    assert not open_source(tmp_path / "t.parquet", streaming=False).streaming
    assert rows_module.MEMORY_LIMIT == 2 * 1024**3


@pytest.mark.parametrize("name", ["ucm-val", "flickr8k-112-dev"])
def test_parquet_of_real_photos(name):
    file = SHARED / f"{name}.parquet"
    if not file.exists():
        pytest.skip("the shared data is not here")
    table = pq.read_table(file)
    for streaming in (False, True):
        source = open_source(file, streaming=streaming)
        labels = (
            table["label"].to_pylist() if "label" in table.column_names else [None] * len(table)
        )
        captions = [[text.strip() for text in texts] for texts in table["captions"].to_pylist()]
        expected = list(zip(table["key"].to_pylist(), captions, labels, strict=True))
        assert told(source) == expected
        first = next(iter(source.rows))
        assert first.image.data == table["image"][0].as_py()["bytes"]
        assert first.read_image().size in ((256, 256), (112, 112))
        assert source.skipped == []


# WebDataset tars


def shards(root, count=3):
    for shard in range(count):
        members = []
        for name in "abc":
            members += [(f"{name}.png", png(name)), (f"{name}.txt", f"{name} {shard}\n".encode())]
        write_tar(root / f"s-{shard:03d}.tar", members)
    return [
        (f"s-{shard:03d}.tar/{name}.png", [f"{name} {shard}"], None)
        for shard in range(count)
        for name in "abc"
    ]


def test_brace_expansion_like_a_shell():
    for pattern in ("a", "s-{000..012}.tar", "{a,b}/x-{8..11}.tar", "x{1,2}{3,4}", "{7..7}"):
        shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True)
        assert expand(pattern) == shell.stdout.split()
    with pytest.raises(DataError, match="more than 1000000 files"):
        expand("{0..9999999999999}")
    with pytest.raises(DataError, match="more than 1000000 files"):
        expand("{0..9999}{0..9999}")


def test_tars_stream(tmp_path):
    expected = shards(tmp_path)
    for spec in ("s-{000..002}.tar", "s-*.tar"):
        source = open_source(tmp_path / spec)
        assert (source.kind, source.streaming) == ("tars", True)
        assert told(source) == expected
        assert told(source) == expected
        assert colours(source) == [COLOURS[name] for name in "abc"] * 3
        assert source.skipped == []
    held = open_source(tmp_path / "s-*.tar", streaming=False)
    assert len(held.rows) == 9
    assert told(held) == expected
    assert told(open_source(tmp_path / "s-001.tar")) == expected[3:6]


def test_tars_can_be_dealt_out(tmp_path):
    expected = shards(tmp_path)
    rows = open_source(tmp_path / "s-*.tar").rows
    assert len(rows.shards) == 3
    dealt = [row.key for shard in rows.shards for row, _ in rows.rows(shard)]
    assert dealt == [key for key, _, _ in expected]


def test_a_file_named_like_a_member_is_not_taken_for_it(tmp_path, monkeypatch):
    shards(tmp_path, 1)
    put(tmp_path / "a.png", png("c"))
    monkeypatch.chdir(tmp_path)
    assert colours(open_source("s-000.tar"))[0] == COLOURS["a"]


def test_what_a_tar_may_hold(tmp_path):
    members = [
        ("d/1.png", png("a")),
        ("d/1.json", json.dumps({"caption": "from json", "label": 4}).encode()),
        ("d/1.mask.png", b"not the image"),
        ("2.PNG", png("b")),
        ("2.cls", b"17\n"),
        ("2.txt", b"one\n\ncaf\xe9\ntwo"),
        ("2.json", b"{broken"),
        ("3.txt", b"alone"),
        ("4.npy", b"ignored"),
        ("2.png", png("c")),
        ("5.jpg", b""),
        ("2.PNG", png("c")),
    ]
    write_tar(tmp_path / "t.tar", members)
    source = open_source(tmp_path / "t.tar")
    assert told(source) == [
        ("t.tar/d/1.png", ["from json"], "4"),
        ("t.tar/2.png", ["one", "two"], "17"),
        ("t.tar/5.jpg", [], None),
    ]
    reasons = [(item.key, item.reason.split(":")[0]) for item in source.skipped]
    assert reasons == [
        ("t.tar/2.png", "the JSON beside it is damaged and left out"),
        ("t.tar/2.png", "a caption of it is not UTF-8 and is left out"),
        ("t.tar/3", "has no image right beside it in the tar; sort its members by name"),
        ("t.tar/2.png", "repeats the name of an earlier image in the tar (at byte 9216)"),
        ("t.tar/2.png", "repeats the name of an earlier image in the tar (at byte 10752)"),
    ]
    assert source.notes == [
        f"{tmp_path / 't.tar'}: members that were not used: 1 .mask.png, 1 .npy"
    ]
    known = list(source.skipped)
    assert len(told(source)) == 3
    assert source.skipped == known


def test_fields_of_the_json_can_be_named(tmp_path):
    fields = {"caption": "no", "title2": ["yes", "too"], "kind": "fox"}
    members = [("1.png", png("a")), ("1.txt", b"no"), ("1.json", json.dumps(fields).encode())]
    write_tar(tmp_path / "t.tar", members)
    source = open_source(tmp_path / "t.tar", caption="title2", label="kind")
    assert told(source) == [("t.tar/1.png", ["yes", "too"], "fox")]


def test_a_member_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.data.formats.webdataset.IMAGE_LIMIT", 1000)
    write_tar(tmp_path / "t.tar", [("1.png", bytes(1001)), ("2.png", png("a"))])
    source = open_source(tmp_path / "t.tar")
    assert [key for key, _, _ in told(source)] == ["t.tar/2.png"]
    assert source.skipped[0] == Skipped("t.tar/1.png", "has 1001 bytes, over 1000")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_truncated_tar_wherever_it_is_cut(tmp_path, streaming):
    expected = shards(tmp_path)
    whole = (tmp_path / "s-001.tar").read_bytes()
    for cut in range(0, 6200, 256):
        put(tmp_path / "s-001.tar", whole[:cut])
        source = open_source(tmp_path / "s-{000..002}.tar", streaming=streaming)
        found = told(source)
        middle = found[3:-3]
        assert found[:3] == expected[:3]
        assert found[-3:] == expected[-3:]
        whole_items = [item for item in middle if item in expected[3:6]]
        # Cut between an image and its caption, the last item may have lost the caption.
        assert middle in (
            whole_items,
            [*whole_items, (expected[3 + len(whole_items)][0], [], None)],
        )
        assert [item.key for item in source.skipped] == ["s-001.tar"]
        assert "truncated" in source.skipped[0].reason


def test_a_missing_shard_is_told(tmp_path):
    expected = shards(tmp_path)
    (tmp_path / "s-001.tar").unlink()
    source = open_source(tmp_path / "s-{000..002}.tar")
    assert told(source) == expected[:3] + expected[6:]
    assert source.skipped[0].key == "s-001.tar"
    assert source.skipped[0].reason.startswith("does not exist")


def test_names_in_tars_that_are_not_utf8(tmp_path):
    write_tar(tmp_path / "t.tar", [(os.fsdecode(b"caf\xe9.png"), png("a")), ("b.png", png("b"))])
    source = open_source(tmp_path / "t.tar")
    assert [key for key, _, _ in told(source)] == ["t.tar/b.png"]
    assert source.skipped == [Skipped("t.tar/caf\\xe9.png", "its name is not UTF-8; rename it")]


# Datasets saved to disk and on the hub


def dataset():
    from datasets import ClassLabel, Dataset, Features, Image, Value

    kinds = Features(
        {"img": Image(), "label": ClassLabel(names=["cat", "dog"]), "text": Value("string")}
    )
    parts = [{"bytes": png(name), "path": None} for name in "abc"]
    columns = {"img": parts, "label": [1, 0, -1], "text": ["x", "", "z"]}
    return Dataset.from_dict(columns, features=kinds)


SAVED = [("0", ["x"], "dog"), ("1", [], "cat"), ("2", ["z"], None)]


@pytest.mark.parametrize("streaming", [None, True])
def test_a_saved_dataset(tmp_path, streaming):
    dataset().save_to_disk(tmp_path / "d")
    source = open_source(tmp_path / "d", streaming=streaming)
    assert (source.kind, source.streaming) == ("saved", bool(streaming))
    assert told(source) == SAVED
    assert colours(source) == [COLOURS[name] for name in "abc"]
    assert source.fingerprint == open_source(tmp_path / "d").fingerprint


def test_a_saved_dataset_stays_on_disk(tmp_path):
    from datasets import Dataset

    big = [{"bytes": os.urandom(100_000), "path": None} for _ in range(100)]
    Dataset.from_dict({"image": big}).save_to_disk(tmp_path / "d")
    del big
    before = pa.total_allocated_bytes()
    source = open_source(tmp_path / "d")
    assert len(source.rows) == 100
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_saved_splits(tmp_path):
    from datasets import DatasetDict

    both = DatasetDict({"train": dataset(), "dev": dataset().select([2])})
    both.save_to_disk(tmp_path / "d")
    assert f"holds the splits train, dev; name one, as {tmp_path / 'd'}:train" in refusal(
        tmp_path / "d"
    )
    assert "no split 'test', it has: train, dev" in refusal(f"{tmp_path / 'd'}:test")
    assert told(open_source(f"{tmp_path / 'd'}:dev")) == [("0", ["z"], None)]
    DatasetDict({"train": dataset()}).save_to_disk(tmp_path / "one")
    assert told(open_source(tmp_path / "one")) == SAVED
    dataset().save_to_disk(tmp_path / "none")
    assert "holds no splits" in refusal(f"{tmp_path / 'none'}:train")


def test_a_damaged_saved_dataset(tmp_path):
    dataset().save_to_disk(tmp_path / "d")
    put(tmp_path / "d" / "state.json", "{")
    assert "is not an intact saved dataset" in refusal(tmp_path / "d")


@pytest.mark.parametrize(
    ("spec", "name", "config", "split"),
    [
        ("hf:org/name", "org/name", None, "train"),
        ("hf:org/name:test[:5]", "org/name", None, "test[:5]"),
        ("hf:org/name/en:dev", "org/name", "en", "dev"),
        ("hf:mnist", "mnist", None, "train"),
    ],
)
@pytest.mark.parametrize("streaming", [None, True])
def test_the_hub(monkeypatch, spec, name, config, split, streaming):
    asked = []

    def load(*args, **options):
        asked.append((*args, options))
        return dataset().to_iterable_dataset() if options["streaming"] else dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    source = open_source(spec, streaming=streaming)
    assert asked == [(name, config, {"split": split, "streaming": bool(streaming)})]
    assert (source.kind, source.spec, source.root) == ("hub", spec, None)
    prefix = "00000-0000000" if streaming else ""
    assert told(source) == [(prefix + key, *rest) for key, *rest in SAVED]
    assert colours(source) == [COLOURS[name] for name in "abc"]


def test_the_hub_out_of_reach(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr("datasets.load_dataset", load)
    found = refusal("hf:org/name:dev")
    assert found.startswith("hf:org/name:dev cannot be loaded (Couldn't reach 'org/name'")
    assert "\n" not in found
    assert found.endswith("without one only a dataset in the local cache can be opened")


def test_importing_is_light():
    heavy = "{'datasets', 'pyarrow', 'torch', 'pandas'}"
    code = f"import sys, clipkit.data.open_source; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_several_images_and_folders_are_one_source(tmp_path):
    for name in ("a/one.png", "b/two.png", "b/deep/three.png"):
        put(tmp_path / name, png("a"))
    source = open_source([tmp_path / "a" / "one.png", tmp_path / "b"])
    assert source.rows.keys == ["a/one.png", "b/deep/three.png", "b/two.png"]
    assert (source.kind, source.root) == ("classes", tmp_path)
    assert source.rows[0].read_image().getpixel((0, 0)) == COLOURS["a"]


def test_a_pattern_of_images_is_expanded(tmp_path):
    for name in ("b.png", "a.png", "c.jpg"):
        put(tmp_path / name, png("a"))
    pattern = str(tmp_path / "*.png")
    for data in (pattern, [pattern], sorted(tmp_path.glob("*.png"))):
        source = open_source(data)
        assert source.rows.keys == ["a.png", "b.png"]
        assert source.spec == str(tmp_path)
    with pytest.raises(DataError, match="no file matches the pattern"):
        open_source(tmp_path / "*.webp")
    with pytest.raises(DataError, match="no file matches the pattern"):
        open_source([tmp_path / "a.png", tmp_path / "*.webp"])


class MapStyle:
    """Like a torch Dataset: it has a length and items, and never raises IndexError."""

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return PAIRS[number % 2]


PAIRS = [
    (Image.new("RGB", (4, 4), COLOURS["a"]), "red"),
    (np.full((4, 4, 3), COLOURS["b"], np.uint8), ["green", "a green square"]),
]


@pytest.mark.parametrize("data", [PAIRS, MapStyle(), iter(PAIRS)], ids=["list", "map", "iterator"])
def test_pairs_of_images_and_captions(data):
    source = open_source(data)
    assert [row.captions for row in source.rows] == [["red"], ["green", "a green square"]]
    pixels = [row.read_image().getpixel((0, 0)) for row in source.rows]
    assert pixels == [COLOURS["a"], COLOURS["b"]]
    assert source.fingerprint == open_source(PAIRS).fingerprint


def test_pairs_with_a_path(tmp_path):
    put(tmp_path / "a.png", png("a"))
    (row,) = open_source([(tmp_path / "a.png", "red")]).rows
    assert row.read_image().getpixel((0, 0)) == COLOURS["a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data is a int, expected a path"),
        ({"a": 1}, "data is a dict, expected a path"),
        (["a.png", 3], "a list of paths holds a int"),
        ([3], "item 0 is a int, expected an .image, caption. pair"),
        ([(3, "red")], "image 0 is a int, expected a PIL image"),
        ([(PAIRS[0][0], 3)], "caption 0 is a int, expected a string"),
        ([(np.zeros((4, 4, 3)), "red")], "image 0 is an array of float64"),
    ],
)
def test_data_of_a_wrong_type(data, message):
    with pytest.raises(TypeError, match=message):
        open_source(data)


def test_a_generator_is_read_once(tmp_path):
    pairs = iter(PAIRS)
    open_source(pairs)
    with pytest.raises(DataError, match="a generator can be read only once"):
        open_source(pairs)


def test_a_list_of_columns_is_refused(tmp_path):
    with pytest.raises(TypeError, match="caption is a list, expected the name of one column"):
        open_source(tmp_path, caption=["title"])


def test_a_note_is_kept_and_printed_once(capsys):
    notes = rows_module.Notes()
    notes.append("columns b and c are both captions")
    notes.append("columns b and c are both captions")
    assert notes == ["columns b and c are both captions"]
    assert capsys.readouterr().err == "note: columns b and c are both captions\n"
