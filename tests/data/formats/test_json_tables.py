"""JSON tables of every form, by value, and read on from anywhere as from the start."""

import json
import os

import pytest

from clipkit.data.formats import json_tables
from clipkit.data.formats.json_tables import JsonTable
from clipkit.data.images import Skipped
from clipkit.data.open_source import open_source
from clipkit.errors import DataError
from tests.helpers.paths import SHARED

PAIRS = {f"{name}.jpg": f"a {name} on “grass”" for name in ("dog", "cat", "cow", "hen")}
OBJECTS = [{"image": image, "caption": caption} for image, caption in PAIRS.items()]
ONE_EACH = [(image, [caption]) for image, caption in PAIRS.items()]
NUMBERED = dict(enumerate(PAIRS))
COCO = {
    "info": {"year": 2017, "notes": ["x", {"y": [1, 2]}]},
    "licenses": [],
    "images": [{"id": n, "file_name": image, "height": 4} for n, image in NUMBERED.items()],
    "annotations": [
        {"id": 10 * n + k, "image_id": n, "caption": f"{PAIRS[image]} {k}"}
        for k in range(2)
        for n, image in NUMBERED.items()
        if n
    ],
}
SPLITS = ["train", "restval", "val", "train"]
KARPATHY = {
    "images": [
        {
            "sentids": [2 * n, 2 * n + 1],
            "imgid": n,
            "sentences": [
                {"tokens": ["a"], "raw": f"{PAIRS[image]} {k}", "imgid": n} for k in range(2)
            ],
            "split": SPLITS[n],
            "filename": image,
        }
        for n, image in NUMBERED.items()
    ],
    "dataset": "flickr8k",
}


@pytest.fixture(autouse=True)
def _images(tmp_path):
    for name in PAIRS:
        (tmp_path / name).touch()


def write(path, value, **options):
    path.write_text(value if isinstance(value, str) else json.dumps(value, **options), "utf-8")
    return path


def lines(records):
    return "\n".join(json.dumps(record) for record in records)


def read(file, **options):
    """Keys and captions, the same whether held in memory or streamed."""
    source = open_source(file, **options)
    assert not source.skipped
    found = [(row.key, row.captions) for row in source.rows]
    stream = open_source(file, **options, streaming=True)
    assert [(row.key, row.captions) for row in stream.rows] == found
    return found


def two_each(*names):
    return [(f"{n}.jpg", [f"{PAIRS[f'{n}.jpg']} {k}" for k in range(2)]) for n in names]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", json.dumps(OBJECTS)),
        ("t.json", json.dumps(OBJECTS, indent=2, ensure_ascii=False)),
        ("t.json", "\ufeff" + json.dumps(OBJECTS, ensure_ascii=False)),
        ("t.json", lines(OBJECTS)),
        ("t.json", json.dumps({"version": 1, "data": OBJECTS})),
        ("t.json", json.dumps(PAIRS)),
        ("t.json", json.dumps(PAIRS, indent=1)),
        ("t.jsonl", json.dumps(OBJECTS)),
        ("t.jsonl", json.dumps(OBJECTS, indent=2)),
        ("t.jsonl", "\n" + lines(OBJECTS) + "\r\n\n"),
        ("t.ndjson", lines(OBJECTS)),
    ],
)
def test_pairs_in_every_form(tmp_path, name, content):
    assert read(write(tmp_path / name, content)) == ONE_EACH


