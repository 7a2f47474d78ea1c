"""Conditions on records choose what Python would choose, and searching among it is exact."""

import datetime

import faiss
import numpy as np
import pyarrow as pa
import pytest

from clipkit.errors import ArtifactError, DataError
from clipkit.index import segments as segments_module
from clipkit.index.filters import rows_where
from clipkit.index.segments import split_mask
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.indexes import DIM, MODEL, QUERIES, table
from tests.helpers.toys import unit_rows

COUNT = 300
VECTORS = unit_rows(COUNT, DIM)
DAY = datetime.date(2023, 1, 1)
RECORDS = [
    {
        "key": f"{['holiday/sea', 'holiday', 'work'][n % 3]}/item-{n:03d}.png",
        "size": n,
        "mtime_ns": n,
        "captions": [f"Dog {n}", "on a beach"] if n % 2 else [],
        "label": None if n % 4 == 0 else f"label {n % 4}",
        "content_hash": f"{n:032x}",
        "year": None if n % 10 == 0 else 2000 + n % 30,
        "width of it": n % 7,
        "taken": DAY + datetime.timedelta(days=n),
        "public": n % 5 == 0,
        "from": "it's",
    }
    for n in range(COUNT)
]


def build(path, spec="Flat"):
    with EmbeddingStore.create(path / "store", MODEL, shard_size=100) as writer:
        writer.append(VECTORS, RECORDS)
        store = writer.finish({})
    VectorIndex.build(store, path / "index", spec)
    return path / "index"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Two segments, some rows of each removed; the second has columns of its own."""
    path = build(tmp_path_factory.mktemp("where"))
    with IndexWriter(path) as writer:
        writer.remove([RECORDS[3]["key"], RECORDS[40]["key"]])
        writer.append(unit_rows(4, DIM, 9), table(["a", "b", "work/c", "d"], place=["Rome"] * 4))
        writer.commit()
        writer.remove(["b"])
        writer.commit()
    return VectorIndex.open(path)


def folder(row):
    return row["key"].rpartition("/")[0]


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("year >= 2023", lambda r: (r["year"] or 0) >= 2023),
        ("2005 <= year < 2010.5", lambda r: r["year"] is not None and 2005 <= r["year"] < 2010.5),
        ("year = 2007 or year = 2011", lambda r: r["year"] in (2007, 2011)),
        ("year in (2007, 2011)", lambda r: r["year"] in (2007, 2011)),
        ("year not in (2007)", lambda r: r["year"] is not None and r["year"] != 2007),
        ("year is null", lambda r: r["year"] is None),
        ("year IS NOT NULL AND NOT year > 2002", lambda r: 0 < (r["year"] or 0) <= 2002),
        ("year <> 2001", lambda r: r["year"] not in (None, 2001)),
        (
            "year >= 2023 and folder = 'work'",
            lambda r: (r["year"] or 0) >= 2023 and folder(r) == "work",
        ),
        ("folder in ('holiday', 'work')", lambda r: folder(r) in ("holiday", "work")),
        ("'HOLI' in folder", lambda r: "holi" in folder(r)),
        ("folder = ''", lambda r: folder(r) == ""),
        ("'dog 1' in captions", lambda r: any("dog 1" in c.lower() for c in r["captions"])),
        ("label = \"label 2\"", lambda r: r["label"] == "label 2"),
        ("label != 'label 2'", lambda r: r["label"] not in (None, "label 2")),
        ("taken >= '2023-06-01'", lambda r: (r["taken"] or DAY) >= datetime.date(2023, 6, 1)),
        ("taken in ('2023-01-02')", lambda r: r["taken"] == datetime.date(2023, 1, 2)),
        ("public", lambda r: bool(r["public"])),
        ("not public and size > 200", lambda r: r["public"] is False and r["size"] > 200),
        ("public = false", lambda r: r["public"] is False),
        ("`width of it` > 5", lambda r: (r["width of it"] or 0) > 5),
        (
            "`width of it` < size and size < 20",
            lambda r: r["width of it"] is not None and r["width of it"] < r["size"] < 20,
        ),
        ("from = 'it''s' and -1 < size", lambda r: r["from"] == "it's"),
        ("place = 'Rome'", lambda r: r["place"] == "Rome"),
        ("id > 290", lambda r: r["id"] > 290),
        ("key = 'a'", lambda r: r["key"] == "a"),
    ],
)  # fmt: skip
def test_conditions_choose_what_python_would(index, condition, holds):
    expected = [holds(row) for row in index.records().to_pylist()]
    assert 0 < sum(expected) < len(expected)
    assert rows_where(index.segments, condition).tolist() == expected


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("yaer >= 2023", "no column 'yaer' .*did you mean year"),
        ("folder = holiday", r"no column 'holiday' .*write texts in quotes"),
        (
            "year >= '2023'",
            r"'2023' cannot be compared with the column 'year', which holds numbers",
        ),
        ("folder > 3", "which holds text; write"),
        ("taken > 'May'", "which holds days; .*such as '2023-05-01'"),
        ("captions = 'dog'", "which holds lists"),
        ("label = size", "things of different kinds"),
        ("label", "the column 'label' alone is not true or false"),
        ("'x' in year", "the column 'year' holds no texts"),
        ("1 = 1", "names no column"),
        ("", "is not a condition"),
        ("year >", "is not a condition"),
        ("year > 2000;", "is not a condition"),
        ("__import__('os').system('touch /tmp/x')", "is not a condition"),
        ("[x for x in year]", "is not a condition"),
        ("year > (lambda: 3)()", "is not a condition"),
        ("f'{year}' = 'a'", "is not a condition"),
        ("year > 2 ** 99999", "is not a condition"),
        ("(" * 1500 + "year" + ")" * 1499, "is not a condition"),
        ("not " * 900 + "public = 3", "no condition|cannot be compared"),
        ("year = 1 or " * 400 + "year = 2", "letters, expected at most"),
        ("year > 99999999999999999999999", "cannot be compared"),
    ],
)
def test_what_is_no_condition_is_refused_in_a_sentence(index, condition, message):
    with pytest.raises(DataError, match=message):
        rows_where(index.segments, condition)


def assert_exact(index, rows):
    vectors = np.concatenate([block for block, _ in index.shards()])
    keys = np.array(index.keys)
    for k in (1, 5, 400):
        for query, hits in zip(QUERIES, index.search_vectors(QUERIES, k, rows), strict=True):
            order = np.flatnonzero(rows)[np.argsort(-(vectors[rows] @ query), kind="stable")][:k]
            assert [hit.key for hit in hits] == keys[order].tolist()


@pytest.mark.parametrize("few", [0, 2**15])
@pytest.mark.parametrize("spec", ["Flat", "IVF8,PQ4x4fs", "HNSW8", "SQfp16", "IDMap2,Flat"])
def test_searching_among_chosen_rows_is_exact(tmp_path, monkeypatch, spec, few):
    monkeypatch.setattr(segments_module, "MAX_MASKED", few)
    path = build(tmp_path, spec)
    with IndexWriter(path) as writer:
        writer.remove([RECORDS[3]["key"], RECORDS[40]["key"]])
        writer.append(unit_rows(9, DIM, 9), table([f"new-{n}" for n in range(9)], year=[2023] * 9))
        writer.commit()
    index = VectorIndex.open(path)
    if few == 0 and "PQ" in spec:  # everything is asked for, so that nothing is lost by codes
        index.segments[0].rerank_factor = 400
        faiss.extract_index_ivf(index.segments[0].index).nprobe = 8
    for condition in ("year >= 2015", "year > 3000", "folder = 'work' and year < 2005"):
        rows = rows_where(index.segments, condition)
        assert_exact(index, rows)


def test_a_choice_of_other_rows_is_refused(index):
    with pytest.raises(ArtifactError, match="one value for each of the 301 records"):
        index.search_vectors(QUERIES, 3, np.ones(5, bool))
    assert split_mask(index.segments, None) == [None, None]


def test_only_the_columns_that_are_named_are_read(index, monkeypatch):
    read = []
    column = segments_module.Segment.column
    monkeypatch.setattr(
        segments_module.Segment,
        "column",
        lambda self, name: read.append(name) or column(self, name),
    )
    rows_where(index.segments, "year > 2005 and label = 'label 1'")
    assert set(read) - {"key"} == {"year", "label"}
    assert isinstance(index.segments[0].keys, pa.ChunkedArray)
