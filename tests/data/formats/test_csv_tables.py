"""Text tables as people have them: every row is read, or named."""

import base64
import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipkit.data.formats import tables
from clipkit.data.images import Skipped
from clipkit.data.open_source import open_source
from clipkit.errors import DataError
from clipkit.tasks.check_data import check_data
from clipkit.tasks.config import init_config
from clipkit.tasks.index import build_index
from clipkit.tasks.sync import sync_index
from clipkit.training.data import open_training_data
from tests.helpers.paths import SHARED
from tests.helpers.toys import ColourEncoder

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
CASES = SHARED.parent / "cases" / "tables"


def image_bytes(name, size=4, form="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (size, size), COLOURS[name]).save(stream, form)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for name in COLOURS:
        (tmp_path / "img" / f"{name}.png").write_bytes(image_bytes(name))
    return tmp_path


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(source):
    """Keys and captions, without those of the images that follow."""
    return [(row.key, row.captions) for row in source.rows]


def names(*captions):
    return [
        (f"img/{name}.png", [text] if isinstance(text, str) else text)
        for name, text in zip("abc", captions, strict=False)
    ]


ONE = names("one", "two", "three")
UNCLOSED = "quotes that are not closed are plain characters"

WRITTEN = {
    "quotes in TSV are plain": (
        "t.tsv",
        'image\tcaption\nimg/a.png\t"one\nimg/b.png\ttwo" dogs\nimg/c.png\t"three" x\n',
        names('"one', 'two" dogs', '"three" x'),
    ),
    "a quoted caption in TSV is one": (
        "t.tsv",
        'image\tcaption\nimg/a.png\t"one\ttab"\nimg/b.png\t"two ""big"""\nimg/c.png\tthree\n',
        names("one\ttab", 'two "big"', "three"),
    ),
    "a quoted caption in TSV may span lines": (
        "t.tsv",
        'image\tcaption\nimg/a.png\t"one\nmore"\nimg/b.png\ttwo\nimg/c.png\tthree\n',
        names("one\nmore", "two", "three"),
    ),
    "a quoted caption in CSV may span lines": (
        "t.csv",
        'image,caption\nimg/a.png,"one,\nfast, away"\nimg/b.png,two\nimg/c.png,"three\n\nx"\n',
        names("one,\nfast, away", "two", "three\n\nx"),
    ),
    "the caption may come first": (
        "t.csv",
        'caption,image\n"one,\nfast, away",img/a.png\ntwo,img/b.png\n"three",img/c.png\n',
        names("one,\nfast, away", "two", "three"),
    ),
    "a space before the quotes": (
        "t.csv",
        'image, caption\nimg/a.png, "one, 1"\nimg/b.png, two\nimg/c.png, "three ""3"""\n',
        names("one, 1", "two", 'three "3"'),
    ),
    "quotes escaped with backslashes": (
        "t.csv",
        'image,caption\nimg/a.png,"a \\"one\\", yes"\nimg/b.png,"two \\\\ 2"\nimg/c.png,three\n',
        names('a "one", yes', "two \\ 2", "three"),
    ),
    "quotes that quote words in CSV": (
        "t.csv",
        'image,caption\nimg/a.png,"one" he said\nimg/b.png,"two" she said\nimg/c.png,three\n',
        names('"one" he said', '"two" she said', "three"),
    ),
    "separators at the end": (
        "t.csv",
        "image,caption\nimg/a.png,one,\nimg/b.png,two,,\nimg/c.png,three\n",
        ONE,
    ),
    "comments": (
        "t.csv",
        "# made by a tool\n#\nimage,caption\nimg/a.png,one\nimg/b.png,two\nimg/c.png,three\n",
        ONE,
    ),
    "a header behind a number sign": (
        "t.tsv",
        "#image\tcaption\nimg/a.png\tone\nimg/b.png\ttwo\nimg/c.png\tthree\n",
        ONE,
    ),
    "the separator line of Excel": (
        "t.csv",
        "sep=;\r\nimage;caption\r\nimg/a.png;one\r\nimg/b.png;two\r\nimg/c.png;three\r\n",
        ONE,
    ),
    "commas in a table of tabs": (
        "t.txt",
        "img/a.png\tone, 1, 2\nimg/b.png\ttwo, 1\nimg/c.png\tthree\n",
        names("one, 1, 2", "two, 1", "three"),
    ),
    "the results.csv of Flickr30k": (
        "results.csv",
        "image_name| comment_number| comment\nimg/a.png| 0| one , 1 .\nimg/a.png| 1| more .\n"
        'img/b.png| 0| " two\nimg/c.png| 0| three\n',
        names(["one , 1 .", "more ."], '" two', "three"),
    ),
    "the token.txt of Flickr8k": (
        "Flickr8k.token.txt",
        "img/a.png#0\tone\nimg/a.png#1\tmore\nimg/b.png#0\ttwo\nimg/c.png#0\tthree\n",
        names(["one", "more"], "two", "three"),
    ),
    "no header": (
        "t.csv",
        "img/a.png,one\nimg/b.png,two\nimg/c.png,three\n",
        ONE,
    ),
    "no header and further columns": (
        "t.tsv",
        "7\timg/a.png\tone of the dogs\tdog\n8\timg/b.png\ttwo of the cats\tcat\n",
        names("one of the dogs", "two of the cats"),
    ),
    "a list of paths": ("t.txt", "img/a.png\nimg/b.png\n", names([], [])),
    "repeated caption columns": (
        "t.csv",
        "image,caption,caption\nimg/a.png,one,1\nimg/b.png,two,2\nimg/c.png,three,3\n",
        names(["one", "1"], ["two", "2"], ["three", "3"]),
    ),
    "caption columns that pandas numbered": (
        "t.csv",
        "image,caption,caption.1,caption.2\nimg/a.png,one,1,x\nimg/b.png,two,2,y\n",
        names(["one", "1", "x"], ["two", "2", "y"]),
    ),
    "numbered caption columns beside one without": (
        "t.csv",
        "image,caption,caption2,Caption_3\nimg/a.png,one,1,x\nimg/b.png,two,2,y\n",
        names(["one", "1", "x"], ["two", "2", "y"]),
    ),
    "lines that end in CR": ("t.csv", "image,caption\rimg/a.png,one\rimg/b.png,two\r", ONE[:2]),
    "a long caption": (
        "t.csv",
        f'image,caption\nimg/a.png,"{"one " * 50_000}"\nimg/b.png,two\n',
        names(("one " * 50_000).strip(), "two"),
    ),
}
NOTES = {
    "no header": "t.csv has no header; its columns are read as image, caption",
    "commas in a table of tabs": "t.txt has no header; its columns are read as image, caption",
    "the token.txt of Flickr8k": (
        "Flickr8k.token.txt has no header; its columns are read as image, caption"
    ),
    "no header and further columns": (
        "t.tsv has no header; its columns are read as column_1, image, caption, column_4"
    ),
    "a list of paths": "t.txt has no header; its columns are read as image",
    "repeated caption columns": "t.csv: the captions are in the columns caption, caption.1",
    "caption columns that pandas numbered": (
        "t.csv: the captions are in the columns caption, caption.1, caption.2"
    ),
    "numbered caption columns beside one without": (
        "t.csv: the captions are in the columns caption, caption2, Caption_3"
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", WRITTEN)
def test_tables_as_people_write_them(folder, case, streaming):
    name, text, expected = WRITTEN[case]
    source = open_source(put(folder / name, text), streaming=streaming)
    assert pairs(source) == expected
    assert source.skipped == []
    assert source.notes == ([NOTES[case]] if case in NOTES else [])
    for row in source.rows:
        assert row.read_image().getpixel((0, 0)) == COLOURS[row.key[4]]


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252"])
def test_tables_are_read_from_every_position_in_every_encoding(folder, monkeypatch, case, encoding):
    name, text, expected = WRITTEN[case]
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    put(folder / name, (mark + text.replace("one", "öne")).encode(encoding))
    monkeypatch.setattr(tables, "_CHUNK", 1)
    source = open_source(folder / name, streaming=True)
    assert pairs(source) == [
        (key, [caption.replace("one", "öne") for caption in captions]) for key, captions in expected
    ]
    [shard] = source.rows.shards
    batches = list(source.rows.read(shard, None))
    for number, (_, position) in enumerate(batches):
        rest = [batch.to_pylist() for batch, _ in source.rows.read(shard, position)]
        assert rest == [batch.to_pylist() for batch, _ in batches[number + 1 :]]


def test_an_unclosed_quote_in_csv_swallows_no_rows(folder):
    text = 'image,caption\nimg/a.png,"one, 1\nimg/b.png,"two"\nimg/c.png,"three, 3\n'
    source = open_source(put(folder / "t.csv", text))
    assert pairs(source) == names('"one, 1', "two", "three, 3")
    assert source.notes == [
        f"t.csv: {UNCLOSED}",
        "t.csv: separators in 'caption' that are not quoted are read as part of it",
    ]


def test_a_quote_that_is_never_closed_swallows_no_rows(folder):
    rows = "".join(f"img/{name}.png,x{number}\n" for number in range(99) for name in "bc")
    put(folder / "t.csv", f'image,caption\nimg/a.png,"one\n{rows}')
    source = open_source(folder / "t.csv")
    texts = [f"x{number}" for number in range(99)]
    assert pairs(source) == names('"one', texts, texts)
    assert source.notes == [f"t.csv: {UNCLOSED}"]


def test_commas_without_quotes_belong_to_the_last_column(folder):
    text = "image,caption\nimg/a.png,one, 1,2\nimg/b.png,two\nimg/c.png,three , 3\n"
    source = open_source(put(folder / "t.csv", text))
    assert pairs(source) == names("one, 1,2", "two", "three , 3")
    assert source.notes == [
        "t.csv: separators in 'caption' that are not quoted are read as part of it"
    ]
    # Which of the columns has the comma cannot be known here.
    text = "image,caption,label\nimg/a.png,one,1,dog\nimg/b.png,two,dog\n# x\n"
    source = open_source(put(folder / "t.csv", text))
    assert pairs(source) == [("img/b.png", ["two"])]
    assert source.skipped == [
        Skipped("t.csv:2", "has 4 fields, its header has 3"),
        Skipped("t.csv:4", "is a comment"),
    ]


def test_other_caption_columns_are_named(folder):
    text = "image,title,caption,width\nimg/a.png,one,A,3\n"
    source = open_source(put(folder / "t.csv", text))
    assert pairs(source) == names("one")
    assert source.notes == [
        "t.csv: the captions are read from title, not from caption; choose another column with "
        "--caption-column (caption=)"
    ]
    chosen = open_source(folder / "t.csv", caption="caption")
    assert (pairs(chosen), chosen.notes) == (names("A"), [])


@pytest.mark.parametrize(
    ("content", "captions", "note"),
    [
        ("café, “x”".encode("cp1252"), "café, “x”", "is not UTF-8 and is read as cp1252 (Western)"),
        ("狗在草地上".encode("gb18030"), None, "is neither UTF-8 nor cp1252"),
        ("собака".encode("cp1251"), None, "is neither UTF-8 nor cp1252"),
    ],
)
def test_encodings(folder, content, captions, note):
    put(folder / "t.tsv", b"image\tcaption\nimg/a.png\t" + content + b"\n")
    source = open_source(folder / "t.tsv")
    assert pairs(source) == names([] if captions is None else captions)
    assert source.notes[0].startswith(f"t.tsv {note}")
    for encoding in ("gb18030", "cp1251"):
        chosen = open_source(folder / "t.tsv", encoding=encoding)
        text = content.decode(encoding, "replace")
        assert pairs(chosen) == names([] if "\ufffd" in text else text)
        assert chosen.notes == []


def test_a_damaged_line_does_not_change_the_encoding(folder):
    text = "image,caption\nimg/a.png,ä\nimg/b.png,ö\n".encode() + b"img/c.png,caf\xe9\n"
    source = open_source(put(folder / "t.csv", text))
    assert pairs(source) == names("ä", "ö", [])
    assert source.skipped == [
        Skipped("img/c.png", "a caption of it is not UTF-8 and is left out"),
    ]
    with pytest.raises(DataError, match="'rot13' is not an encoding that Python knows"):
        open_source(folder / "t.csv", encoding="rot13")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:image/png;x=1;base64,"])
def test_images_in_base64(folder, monkeypatch, prefix, streaming):
    contents = [image_bytes(name, size=300, form="BMP") for name in "ab"] + [image_bytes("c")]
    lines = [f"{prefix}{base64.b64encode(data).decode()}\tone" for data in contents]
    assert len(lines[0]) > 131_072
    lines += ["img/a.png\ttwo", "x" * 5000 + "\t"]
    put(folder / "t.tsv", "\n".join(["image\tcaption", *lines]))
    monkeypatch.setattr(tables, "_CHUNK_BYTES", 400_000)
    source = open_source(folder / "t.tsv", streaming=streaming)
    assert pairs(source) == [
        ("0", ["one"]),
        ("1", ["one"]),
        ("2", ["one"]),
        ("img/a.png", ["two"]),
    ]
    assert [row.image.data for row in source.rows] == [*contents, None]
    assert [row.read_image().getpixel((0, 0)) for row in source.rows] == [
        COLOURS[name] for name in "abca"
    ]
    assert source.skipped == [Skipped("row 4", "has neither a path nor an image in base64")]
    # Batches end where they have held enough bytes.
    assert [len(batch) for batch in tables_batches(folder / "t.tsv")] == [2, 2]


def tables_batches(path):
    return open_source(path, streaming=True).rows.batches()


def test_a_table_of_ofa_has_neither_header_nor_paths(folder):
    code = base64.b64encode(image_bytes("b")).decode()
    lines = [f"{n}\t12{n}\ta dog runs {n}\tdog&&grass\t{code}" for n in range(3)]
    source = open_source(put(folder / "t.tsv", "\n".join(lines)))
    assert pairs(source) == [(str(n), [f"a dog runs {n}"]) for n in range(3)]
    assert source.rows[2].read_image().getpixel((0, 0)) == COLOURS["b"]


@pytest.mark.parametrize(
    ("name", "text", "before", "options"),
    [
        ("t.csv", "url,caption\n{},one\n", "", "csv --url_col url --caption_col caption"),
        ("t.csv", "image,caption\n{},one\n", "", "csv --url_col image --caption_col caption"),
        ("t.tsv", "URL\tTEXT\n{}\tone\n", "", "tsv --url_col URL --caption_col TEXT"),
        (
            "t.tsv",
            "one dog\t{}\n",
            "sed -i '1i caption\\turl' {} && ",
            "tsv --url_col url --caption_col caption",
        ),
        ("t.txt", "{}\n", "", "txt"),
    ],
)
def test_urls_are_answered_with_the_command_that_downloads_them(
    folder, name, text, before, options
):
    put(folder / name, text.replace("{}", "https://example.org/a.jpg"))
    with pytest.raises(DataError) as caught:
        open_source(folder / name)
    table, images, message = folder / name, folder / "t-images", str(caught.value)
    command = f"img2dataset --url_list {table} --input_format {options}"
    assert f" `{before.format(table)}{command} --output_format webdataset " in message
    assert message.endswith(
        f" --output_folder {images} --resize_mode keep_ratio` and name '{images}/*.tar'"
    )


def test_columns_in_other_languages_are_named(folder):
    put(folder / "t.csv", "Bild;Beschreibung\nimg/a.png;eins\n")
    with pytest.raises(DataError) as caught:
        open_source(folder / "t.csv")
    assert str(caught.value) == (
        f"{folder / 't.csv'} has no image column among: Bild, Beschreibung; choose one with "
        "--image-column (image=)"
    )
    source = open_source(folder / "t.csv", image="Bild", caption="Beschreibung")
    assert pairs(source) == names("eins")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_the_csv_module_writes_is_read_again(folder, separator, quoting):
    draw = np.random.default_rng(7)
    parts = [
        "a dog",
        '"',
        '""',
        ",",
        ";",
        "\n",
        "\r\n",
        " ",
        "#",
        '5" pipe',
        "fast, away",
        "ä",
        "'",
    ]
    for trial in range(40):
        texts = ["".join(draw.choice(parts, 4)).strip() or "x" for _ in range(20)]
        rows = [[f"img/{number}.png", text, "cat"] for number, text in enumerate(texts)]
        order = [[0, 1, 2], [1, 0, 2], [0, 1]][trial % 3]
        with (folder / "t.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter=separator, quoting=quoting)
            writer.writerow([["image", "caption", "label"][number] for number in order])
            writer.writerows([row[number] for number in order] for row in rows)
        source = open_source(folder / "t.csv")
        assert pairs(source) == [(key, [text]) for key, text, _ in rows]


SHARED_COUNTS = {
    "q1_tsv.tsv": (24, 24),
    "q_tsv.tsv": (24, 24),
    "q2.csv": (24, 24),
    "commas.csv": (24, 24),
    "half.csv": (24, 24),
    "trail.csv": (24, 24),
    "comment.csv": (24, 24),
    "spq.csv": (24, 24),
    "bs.csv": (24, 24),
    "bs2.csv": (24, 24),
    "dup.csv": (24, 48),
    "dot1.csv": (24, 72),
    "cap2.csv": (24, 72),
    "cap12.csv": (24, 48),
    "results.csv": (24, 120),
    "Flickr8k.token.txt": (24, 120),
    "nohead.tsv": (24, 24),
    "sep.csv": (24, 24),
    "u16.csv": (24, 24),
    "latin.csv": (24, 24),
    "names.csv": (24, 24),
    "noext.csv": (24, 24),
    "win.csv": (24, 24),
    "winabs.csv": (24, 24),
    "b64.tsv": (24, 24),
    "dataurl.tsv": (24, 24),
    "cr.csv": (24, 24),
    "idx.csv": (24, 24),
    "one.csv": (24, 0),
}


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize("name", SHARED_COUNTS)
def test_shared_cases(name):
    source = open_source(CASES / name)
    captions = [caption for row in source.rows for caption in row.captions]
    for row in source.rows:
        row.read_image()
    assert (len(source.rows), len(captions)) == SHARED_COUNTS[name]
    assert len(set(captions)) == len(captions)
    assert source.skipped == []


def test_the_encoding_can_be_given_wherever_columns_can(folder):
    text = "image,caption\nimg/a.png,собака\nimg/b.png,кошка\n"
    path = put(folder / "t.csv", text.encode("cp1251"))
    report = check_data(path, encoding="cp1251")
    assert (report.captions, report.notes) == (2, [])
    config = init_config(path, encoding="cp1251", image_root=folder).config
    assert (config.data.encoding, config.data.image_root) == ("cp1251", str(folder))
    training, _ = open_training_data(replace(config.data, val=str(path)), 0)
    assert pairs(training) == names("собака", "кошка")
    source = open_source(path, encoding="cp1251", metadata=True)
    index = build_index(source, folder / "index", ColourEncoder())
    assert index.manifest.source["columns"] == {"encoding": "cp1251"}
    changes = sync_index(folder / "index", encoder=ColourEncoder())
    assert (changes.unchanged, changes.changed) == (2, 0)
    with pytest.raises(TypeError, match="encoding is a int, expected a name such as cp1252"):
        open_source(path, encoding=1251)


def test_folders_say_that_they_have_no_use_for_an_encoding(folder):
    source = open_source(folder / "img", encoding="cp1251")
    assert source.notes == [f"{folder / 'img'} is not a CSV table, so the encoding is not used"]
    put(folder / "img" / "metadata.csv", "file_name,text\na.png,собака\n".encode("cp1251"))
    source = open_source(folder / "img", encoding="cp1251", image_root=folder / "img")
    assert pairs(source) == [("a.png", ["собака"])]
    assert not any("the encoding" in note or "the image root" in note for note in source.notes)