def test_several_captions_by_image_path(tmp_path):
    table = {"in/a.PNG": ["a dog", "two dogs"], "b.jpeg": "a cat"}
    assert read(write(tmp_path / "t.json", table)) == [
        ("in/a.PNG", ["a dog", "two dogs"]),
        ("b.jpeg", ["a cat"]),
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_coco_captions(tmp_path, indent):
    expected = [("dog.jpg", []), *two_each("cat", "cow", "hen")]
    assert read(write(tmp_path / "t.json", COCO, indent=indent)) == expected
    backwards = dict(reversed(COCO.items()))
    assert read(write(tmp_path / "u.json", backwards, indent=indent)) == expected
    rows = open_source(tmp_path / "t.json", metadata=True).rows
    assert [row.metadata for row in rows] == [{"table_id": n, "height": 4} for n in range(4)]


@pytest.mark.parametrize("place", ["train2017", "annotations/in", "annotations"])
def test_the_images_of_a_coco_folder(tmp_path, place):
    file = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    file.parent.mkdir(parents=True)
    write(file, COCO)
    folder = tmp_path / "coco" / place
    folder.mkdir(exist_ok=True)
    for name in PAIRS:
        (folder / name).touch()
    source = open_source(file)
    assert [row.key for row in source.rows] == list(PAIRS)
    assert {row.image.path for row in source.rows} == {str(folder / name) for name in PAIRS}
    assert source.root == folder
    chosen = open_source(file, image_root=folder)
    assert [row.image.path for row in chosen.rows] == [row.image.path for row in source.rows]


def test_coco_captions_of_no_image_are_counted(tmp_path):
    file = write(tmp_path / "t.json", COCO | {"images": COCO["images"][:2]})
    assert read(file) == [("dog.jpg", []), *two_each("cat")]
    assert open_source(file).notes == [f"4 captions in {file} are of images that it does not list"]


def test_coco_without_captions_names_what_is_there(tmp_path):
    boxes = [{"image_id": 0, "bbox": [0, 0, 1, 1], "category_id": 3}]
    file = write(tmp_path / "t.json", COCO | {"annotations": boxes})
    with pytest.raises(DataError, match="a JSON object with the fields info, .*, annotations; exp"):
        open_source(file)


def test_karpathy_splits(tmp_path):
    file = write(tmp_path / "dataset_flickr8k.json", KARPATHY)
    assert read(f"{file}:train") == two_each("dog", "hen")
    assert read(f"{file}:restval") == two_each("cat")
    assert read(f"{file}:train+restval") == two_each("dog", "cat", "hen")
    assert read(f"{file}:all") == two_each("dog", "cat", "cow", "hen")
    with pytest.raises(DataError, match=r"the splits train \(2\), restval \(1\), val \(1\); name"):
        open_source(file)
    with pytest.raises(DataError, match=r"no split 'test', it has: train \(2\), restval"):
        open_source(f"{file}:test")
    prints = {open_source(f"{file}:{name}").fingerprint for name in ("train", "val", "all")}
    assert len(prints) == 3
    assert open_source(f"{file}:train").notes == ["captions are in the field sentences.raw"]


def test_karpathy_with_folders(tmp_path):
    images = [image | {"filepath": "in/val2014"} for image in KARPATHY["images"][:1]]
    file = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    (tmp_path / "in" / "val2014").mkdir(parents=True)
    (tmp_path / "in" / "val2014" / "dog.jpg").touch()
    assert read(file) == [("in/val2014/dog.jpg", two_each("dog")[0][1])]


def test_splits_of_other_tables(tmp_path):
    records = [one | {"split": split} for one, split in zip(OBJECTS, SPLITS, strict=True)]
    for name, content in {"t.jsonl": lines(records), "t.json": records}.items():
        file = write(tmp_path / name, content)
        assert read(file) == ONE_EACH
        assert read(f"{file}:val") == ONE_EACH[2:3]


LLAVA = [
    {
        "id": n,
        "image": image,
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": f"<image>\n{caption} "},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    for n, (image, caption) in enumerate(PAIRS.items())
]
OPENAI = [
    {
        "image": image,
        "messages": [
            {"role": "system", "content": "You are helpful."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": caption}]},
        ],
    }
    for image, caption in PAIRS.items()
]


@pytest.mark.parametrize(
    ("records", "field"), [(LLAVA, "conversations"), (OPENAI, "messages")], ids=["llava", "openai"]
)
def test_what_the_assistant_says_first_is_the_caption(tmp_path, records, field):
    for name, content in {"t.json": records, "t.jsonl": lines(records)}.items():
        file = write(tmp_path / name, content)
        assert read(file) == ONE_EACH
        assert read(file, caption=field) == ONE_EACH
        assert open_source(file).notes == [f"captions are the first answer in the field {field}"]
    unanswered = records[0] | {field: records[0][field][:1]}
    file = write(tmp_path / "t.jsonl", lines([*records[1:], unanswered]))
    assert read(file) == [*ONE_EACH[1:], ("dog.jpg", [])]


NESTED = [
    {
        "image": {"path": image, "width": 4},
        "info": {"sentences": [{"raw": f"{caption} {k}", "n": k} for k in range(2)]},
        "caption": {"text": caption},
    }
    for image, caption in PAIRS.items()
]


@pytest.mark.parametrize("form", [lines, json.dumps])
def test_fields_within_objects_have_dotted_names(tmp_path, form):
    file = write(tmp_path / "t.jsonl", form(NESTED))
    assert read(file) == ONE_EACH
    assert read(file, caption="caption.text", image="image.path") == ONE_EACH
    several = two_each("dog", "cat", "cow", "hen")
    assert read(file, caption="info.sentences.raw") == several
    with pytest.raises(DataError, match=r"no column 'caption.txt' among: .*info.sentences.raw"):
        open_source(file, caption="caption.txt")
    assert open_source(file, metadata=True).rows[0].metadata is None


def test_a_choice_of_fields_is_asked_for(tmp_path):
    file = write(
        tmp_path / "t.jsonl", lines([{"image": "a.jpg", "caption": {"en": "x", "de": "y"}}])
    )
    with pytest.raises(DataError, match=r"no caption column among: .*caption.en, caption.de"):
        open_source(file)
    assert read(file, caption="caption.de") == [("a.jpg", ["y"])]


def test_a_name_with_a_dot_and_records_that_lack_fields(tmp_path):
    records = [{"image": "a.jpg", "alt.text": "x"}, {"image": "b.jpg"}, {"image": "c.jpg", "y": {}}]
    file = write(tmp_path / "t.jsonl", lines(records))
    expected = [("a.jpg", ["x"]), ("b.jpg", []), ("c.jpg", [])]
    assert read(file, caption="alt.text") == expected


def test_objects_beside_plain_values(tmp_path):
    records = [
        {"image": "a.jpg", "caption": "x"},
        {"image": {"path": "b.jpg"}, "caption": {"text": "y", "n": 1}},
        {"image": {"path": "c.jpg"}, "caption": [["z"], [["zz"]]]},
        {"image": {"path": "d.jpg"}, "caption": {"n": 1}},
    ]
    file = write(tmp_path / "t.jsonl", lines(records))
    expected = [("a.jpg", ["x"]), ("b.jpg", ["y"]), ("c.jpg", ["z", "zz"]), ("d.jpg", [])]
    assert read(file) == expected
    late = {"image": "b.jpg", "caption": {"text": "y"}}  # after the records that name the fields
    source = open_source(write(tmp_path / "u.jsonl", lines([*records[:1] * 1000, late])))
    assert [row.captions for row in source.rows] == [["x"] * 1000, []]
    assert source.skipped == [Skipped("b.jpg", "its caption is an object with the fields text")]


def test_numbers_truth_values_and_nan(tmp_path):
    text = '[{"image": "a.jpg", "caption": NaN}, {"image": "b.jpg", "caption": true},\n'
    text += '{"image": "c.jpg", "caption": 3}, {"image": "d.jpg", "caption": null}]'
    source = open_source(write(tmp_path / "t.json", text))
    assert [row.captions for row in source.rows] == [[], ["True"], ["3"], []]
    assert source.skipped == [Skipped("a.jpg", "its caption 'nan' stands for a missing value")]


def test_several_tables_are_one_source(tmp_path):
    write(tmp_path / "a.jsonl", lines(OBJECTS[:2]))
    write(tmp_path / "b.jsonl", lines([*OBJECTS[2:], {"image": "dog.jpg", "caption": "again"}]))
    source = open_source(tmp_path / "*.jsonl")
    found = [(row.key, row.captions) for row in source.rows]
    assert found == [("dog.jpg", [PAIRS["dog.jpg"], "again"]), *ONE_EACH[1:]]
    assert len(open_source(tmp_path / "*.jsonl", streaming=True).rows.shards) == 2
    (tmp_path / "a.csv").write_text("image,caption\ndog.jpg,x\n")
    (tmp_path / "b.csv").write_text("image;caption\ncat.jpg;y\n;z\n")
    source = open_source([tmp_path / "a.csv", tmp_path / "b.csv"])
    found = [(row.key, row.captions) for row in source.rows]
    assert found == [("dog.jpg", ["x"]), ("cat.jpg", ["y"])]
    assert [item.key for item in source.skipped] == ["row b.csv:1"]


def test_several_tables_that_do_not_fit(tmp_path):
    write(tmp_path / "a.jsonl", lines(OBJECTS[:2]))
    write(tmp_path / "b.jsonl", lines([{"image": "x.jpg", "text": "x"}]))
    with pytest.raises(DataError, match=r"b.jsonl has no column 'caption', which .*a.jsonl has"):
        open_source(tmp_path / "*.jsonl")
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "a.jsonl", lines(OBJECTS[:2]))
    apart = [tmp_path / "a.jsonl", tmp_path / "c" / "a.jsonl"]
    with pytest.raises(DataError, match="lie in different folders"):
        open_source(apart)
    assert len(open_source(apart, image_root=tmp_path).rows) == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.json", "", "holds no objects; expected one object a line"),
        ("t.json", "[]", "holds no objects; expected one object a line"),
        ("t.jsonl", "[1, 2]", "holds no objects; expected one object a line"),
        ("t.json", '{"a": 1, "b": [2]}', "is a JSON object with the fields a, b; expected"),
        (
            "t.json",
            json.dumps(OBJECTS)[:-40],
            r"from byte 1\d\d on \(Unterminated string.*write it",
        ),
        ("t.json", json.dumps(OBJECTS)[:-1], r"from byte \d+ on \(it ends within a list or object"),
        ("t.json", '[{"image": "a.jpg" "caption": 1}]', r"from byte 1 on \(Expecting ','"),
        ("t.json", "[" + "[" * 100_000, "from byte 1 on"),
    ],
)
def test_files_that_are_not_tables(tmp_path, name, content, reason):
    with pytest.raises(DataError, match=reason):
        list(open_source(write(tmp_path / name, content)).rows)


