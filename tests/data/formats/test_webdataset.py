"""Tars as people have them: how items are found, read from anywhere, and looked up by key."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile

import pytest

from clipkit.data.formats.webdataset import find_members
from clipkit.data.images import Skipped
from clipkit.data.open_source import open_source
from clipkit.data.random_access import open_image_reader
from clipkit.errors import DataError
from clipkit.tasks.embed import embed
from tests.helpers.paths import SHARED
from tests.helpers.tables import EXPECTED, ROWS, metadata
from tests.helpers.toys import ColourEncoder, png, square, write_tar


def members(rows):
    for row in rows:
        name = row["filepath"].removesuffix(".png")
        fields = {key: value for key, value in row.items() if key != "filepath"}
        yield f"{name}.json", json.dumps(fields, default=str).encode()
        yield f"{name}.png", png(square(name))


@pytest.mark.parametrize("streaming", [False, True])
def test_fields_come_to_the_store_by_value(tmp_path, streaming):
    write_tar(tmp_path / "s-0.tar", members(ROWS[:2]))
    write_tar(tmp_path / "s-1.tar", members(ROWS[2:]))
    source = open_source(tmp_path / "s-{0..1}.tar", streaming=streaming, metadata=True)
    store = embed(source, tmp_path / "store", ColourEncoder())
    found = metadata(store.records())
    assert {key.partition("/")[2]: row for key, row in found.items()} == EXPECTED
    assert [r["captions"] for r in store.records().to_pylist()] == [[r["caption"]] for r in ROWS]
    plain = open_source(tmp_path / "s-{0..1}.tar", streaming=streaming)
    assert plain.fingerprint == source.fingerprint
    assert all(row.metadata is None for row in plain.rows)


def test_what_is_damaged_or_nested_is_left_out(tmp_path, capsys):
    picture = png(square("red"))
    write_tar(
        tmp_path / "s.tar",
        [
            ("a.png", picture),
            ("a.json", b'{"caption": "one", "width": 3, "exif": {"ISO": 100}, "title": "t"}'),
            ("b.png", picture),
            ("b.json", b'{"width": '),
            ("c.png", picture),
            ("c.txt", b"three"),
            ("d.json", b'{"width": 2.5}'),
            ("d.png", picture),
        ],
    )
    source = open_source(tmp_path / "s.tar", metadata=True)
    rows = {row.key: row for row in source.rows}
    widths = {key: row.metadata["width"] for key, row in rows.items()}
    assert widths == {
        "s.tar/a.png": 3.0,
        "s.tar/b.png": None,
        "s.tar/c.png": None,
        "s.tar/d.png": 2.5,
    }
    # The title is the caption, as it is without metadata.
    assert rows["s.tar/a.png"].captions == ["t"]
    assert set(rows["s.tar/a.png"].metadata) == {"width", "caption"}
    assert ["JSON beside it is damaged" in s.reason for s in source.skipped] == [True]
    assert "exif" in capsys.readouterr().err


def test_a_shard_that_is_cut_off_gives_what_it_has(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, members(ROWS))
    path.write_bytes(path.read_bytes()[: 3 * path.stat().st_size // 10])
    source = open_source(path, metadata=True)
    rows = list(source.rows)
    assert 0 < len(rows) < len(ROWS)
    for row in rows:
        assert row.metadata == {
            name: EXPECTED[row.key.removeprefix("s.tar/")][name] for name in row.metadata
        }
    assert source.skipped


NUMBERS = range(40)  # more than are held of names that agree up to the first dot


def image(number):
    return b"image %d" % number


def text(number):
    return f"a caption, {number}".encode()


def fields(number):
    return json.dumps({"caption": text(number).decode(), "width": 3}).encode()


def annotated(number):
    return json.dumps({"annotations": [{"caption": text(number).decode(), "id": 1}]}).encode()


def null(number):
    return json.dumps({"caption": None, "text": text(number).decode()}).encode()


def items(*members):
    """Members of each item: names with ``{n}`` for its number, and contents."""
    return [
        (name.format(n=f"{number:04}"), content(number))
        for number in NUMBERS
        for name, content in members
    ]


KINDS = {
    "plain": ("{n}.jpg", items(("{n}.jpg", image), ("{n}.txt", text))),
    "upper case": ("{n}.jpg", items(("{n}.JPG", image), ("{n}.TXT", text))),
    "dots": ("photo.{n}.jpg", items(("photo.{n}.jpg", image), ("photo.{n}.txt", text))),
    "dots, text first": ("a.b.{n}.png", items(("a.b.{n}.txt", text), ("a.b.{n}.png", image))),
    "dots, named text": ("p.{n}.jpg", items(("p.{n}.jpg", image), ("p.{n}.caption.txt", text))),
    "words": ("{n}.image.jpg", items(("{n}.caption.txt", text), ("{n}.image.jpg", image))),
    "input": ("{n}.input.jpg", items(("{n}.input.jpg", image), ("{n}.txt", text))),
    "folders": ("v1.0/{n}.jpg", items(("v1.0/{n}.jpg", image), ("v1.0/{n}.txt", text))),
    "other image first": (
        "{n}.jpg",
        items(
            ("{n}.depth.png", text), ("{n}.jpg", image), ("{n}.seg.png", text), ("{n}.txt", text)
        ),
    ),
    "caption": ("{n}.jpg", items(("{n}.jpg", image), ("{n}.caption", text))),
    "double ending": ("{n}.jpg", items(("{n}.jpg", image), ("{n}.jpg.txt", text))),
    "JSON": ("{n}.jpg", items(("{n}.jpg", image), ("{n}.json", fields))),
    "JSON string": (
        "{n}.jpg",
        items(("{n}.jpg", image), ("{n}.json", lambda n: json.dumps(text(n).decode()).encode())),
    ),
    "nested JSON": ("{n}.jpg", items(("{n}.jpg", image), ("{n}.json", annotated))),
    "null in JSON": ("{n}.jpg", items(("{n}.jpg", image), ("{n}.json", null))),
    "empty text": (
        "{n}.jpg",
        items(("{n}.jpg", image), ("{n}.txt", lambda n: b" \n"), ("{n}.json", fields)),
    ),
    "UTF-16": (
        "{n}.jpg",
        items(("{n}.jpg", image), ("{n}.txt", lambda n: text(n).decode().encode("utf-16"))),
    ),
    "macOS": (
        "{n}.jpg",
        items(
            ("._{n}.jpg", text),
            ("{n}.jpg", image),
            ("__MACOSX/._{n}.txt", text),
            ("{n}.txt", text),
        ),
    ),
}
COMPRESSED = {"s.tar": bytes, "s.tgz": gzip.compress, "g.tar": gzip.compress}
COMPRESSED |= {"s.tar.bz2": bz2.compress, "s.tar.xz": lzma.compress}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["s.tar", "s.tar.gz"])
def test_items_are_found_read_from_anywhere_and_looked_up(tmp_path, kind, file):
    name, members = KINDS[kind]
    write_tar(tmp_path / "s.tar", members)
    if file.endswith(".gz"):
        (tmp_path / file).write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    source = open_source(tmp_path / file)
    (shard,) = source.rows.shards
    passed = list(source.rows.rows(shard))
    rows = [row for row, _ in passed]
    assert [(row.key, row.image.data, row.captions) for row in rows] == [
        (f"{file}/{name.format(n=f'{n:04}')}", image(n), [text(n).decode()]) for n in NUMBERS
    ]
    assert source.skipped == []
    for at in (0, 14, 15, 16, 17, 31, 38):
        assert [row for row, _ in source.rows.rows(shard, passed[at][1])] == rows[at + 1 :]
    pictures = open_image_reader(str(tmp_path / file))
    assert [pictures.read(row.key) for row in rows] == [image(n) for n in NUMBERS]
    assert len(find_members(tmp_path / file)) == len(rows)


@pytest.mark.parametrize("file", COMPRESSED)
def test_compression_is_recognised_by_content(tmp_path, file):
    write_tar(tmp_path / "plain", KINDS["plain"][1])
    whole = (tmp_path / "plain").read_bytes()
    (tmp_path / file).write_bytes(COMPRESSED[file](whole))
    source = open_source(tmp_path / file)
    assert [row.image.data for row in source.rows] == [image(n) for n in NUMBERS]
    assert source.skipped == []


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_compressed_tar_that_is_cut_off_gives_what_it_has(tmp_path, compress):
    noise = random.Random(0).randbytes
    members = [(f"{n:04}.jpg", noise(9000)) for n in NUMBERS]
    write_tar(tmp_path / "plain", members)
    whole = compress((tmp_path / "plain").read_bytes())
    (tmp_path / "s.tar").write_bytes(whole[: len(whole) // 2])
    source = open_source(tmp_path / "s.tar")
    found = [row.image.data for row in source.rows]
    assert 10 < len(found) < 20
    assert found == [content for _, content in members[: len(found)]]
    assert [item.key for item in source.skipped] == ["s.tar"]
    assert "is damaged or truncated" in source.skipped[0].reason


def test_several_captions_of_an_image(tmp_path):
    listed = json.dumps(["one", {"caption": "two"}]).encode()
    sentences = json.dumps({"captions": [{"text": "one"}, {"text": "two"}]}).encode()
    members = [("a.jpg", image(0)), ("a.0.txt", b"one"), ("a.1.txt", b"two")]
    members += [("b.jpg", image(1)), ("b.json", listed)]
    members += [("c.jpg", image(2)), ("c.json", sentences)]
    members += [("d.left.jpg", image(3)), ("d.right.jpg", image(4)), ("d.txt", b"one\ntwo")]
    write_tar(tmp_path / "s.tar", members)
    source = open_source(tmp_path / "s.tar")
    assert [(row.key, row.captions) for row in source.rows] == [
        (f"s.tar/{name}.jpg", ["one", "two"]) for name in ("a", "b", "c", "d.left", "d.right")
    ]


def test_a_field_named_as_caption_is_read_from_nested_json(tmp_path):
    value = [{"caption": "no", "long": "one"}, {"long": "two"}]
    write_tar(tmp_path / "s.tar", [("a.jpg", image(0)), ("a.json", json.dumps(value).encode())])
    rows = open_source(tmp_path / "s.tar", caption="long").rows
    assert [row.captions for row in rows] == [["one", "two"]]


def test_repeated_keys_are_each_reported(tmp_path):
    same = [("same.jpg", "same.txt")] * 4
    members = [
        member
        for n, (name, caption) in enumerate(same)
        for member in ((name, image(n)), (caption, text(n)))
    ]
    write_tar(tmp_path / "s.tar", members)
    source = open_source(tmp_path / "s.tar")
    assert [row.image.data for row in source.rows] == [image(0)]
    reason = "repeats the name of an earlier image in the tar (at byte {})"
    assert source.skipped == [Skipped("s.tar/same.jpg", reason.format(2048 * n)) for n in (1, 2, 3)]
    assert open_image_reader(str(tmp_path / "s.tar")).read("s.tar/same.jpg") == image(0)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_links_are_followed_within_the_tar(tmp_path, compress):
    with tarfile.open(tmp_path / "plain", "w") as tar:
        for name, content in (("d/a.jpg", image(0)), ("d/a.txt", text(0))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind, target in (
            ("hard.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("d/soft.jpg", tarfile.SYMTYPE, "a.jpg"),
            ("twice.jpg", tarfile.SYMTYPE, "./d/../d/soft.jpg"),
            ("later.jpg", tarfile.SYMTYPE, "z.jpg"),
            ("loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
            ("out.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("up.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("z.jpg")
        info.size = len(image(1))
        tar.addfile(info, io.BytesIO(image(1)))
    (tmp_path / "s.tar").write_bytes(compress((tmp_path / "plain").read_bytes()))
    source = open_source(tmp_path / "s.tar")
    found = {row.key: row.image.data for row in source.rows}
    assert found == {
        "s.tar/d/a.jpg": image(0),
        "s.tar/hard.jpg": image(0),
        "s.tar/d/soft.jpg": image(0),
        "s.tar/twice.jpg": image(0),
        "s.tar/later.jpg": image(1),
        "s.tar/z.jpg": image(1),
    }
    assert source.skipped == [
        Skipped("s.tar/loop.jpg", "is a link to loop.jpg, which is not a file in the tar"),
        Skipped("s.tar/out.jpg", "is a link to /etc/passwd, which is not a file in the tar"),
        Skipped("s.tar/up.jpg", "is a link to ../../etc/passwd, which is not a file in the tar"),
        Skipped("s.tar/pipe.jpg", "is not a file in the tar"),
    ]
    pictures = open_image_reader(str(tmp_path / "s.tar"))
    assert {key: pictures.read(key) for key in found} == found


def test_members_that_are_not_used_are_counted(tmp_path, capsys):
    for shard in "ab":
        members = items(("{n}.jpg", image), ("{n}.cls", lambda n: b"3"), ("{n}.npy", text))
        write_tar(tmp_path / f"{shard}.tar", [*members, ("README", b"hi"), ("d.x.y.bin", b"")])
    source = open_source(tmp_path / "*.tar")
    assert source.notes == []
    assert {row.label for row in source.rows} == {"3"}
    assert source.notes == [
        "2 tars: members that were not used: 80 .npy, 2 no ending, 2 .bin",
        "2 tars: no captions were found; they are read from members such as 0000.txt, "
        "0000.caption and 0000.json beside 0000.jpg; members are named like 0000.jpg, 0000.cls, "
        "0000.npy",
    ]
    assert capsys.readouterr().err.count("note: ") == 2
    list(source.rows)
    assert len(source.notes) == 2


def test_tars_without_an_image_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", items(("{n}.npy", image), ("{n}.txt", text)))
    write_tar(tmp_path / "b.tar", [])
    (tmp_path / "c.tar").write_bytes(b"")
    for streaming in (None, False):
        with pytest.raises(
            DataError, match=r"a.tar: no image .* like 0000.npy, 0000.txt, 0001.npy"
        ):
            open_source(tmp_path / "a.tar", streaming=streaming)
        with pytest.raises(DataError, match="b.tar: no image .* there are no members"):
            open_source(tmp_path / "b.tar", streaming=streaming)
        with pytest.raises(DataError, match="c.tar: no image .* c.tar is damaged or truncated"):
            open_source(tmp_path / "c.tar", streaming=streaming)
        with pytest.raises(DataError, match="3 tars: no image"):
            open_source(tmp_path / "*.tar", streaming=streaming)


def test_a_damaged_header_ends_the_reading_with_a_word(tmp_path):
    write_tar(tmp_path / "s.tar", KINDS["plain"][1])
    whole = bytearray((tmp_path / "s.tar").read_bytes())
    whole[20 * 2048 : 20 * 2048 + 512] = b"x" * 512
    (tmp_path / "s.tar").write_bytes(whole)
    source = open_source(tmp_path / "s.tar")
    assert len(list(source.rows)) == 20
    reason = "has no end mark and may be truncated or damaged; 20 images of it were read"
    assert source.skipped == [Skipped("s.tar", reason)]


@pytest.mark.parametrize("seed", range(12))
def test_any_names_are_read_alike_from_anywhere_and_by_key(tmp_path, seed):
    draw = random.Random(seed)
    between = ["", "", ".image", ".depth", ".0.1", *(f".{n}" for n in range(20))]
    names = [
        draw.choice(["photo", "photo", "photo", "a", "d/x", "._j"])
        + draw.choice(between)
        + draw.choice([".jpg", ".png", ".JPG", ".txt", ".json", ".npy"])
        for _ in range(120)
    ]
    names = sorted(names) if seed % 2 else names
    contents = [b'{"caption": "%d"}' % n for n in range(len(names))]
    write_tar(tmp_path / "s.tar", zip(names, contents, strict=True))
    source = open_source(tmp_path / "s.tar")
    (shard,) = source.rows.shards
    passed = list(source.rows.rows(shard))
    rows = [row for row, _ in passed]
    assert len({row.key for row in rows}) == len(rows) > 2
    for row in rows:
        name = names[contents.index(row.image.data)]
        assert row.key == f"s.tar/{name.replace('JPG', 'jpg')}"
    for at in range(0, len(rows), 3):
        assert [row for row, _ in source.rows.rows(shard, passed[at][1])] == rows[at + 1 :]
    pictures = open_image_reader(str(tmp_path / "s.tar"))
    assert [pictures.read(row.key) for row in rows] == [row.image.data for row in rows]


CASES = SHARED.parent / "cases" / "tars"
CAPTIONS = {"cls": 0, "multi": 48, "jsonlist": 48, "jsonsent": 48, "ungrouped": 0}
IMAGES = {"hard": 24, "dup": 1, "sym": 12, "missing": 22}


NAMES = "dots imgjpg dup capext jpgtxt jsonlist jsonnest jsonnull jsonstr multi emptytxt cls gz "
NAMES += "gz_named mac macdir hard input seg somedots dotdir nested JPG jsonsent"


@pytest.mark.parametrize("name", NAMES.split())
def test_cases_as_people_have_them(name):
    file = CASES / ("gz.tar.gz" if name == "gz" else f"{name}.tar")
    if not file.exists():
        pytest.skip("the shared cases are not here")
    source = open_source(file)
    rows = list(source.rows)
    assert len(rows) == IMAGES.get(name, 24)
    assert sum(len(row.captions) for row in rows) == CAPTIONS.get(name, len(rows))
    assert len(source.skipped) == (23 if name == "dup" else 0)
    pictures = open_image_reader(str(file))
    assert all(pictures.read(row.key) == row.image.data for row in rows)
