"""Parquet columns of structs and lists, by value."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data.formats.nested import Nested, arrow_leaves, json_leaves
from clipkit.data.open_source import open_source
from clipkit.errors import DataError
from tests.helpers.paths import SHARED

CASES = SHARED.parent / "cases" / "parquet"


def png(red):
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


A, B, C = png(1), png(2), png(3)


def read(file, columns=None, **options):
    """Keys, image bytes and captions, the same whether held in memory or streamed."""
    if columns is not None:
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file)
    source = open_source(file, **options)
    found = [(row.key, row.image.data, row.captions) for row in source.rows]
    stream = open_source(file, **options, streaming=True).rows
    assert [(row.key, row.image.data, row.captions) for row in stream] == found
    return found, source.notes


def test_captions_in_structs(tmp_path):
    captions = [{"text": "a dog", "n": 1}, None, {"text": " a cat", "n": 2}]
    columns = {"image": [A, B, C], "caption": captions}
    expected = [("0", A, ["a dog"]), ("1", B, []), ("2", C, ["a cat"])]
    assert read(tmp_path / "t.parquet", columns) == (expected, [])
    assert read(tmp_path / "t.parquet", caption="caption.text") == (expected, [])
    counted = [("0", A, ["1"]), ("1", B, []), ("2", C, ["2"])]
    assert read(tmp_path / "t.parquet", caption="caption.n") == (counted, [])


def test_captions_in_lists_of_structs(tmp_path):
    sentences = [[{"raw": "a dog", "tokens": ["a"]}, {"raw": "dogs", "tokens": []}], [], None]
    columns = {"image": [A, B, C], "sentences": sentences}
    expected = [("0", A, ["a dog", "dogs"]), ("1", B, []), ("2", C, [])]
    notes = ["captions are in the field sentences.raw"]
    assert read(tmp_path / "t.parquet", columns) == (expected, notes)
    assert read(tmp_path / "t.parquet", caption="sentences.raw")[0] == expected
    tokens = [("0", A, ["a"]), ("1", B, []), ("2", C, [])]
    assert read(tmp_path / "t.parquet", caption="sentences.tokens")[0] == tokens


def test_conversations(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]
    columns = {"image": [A, B], "conversations": [turns, turns[:1]]}
    found, notes = read(tmp_path / "t.parquet", columns)
    assert found == [("0", A, ["a dog"]), ("1", B, [])]
    assert notes == ["captions are the first answer in the field conversations"]


def test_images_in_structs(tmp_path):
    samples = [{"image": {"bytes": A, "path": "a.png"}, "text": "a dog"}]
    columns = {"sample": samples, "label": [{"name": "dog"}]}
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), file)
    options = {"image": "sample.image", "caption": "sample.text", "label": "label.name"}
    assert read(file, **options)[0] == [("0", A, ["a dog"])]
    [row] = open_source(file, **options).rows
    assert row.label == "dog"


@pytest.mark.parametrize("name", ["image", "images"])
def test_one_image_in_a_list(tmp_path, name):
    columns = {name: [[A], [B], None, []], "text": ["a", "b", "c", "d"]}
    expected = [("0", A, ["a"]), ("1", B, ["b"])]
    assert read(tmp_path / "t.parquet", columns) == (expected, [])
    structs = [[{"bytes": one, "path": None} for one in ones or ()] for ones in columns[name]]
    assert read(tmp_path / "t.parquet", columns | {name: structs}) == (expected, [])
    fixed = pa.array([[A], [B], None], pa.list_(pa.binary(), 1))
    table = pa.table({name: fixed, "text": ["a", "b", "c"]})
    assert read(tmp_path / "t.parquet", table) == (expected, [])


def test_the_first_of_several_images_is_read_and_said(tmp_path):
    columns = {"images": [[], [A, B, C], [B], None, [C, A]], "text": list("abcde")}
    found, notes = read(tmp_path / "t.parquet", columns)
    assert found == [("1", A, ["b"]), ("2", B, ["c"]), ("4", C, ["e"])]
    said = "rows have several images in the column images; only the first of each is read"
    assert notes == [said]
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(A)
    (tmp_path / "t.jsonl").write_text('{"images": ["a.png", "b.png"], "text": "x"}')
    source = open_source(tmp_path / "t.jsonl")
    assert [row.key for row in source.rows] == ["a.png"]
    assert source.notes == [said]
    found, notes = read(tmp_path / "u.parquet", {"images": [["b.png"]], "text": ["x"]})
    assert (found, notes) == ([("b.png", None, ["x"])], [])


def test_pixels_are_refused_with_what_to_store(tmp_path):
    with pytest.raises(DataError, match=r"holds list<.*store such bytes"):
        read(tmp_path / "t.parquet", {"image": [[1, 2]], "text": ["x"]})
    with pytest.raises(DataError, match=r"holds list<.*store such bytes"):
        read(tmp_path / "t.parquet", {"image": [[[[1, 2, 3]]]], "text": ["x"]})


def test_a_choice_of_fields_is_asked_for(tmp_path):
    columns = {"image": [A], "caption": [{"en": "a dog", "de": "ein Hund"}]}
    with pytest.raises(DataError, match="no caption column among: image, caption.en, caption.de"):
        read(tmp_path / "t.parquet", columns)
    assert read(tmp_path / "t.parquet", caption="caption.de")[0] == [("0", A, ["ein Hund"])]


def test_captions_of_other_types(tmp_path):
    for values, expected in [
        ([b"a dog", "caf\xe9".encode(), None], [["a dog"], ["café"], []]),
        ([1.5, float("nan"), None], [["1.5"], [], []]),
        ([True, False, None], [["True"], ["False"], []]),
        ([[["a"], ["b", "c"]], [[]], None], [["a", "b", "c"], [], []]),
        (['["a dog", "dogs"]', "[]", None], [["a dog", "dogs"], [], []]),
    ]:
        found, _ = read(tmp_path / "t.parquet", {"image": [A, B, C], "caption": values})
        assert [captions for _, _, captions in found] == expected


@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_one_row_for_each_caption_of_an_image(tmp_path, group):
    columns = {"id": list("aabbbab"), "image": [A, A, B, B, C, A, C], "text": list("1234567")}
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), file, row_group_size=group)
    source = open_source(file)
    found = [(row.key, row.image.data, row.captions) for row in source.rows]
    assert found == [("a", A, ["1", "2", "6"]), ("b", B, ["3", "4"])]
    assert [(item.key, item.reason) for item in source.skipped] == [
        ("b", "its key is taken by an earlier image")
    ] * 2
    stream = [(row.key, row.captions) for row in open_source(file, streaming=True).rows]
    if group == 100:
        assert stream == [
            ("a", ["1", "2"]),
            ("b", ["3", "4"]),
            ("b", ["5"]),
            ("a", ["6"]),
            ("b", ["7"]),
        ]
    assert [text for _, texts in stream for text in texts] == list("1234567")


def test_a_column_with_a_dot_in_its_name(tmp_path):
    columns = {"image": [A], "alt.text": ["a dog"], "alt": [{"text": "no"}]}
    found, _ = read(tmp_path / "t.parquet", columns | {"alt": [1]}, caption="alt.text")
    assert found == [("0", A, ["a dog"])]


def test_nested_columns_are_not_metadata(tmp_path):
    columns = {"image": [A], "caption": [{"text": "a dog", "n": 1}], "year": [2023]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    [row] = open_source(tmp_path / "t.parquet", metadata=True).rows
    assert row.metadata == {"year": 2023}
    assert row.captions == ["a dog"]


def test_a_shard_without_the_column_is_named(tmp_path):
    pq.write_table(pa.table({"image": [A], "caption": ["a"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [A], "text": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1.parquet has no column 'caption', which .*0.parquet"):
        open_source(tmp_path / "*.parquet")


def test_names_for_fields_of_json_and_arrow_are_the_same():
    record = {"a": 1, "b": {"c": "x", "d": [{"e": [1], "f": {"g": None}}]}, "i": ["x"]}
    expected = [("a",), ("b", "c"), ("b", "d", "e"), ("b", "d", "f", "g"), ("i",)]
    assert list(json_leaves(record)) == expected
    assert list(arrow_leaves(pa.Table.from_pylist([record]).schema)) == expected
    assert Nested.find(expected, []).paths == {".".join(path): path for path in expected[1:4]}


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("images_list", ["a green square number 1"]),
        ("img_list", ["a green square number 1"]),
        ("cap_json", ["one a green square number 1", "two a green square number 1"]),
        ("sent_struct", ["one a green square number 1", "two a green square number 1"]),
        ("cap_dictlist", ["one a green square number 1", "two a green square number 1"]),
        ("cap_bytes", ["a green square number 1"]),
        ("cap_int", ["1"]),
        ("cap_float", []),
    ],
)
def test_shared_cases(name, second):
    if not CASES.exists():
        pytest.skip("the shared cases are not here")
    found, _ = read(CASES / f"{name}.parquet")
    assert len(found) == 24
    assert found[1][2] == second
    assert all(data.startswith(b"\xff\xd8") for _, data, _ in found)
