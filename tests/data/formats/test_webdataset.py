"""Fields of the JSON beside a tar's images come to the store as the columns of a table do."""

import json

import pytest

from clipkit.data.open_source import open_source
from clipkit.tasks.embed import embed
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
    assert all("metadata" not in row for row in plain.rows)


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
    rows = {row["key"]: row for row in source.rows}
    widths = {key: row["metadata"]["width"] for key, row in rows.items()}
    assert widths == {
        "s.tar/a.png": 3.0,
        "s.tar/b.png": None,
        "s.tar/c.png": None,
        "s.tar/d.png": 2.5,
    }
    # The title is the caption, as it is without metadata.
    assert rows["s.tar/a.png"]["captions"] == ["t"]
    assert set(rows["s.tar/a.png"]["metadata"]) == {"width", "caption"}
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
        assert row["metadata"] == {
            name: EXPECTED[row["key"].removeprefix("s.tar/")][name] for name in row["metadata"]
        }
    assert source.skipped
