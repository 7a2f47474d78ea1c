"""What a table tells of its images comes to the store, to the index and to filters."""

import csv
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from clipkit.data.formats.metadata import MOST, infer_types
from clipkit.data.open_source import open_source
from clipkit.index.merge import merge_indexes
from clipkit.index.vector_index import VectorIndex
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.store.shards import Record, digest
from clipkit.tasks import embed as embed_module
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from clipkit.tasks.sync import add_images, sync_index
from tests.helpers.tables import DAY, EXPECTED, NAMES, ROWS, metadata
from tests.helpers.toys import COLOURS, ColourEncoder, png, square


@pytest.fixture
def encoder():
    return ColourEncoder()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in COLOURS:
        square(colour).save(folder / f"{colour}.png")
    return folder


def write(folder, form, rows=ROWS):
    """The rows as a table of some form; returns what opens it."""
    frame = pd.DataFrame(rows)
    if form == "metadata":
        frame.rename(columns={"filepath": "file_name"}).to_csv(folder / "metadata.csv", index=False)
        return folder
    path = folder / f"table.{form}"
    if form == "csv":
        frame.to_csv(path, index=False)
    elif form == "jsonl":
        lines = [json.dumps(row, default=str) for row in frame.to_dict("records")]
        path.write_text("\n".join(lines))
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "metadata"])
def test_columns_of_tables_come_to_the_store_by_value(photos, tmp_path, encoder, form, streaming):
    path = write(photos, form)
    source = open_source(path, streaming=streaming, metadata=True)
    store = embed(source, tmp_path / "store", encoder)
    assert metadata(store.records()) == EXPECTED
    assert [r["captions"] for r in store.records().to_pylist()] == [[r["caption"]] for r in ROWS]


def test_a_filter_finds_what_the_table_says(photos, tmp_path, encoder):
    build_index(write(photos, "csv"), tmp_path / "index", encoder=encoder)
    searcher = VectorIndex.open(tmp_path / "index", encoder=encoder)
    hits = searcher.search("red", k=9, where="year >= 2023 and folder = 'holiday'")
    kept = [r for r in ROWS if r["year"] >= 2023 and r["folder"] == "holiday"]
    vectors = encoder.encode_images([square(r["filepath"][:-4]) for r in kept])
    scores = vectors @ encoder.encode_text(["red"])[0]
    assert [h.key for h in hits] == [
        kept[n]["filepath"] for n in np.argsort(-scores, kind="stable")
    ]
    assert len(searcher.search("red", k=2, where="'SIZE 1' in table_size")) == 1


