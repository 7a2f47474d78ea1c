"""Columns of every kind, as an index of a table with more of them may have."""

import datetime

import numpy as np
import pyarrow as pa
import pytest

from clipkit.web.filters import find_columns, parse_conditions, rows_where, with_folder
from clipkit.web.security import RequestError
from clipkit.web.service import _plain

DAYS = [datetime.date(2020 + n, 3, 1) for n in range(4)]
RECORDS = pa.table(
    {
        "key": ["a/1.png", "a/2.png", "b/3.png", "4.png"],
        "captions": [["x"], [], None, ["y", "z"]],
        "label": ["cat", None, "dog", "Catfish"],
        "year": [2020, 2021, 2022, None],
        "rating": [1.5, float("nan"), 3.0, None],
        "taken": pa.array([*DAYS[:3], None], pa.date32()),
        "kept": [True, False, None, True],
        "notes": pa.array([None] * 4, pa.string()),
        "blob": [b"\xff", b"", None, b"x"],
        "where it is": ["x=1", "x>2", "", "x"],
        "long": ["w" * 200] * 4,
    }
)


def chosen(*conditions):
    table = with_folder(RECORDS)
    parsed = parse_conditions(conditions, find_columns(table))
    return np.flatnonzero(rows_where(table, parsed)).tolist()


def test_columns_are_found_with_what_they_hold():
    found = {column.name: column for column in find_columns(with_folder(RECORDS))}
    assert {name: column.kind for name, column in found.items()} == {
        "label": "text",
        "year": "number",
        "rating": "number",
        "taken": "time",
        "kept": "truth",
        "where it is": "text",
        "long": "text",
        "folder": "text",
    }
    assert found["label"].values == [("Catfish", 1), ("cat", 1), ("dog", 1)]
    assert found["kept"].values == [("false", 1), ("true", 2)]
    assert (found["year"].low, found["year"].high, found["year"].values) == ("2020", "2022", [])
    assert (found["taken"].low, found["taken"].high) == ("2020-03-01", "2022-03-01")
    assert found["folder"].values == [("", 1), ("a", 2), ("b", 1)]
    assert found["long"].values == []
    one_folder = RECORDS.slice(0, 2)
    assert "folder" not in with_folder(one_folder).column_names


@pytest.mark.parametrize(
    ("conditions", "rows"),
    [
        ([], [0, 1, 2, 3]),
        (["label=cat"], [0]),
        (["label = cat"], [0]),
        (["label~CAT"], [0, 3]),
        (["label="], [1]),
        (["label!="], [0, 2, 3]),
        (["label!=cat"], [2, 3]),
        (["year>=2021"], [1, 2]),
        (["year>=2021", "year<2022"], [1]),
        (["year=2020", "year=2022"], [0, 2]),
        (["year=2020", "year=2022", "label=dog"], [2]),
        (["rating>1"], [0, 2]),
        (["taken<=2021-03-01"], [0, 1]),
        (["kept=true"], [0, 3]),
        (["kept!=true"], [1]),
        (["folder=a"], [0, 1]),
        (["folder=a", "folder=b", "year>2020"], [1, 2]),
        (["where it is=x=1"], [0]),
        (["where it is=x>2"], [1]),
        (["where it is~.*"], []),
    ],
    ids=str,
)
def test_conditions_choose_rows(conditions, rows):
    assert chosen(*conditions) == rows


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("year=many", "'many' cannot be compared with the column 'year', which holds numbers"),
        ("taken>soon", "holds times"),
        ("kept=perhaps", "holds truths"),
        ("yaer=2020", "did you mean year?"),
        ("blob=x", "there are: label, year"),
        ("captions~x", "there is no column 'captions'"),
        ("", "is no condition"),
        ("=", "is no condition"),
    ],
)
def test_conditions_without_meaning_are_refused(condition, sentence):
    with pytest.raises(RequestError, match=sentence.replace("?", r"\?")) as refusal:
        chosen(condition)
    assert refusal.value.status == 422


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (3, 3),
        (True, True),
        (1.5, 1.5),
        (float("nan"), None),
        (float("-inf"), None),
        (DAYS[0], "2020-03-01"),
        (b"\xff", "b'\\xff'"),
        ("x" * 9999, "x" * 2000),
    ],
)
def test_values_of_any_column_are_json(value, plain):
    assert _plain(value) == plain
