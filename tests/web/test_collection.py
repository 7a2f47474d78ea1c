"""The served index: its columns, and a newer state that takes over without losing a request."""

import datetime
import threading
import time

import pyarrow as pa
import pytest

from clipkit.artifacts import MANIFEST
from clipkit.errors import ArtifactError, ServeError
from clipkit.tasks.index import build_index
from clipkit.tasks.serve import serve
from clipkit.tasks.sync import sync_index
from clipkit.web import app as application
from clipkit.web import server
from clipkit.web.collection import describe_columns, with_folder
from clipkit.web.service import _as_json
from tests.helpers.toys import square
from tests.helpers.web_toys import ServedEncoder, build, client, keys


@pytest.fixture
def index(tmp_path):
    return build(tmp_path, per_colour=1)


def grow(index, name="red/new.png"):
    square("red").save(index.with_name("photos") / name)
    assert sync_index(index, encoder=ServedEncoder()).added == 1


def test_a_changed_index_takes_over_during_requests(index, monkeypatch):
    monkeypatch.setattr(application, "POLL_SECONDS", 0.02)
    failures, totals = [], set()
    done = threading.Event()
    with client(index) as ask:

        def keep_asking():
            while not done.is_set():
                answer = ask.get("/search", params={"q": "red", "k": 50})
                if answer.status_code != 200 or len(keys(answer)) != answer.json()["total"]:
                    failures.append(answer.text)
                totals.add(answer.json()["total"])

        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(3):
            grow(index, f"red/new-{number}.png")
            deadline = time.monotonic() + 20
            while ask.get("/info").json()["count"] != 9 + number:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        done.set()
        for thread in threads:
            thread.join()
        assert ask.get("/thumb/red/new-2.png").status_code == 200
        text = ask.get("/metrics").text
    assert not failures
    assert totals <= {8, 9, 10, 11}
    assert {8, 11} <= totals or 11 in totals
    assert 'clipkit_reloads_total{outcome="done"} 3.0' in text
    assert "clipkit_index_images 11.0" in text


def test_a_request_keeps_to_the_state_it_began_with(index):
    encoder = ServedEncoder()
    with client(index, encoder=encoder) as ask:
        encoder.gate.clear()
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(ask.get("/search", params={"q": "red", "k": 50}))
        )
        thread.start()
        while not encoder.calls:
            time.sleep(0.01)
        grow(index)
        assert ask.served.refresh()
        encoder.gate.set()
        thread.join()
        assert answers[0].json()["total"] == len(keys(answers[0])) == 8
        assert ask.get("/search", params={"q": "red"}).json()["total"] == 9


def test_a_state_that_cannot_be_opened_leaves_the_old_one(index, capsys):
    with client(index) as ask:
        (index / "index.faiss").write_bytes(b"broken")
        manifest = index / MANIFEST
        manifest.write_text(manifest.read_text() + "\n")
        with pytest.raises(ArtifactError):
            ask.served.refresh()
        assert len(keys(ask.get("/search", params={"q": "red"}))) == 8
        manifest.unlink()
        assert not ask.served.refresh()
        grown = index.with_name("again")
        index.rename(grown)
        assert not ask.served.refresh()
        build_index(index.with_name("photos"), index, encoder=ServedEncoder())
        assert ask.served.refresh()
        assert not ask.served.refresh()


# Columns

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
        "back`quote": ["x"] * 4,
    }
)


def test_columns_are_found_with_what_they_hold():
    found = {column.name: column for column in describe_columns(with_folder(RECORDS))}
    assert {name: column.kind for name, column in found.items()} == {
        "label": "text",
        "year": "number",
        "rating": "number",
        "taken": "time",
        "kept": "boolean",
        "where it is": "text",
        "long": "text",
        "folder": "text",
    }
    assert found["label"].values == [("Catfish", 1), ("cat", 1), ("dog", 1)]
    assert found["kept"].values == [("false", 1), ("true", 2)]
    assert (found["year"].min, found["year"].max, found["year"].values) == ("2020", "2022", [])
    assert (found["taken"].min, found["taken"].max) == ("2020-03-01", "2022-03-01")
    assert found["folder"].values == [("", 1), ("a", 2), ("b", 1)]
    assert found["long"].values == []
    one_folder = with_folder(RECORDS.slice(0, 2))
    assert "folder" in one_folder.column_names  # a condition may name it all the same
    assert "folder" not in [column.name for column in describe_columns(one_folder)]


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
    assert _as_json(value) == plain


# The task


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host": "0.0.0.0"}, "other machines can reach 0.0.0.0, expected a --token"),
        ({"token": "x"}, "the token has 1 characters"),
        (
            {"host": "no.such.host.invalid", "token": "x" * 20},
            "cannot listen on no.such.host.invalid",
        ),
        ({"images": "nowhere"}, "is not a folder"),
    ],
)
def test_a_server_that_cannot_start_says_why(index, tmp_path, options, sentence):
    if "images" in options:
        options["images"] = tmp_path / options["images"]
    with pytest.raises(ServeError, match=sentence):
        serve(index, port=0, encoder=ServedEncoder(), cache=tmp_path / "thumbs", **options)
    with pytest.raises(ArtifactError, match="does not exist"):
        serve(tmp_path / "none", port=0, encoder=ServedEncoder())


def test_a_port_in_use_is_reported(index):
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1 port {port}"):
            serve(index, port=port, encoder=ServedEncoder())