def test_a_saved_dataset_and_several_parquet_files(photos, tmp_path, encoder, monkeypatch):
    import datasets

    rows = [
        {"image": png(square(c)), "year": 2020 + n, "kind": n % 2} for n, c in enumerate(COLOURS)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    store = embed(tmp_path / "saved", tmp_path / "one", encoder)
    assert [(r["year"], r["kind"]) for r in store.records().to_pylist()] == [
        (r["year"], r["kind"]) for r in rows
    ]
    # The second file knows years as texts, and no kinds.
    pd.DataFrame(rows[:3]).to_parquet(tmp_path / "p-0.parquet")
    rest = [{"image": r["image"], "year": f"in {r['year']}"} for r in rows[3:]]
    pd.DataFrame(rest).to_parquet(tmp_path / "p-1.parquet")
    for streaming in (False, True):
        source = open_source(tmp_path / "p-*.parquet", streaming=streaming, metadata=True)
        store = embed(source, tmp_path / f"two-{streaming}", encoder)
        assert [(r["year"], r["kind"]) for r in store.records().to_pylist()] == [
            *((str(r["year"]), r["kind"]) for r in rows[:3]),
            *((r["year"], None) for r in rest),
        ]


def test_who_does_not_ask_for_them_gets_none(photos):
    path = write(photos, "csv")
    plain, more = open_source(path), open_source(path, metadata=True)
    assert {row.metadata for row in plain.rows} == {None}
    assert [replace(row, metadata=None) for row in more.rows] == list(plain.rows)
    assert plain.fingerprint == more.fingerprint
    stream = open_source(path, streaming=True, metadata=True)
    assert [row.metadata for row in stream.rows] == [row.metadata for row in more.rows]


def test_what_holds_no_plain_values_is_left_out_and_told_once(tmp_path, capsys):
    columns = {
        "image": [png(square("red"))],
        "thumb": [b"x"],
        "tags": [["a"]],
        "pose": [{"x": 1}],
        "nothing": [None],
        "key": ["k"],
        "id": [5],
        "ratio": [float("nan")],
        "when": pa.array([DAY.strftime("%Y-%m-%dT10:00:00+02:00")]),
        "kind": pa.array(["a"]).dictionary_encode(),
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet", metadata=True)
    rows = source.rows
    assert source.notes == [
        f"{tmp_path / 't.parquet'}: columns that are not kept as metadata: thumb, tags, pose; "
        "those of numbers, strings, booleans and dates are, at most 100"
    ]
    assert rows[0].key == "k"  # the image has no other name
    more = {"table_id": 5, "ratio": None, "kind": "a", "when": "2023-05-01T10:00:00+02:00"}
    assert rows[0].metadata == more
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("note: ")
    assert "thumb, tags, pose;" in err
    wide = {"image": [png(square("red"))], **{f"f{n}": [n] for n in range(MOST + 7)}}
    pa.parquet.write_table(pa.table(wide), tmp_path / "w.parquet")
    rows = open_source(tmp_path / "w.parquet", metadata=True).rows
    assert rows[0].metadata == {f"f{n}": n for n in range(MOST)}
    assert "f104 and 2 more;" in capsys.readouterr().err


def test_texts_that_are_no_utf8_are_kept_readable(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xff", b"b"]).buffers())
    columns = {"image": [png(square("red")), png(square("blue"))], "place": broken}
    pa.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    rows = open_source(tmp_path / "t.parquet", metadata=True).rows
    assert [row.metadata["place"] for row in rows] == ["a\ufffd", "b"]


def test_types_are_those_of_all_rows():
    rows = [{"a": "1", "b": "1", "c": "2023-01-01", "d": "", "e": "1"}] * 5000
    rows += [{"a": "9" * 19, "b": "2.5", "c": "2023-01-01 10:00", "d": "", "e": "one"}]
    found = infer_types(rows, typed=False)
    assert list(map(str, found.values())) == ["string", "double", "timestamp[us]", "null", "string"]
    assert str(infer_types([{"a": "1"}, {"a": "2"}], typed=True)["a"]) == "string"


def test_words_for_a_missing_value_are_null_beside_numbers_and_dates(tmp_path):
    square("red").save(tmp_path / "a.png")
    columns = {
        "path": ["a.png"] * 3,
        "year": ["NA", "2023", "nan"],
        "score": ["0.5", "NULL", ""],
        "day": ["2023-05-01", "NaT", "None"],
        "good": ["N/A", "True", "false"],
        "country": ["NA", "DE", "None"],
        "none": ["NA", "NA", "<NA>"],
    }
    pd.DataFrame(columns).to_csv(tmp_path / "t.csv", index=False)
    rows = open_source(tmp_path / "t.csv", streaming=True, metadata=True).stream.batches()
    [found] = [batch.column("metadata").to_pylist() for batch in rows]
    assert found == [
        {"year": None, "score": 0.5, "day": DAY, "good": None, "country": "NA"},
        {"year": 2023, "score": None, "day": None, "good": True, "country": "DE"},
        {"year": None, "score": None, "day": None, "good": False, "country": "None"},
    ]


def test_other_metadata_are_brought_up_to_date_without_encoding(photos, tmp_path, encoder):
    build_index(write(photos, "csv"), tmp_path / "index", spec="HNSW8", encoder=encoder)
    encoder.encoded = 0
    assert sync_index(tmp_path / "index", encoder=encoder).unchanged == len(ROWS)
    # A column more, one less, a year that is no number.
    rows = [{**row, "new": n} for n, row in enumerate(ROWS)]
    rows[2]["year"] = "unknown"
    for row in rows:
        del row["rating"]
    path = write(photos, "csv", rows)
    changes = sync_index(tmp_path / "index", encoder=encoder)
    assert (changes.changed, changes.encoded, encoder.encoded) == (len(ROWS), 0, 0)
    found = metadata(VectorIndex.open(tmp_path / "index").records(), ["year", "rating", "new"])
    assert found == {
        r["filepath"]: {"year": str(r["year"]), "rating": None, "new": r["new"]} for r in rows
    }
    assert sync_index(tmp_path / "index", encoder=encoder).unchanged == len(ROWS)
    store = embed(path, tmp_path / "index.store", encoder)
    assert metadata(store.records(), ["new"])["red.png"] == {"new": 0}
    assert encoder.encoded == 0


def test_sources_without_a_column_have_nulls_in_it(photos, tmp_path, encoder):
    other = tmp_path / "other"
    other.mkdir()
    square("red", shade=9).save(other / "plain.png")
    build_index(write(photos, "csv"), tmp_path / "one", encoder=encoder)
    add_images(tmp_path / "one", other, encoder=encoder)
    records = VectorIndex.open(tmp_path / "one").records()
    assert metadata(records) == EXPECTED | {"other/plain.png": dict.fromkeys(NAMES)}
    hits = VectorIndex.open(tmp_path / "one", encoder=encoder).search("red", where="year is null")
    assert [hit.key for hit in hits] == ["other/plain.png"]


def test_indexes_whose_columns_differ_are_merged(photos, tmp_path, encoder):
    other = tmp_path / "other"
    other.mkdir()
    for colour in list(COLOURS)[:2]:
        square(colour, shade=9).save(other / f"{colour}.png")
    build_index(write(photos, "csv"), tmp_path / "one", encoder=encoder)
    rows = [
        {"filepath": f"{c}.png", "year": f"c. {n}", "place": "Rome"} for n, c in enumerate(COLOURS)
    ]
    build_index(write(other, "jsonl", rows[:2]), tmp_path / "two", encoder=encoder)
    index = merge_indexes([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    found = metadata(index.records(), ["year", "place", "public"])
    assert len(found) == len(COLOURS) + 2
    assert found["blue.png"] == {"year": "2022", "place": None, "public": False}
    (name,) = [key for key in found if key.endswith("/green.png")]
    assert found[name] == {"year": "c. 1", "place": "Rome", "public": None}


def test_an_interrupted_run_goes_on_with_its_metadata(photos, tmp_path, encoder, monkeypatch):
    path = write(photos, "csv")
    create = EmbeddingStore.create
    monkeypatch.setattr(
        embed_module.EmbeddingStore, "create", lambda *a, **o: create(*a, **o, shard_size=2)
    )

    def stopping(encoder, rows, **options):
        for number, batch in enumerate(batches(encoder, rows, **options | {"batch_size": 2})):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    batches = embed_module.encoded_batches
    monkeypatch.setattr(embed_module, "encoded_batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(path, tmp_path / "store", encoder)
    monkeypatch.setattr(embed_module, "encoded_batches", batches)
    encoder.encoded = 0
    store = embed(path, tmp_path / "store", encoder)
    assert metadata(store.records()) == EXPECTED
    assert encoder.encoded == len(ROWS) - 4


def test_records_are_told_apart_by_their_metadata():
    record: Record = {"key": "a", "size": 1, "mtime_ns": 2, "captions": [], "label": None}
    assert digest(record) == digest(record | {"content_hash": "f", "year": None})
    assert digest(record | {"year": 1}) == digest(record | {"year": 1.0})
    assert digest(record | {"year": 1}) != digest(record | {"year": 2})
    assert digest(record | {"tags": ["a"]}) != digest(record | {"tags": ["b"]})


def test_the_commands_show_what_the_table_says(photos, tmp_path, tiny_checkpoint, run):
    run("index", "build", write(photos, "csv"), "--out", tmp_path / "i", "--model", tiny_checkpoint)
    asked = ("search", tmp_path / "i", "red", "--where", "year >= 2024 and public = false")
    kept = {r["filepath"]: r for r in ROWS if r["year"] >= 2024 and not r["public"]}
    hits = [json.loads(line) for line in run(*asked, "--json")[0].splitlines()]
    assert {hit["key"] for hit in hits} == kept.keys()
    for hit in hits:
        row = kept[hit["key"]]
        assert (hit["captions"], hit["label"]) == ([row["caption"]], None)
        assert hit["more"]["year"] == row["year"]
        assert hit["more"]["taken"] == str(row["taken"])
    table = list(csv.DictReader(run(*asked, "--csv", "-")[0].splitlines()))
    assert [line["key"] for line in table] == [hit["key"] for hit in hits]
    assert [(line["year"], line["table_size"]) for line in table] == [
        (str(kept[hit["key"]]["year"]), kept[hit["key"]]["size"]) for hit in hits
    ]
    assert run(*asked[:-1], "year > 3000", "--csv", "-")[0] == "rank,score,key\n"
    assert "did you mean year" in run(*asked[:-1], "yaer > 1", code=1)[1]
    run(*asked, "--csv", "-", "--json", code=2)