def test_bad_items_are_skipped_and_counted(tmp_path):
    file = write(tmp_path / "t.json", [*OBJECTS[:1], 3, "x", *OBJECTS[1:]])
    source = open_source(file)
    assert [(item.key, item.reason) for item in source.skipped] == [
        ("t.json, item 2", "is not a JSON object"),
        ("t.json, item 3", "is not a JSON object"),
    ]
    assert len(source.rows) == 4


RECORDS = [
    {"n": n, "text": text * n, "more": [{"a": n}, -n]}
    for n, text in enumerate(["", "x", "é“”", "\U0001f600 ", "\ud800", "\\\"'"] * 5)
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 1}])
def test_reading_in_pieces_equals_json(tmp_path, monkeypatch, chunk, options):
    monkeypatch.setattr(json_tables, "_CHUNK", chunk)
    text = json.dumps(RECORDS, **options).encode("utf-8", "surrogatepass")
    file = tmp_path / "t.json"
    file.write_bytes(text)
    table = JsonTable(file, 1)
    found = list(table.records([]))
    expected = json.loads(text.decode("utf-8", "surrogateescape"))
    assert [record for record, _ in found] == expected
    for number, (_, place) in enumerate(found, 1):
        assert place[1] == number
        assert text[: place[0]].count(b'"more"') == number  # in bytes, whatever the characters
        rest = [record for record, _ in table.records([], place)]
        assert rest == expected[number:]


@pytest.mark.parametrize("value", [[12345, -1.5e10], [True, None], [0]])
def test_numbers_cut_by_the_end_of_a_piece(tmp_path, monkeypatch, value):
    monkeypatch.setattr(json_tables, "_CHUNK", 1)
    file = write(tmp_path / "t.json", [{"a": value}, *value])
    skipped = []
    assert [r for r, _ in JsonTable(file, 1).records(skipped)] == [{"a": value}]
    assert len(skipped) == len(value)


def test_memory_does_not_depend_on_the_size(tmp_path):
    import tracemalloc

    file = tmp_path / "t.json"
    with file.open("w") as stream:
        stream.write('{"info": 1, "data": [')
        for number in range(8_000):
            record = {"image": f"{number}.jpg", "caption": "x" * 2_100}
            stream.write(("," if number else "") + json.dumps(record))
        stream.write("]}")
    assert file.stat().st_size > 16 << 20
    tracemalloc.start()
    try:
        table = JsonTable.open(file, None, [])
        assert sum(1 for _ in table.records([])) == 8_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


CASES = SHARED.parent / "cases" / "parquet"


@pytest.mark.parametrize(
    "name",
    [
        "array.json",
        "coco.json",
        "lines.json",
        "array.jsonl",
        "pretty.jsonl",
        "llava.jsonl",
        "nested.jsonl",
        "nested2.jsonl",
    ],
)
def test_shared_cases(name):
    if not CASES.exists():
        pytest.skip("the shared cases are not here")
    found = read(CASES / name)
    assert found[:2] == [
        ("img/p000.jpg", ["a yellow circle number 0"]),
        ("img/p001.jpg", ["a green square number 1"]),
    ]
    assert len(found) == 24
    assert all(os.path.exists(row.image.path) for row in open_source(CASES / name).rows)
