"""A newer state of the index takes over without a request being lost."""

import threading
import time

import pytest

from clipkit.artifacts import MANIFEST
from clipkit.errors import ArtifactError, ServeError
from clipkit.tasks.index import build_index
from clipkit.tasks.serve import serve
from clipkit.tasks.sync import sync_index
from clipkit.web import app as application
from clipkit.web import server
from tests.helpers.toys import square
from tests.helpers.web_toys import ServedEncoder, build, client, keys


@pytest.fixture
def index(tmp_path):
    return build(tmp_path, per_colour=1)


def grow(index, name="red/new.png"):
    square("red").save(index.with_name("photos") / name)
    assert sync_index(index, encoder=ServedEncoder()).added == 1


def test_a_changed_index_takes_over_while_it_is_asked(index, monkeypatch):
    monkeypatch.setattr(application, "POLL_SECONDS", 0.02)
    failures, totals = [], set()
    done = threading.Event()
    with client(index) as ask:

        def keep_asking():
            while not done.is_set():
                answer = ask.get("/search", params={"q": "red", "limit": 50})
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
    assert "clipkit_index_pictures 11.0" in text


def test_a_request_keeps_to_the_state_it_began_with(index):
    encoder = ServedEncoder()
    with client(index, encoder=encoder) as ask:
        encoder.gate.clear()
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(ask.get("/search", params={"q": "red", "limit": 50}))
        )
        thread.start()
        while not encoder.calls:
            time.sleep(0.01)
        grow(index)
        assert ask.current.refresh()
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
            ask.current.refresh()
        assert len(keys(ask.get("/search", params={"q": "red"}))) == 8
        manifest.unlink()
        assert not ask.current.refresh()
        grown = index.with_name("again")
        index.rename(grown)
        assert not ask.current.refresh()
        build_index(index.with_name("photos"), index, load=ServedEncoder)
        assert ask.current.refresh()
        assert not ask.current.refresh()


# The task and the command


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines, expected a --token"),
        ({"token": "x"}, "the token has 1 characters"),
        ({"host": "no.such.host.invalid", "token": "x" * 20}, "cannot be listened on"),
        ({"images": "nowhere"}, "is no folder"),
    ],
)
def test_a_server_that_cannot_start_says_why(index, tmp_path, options, sentence):
    if "images" in options:
        options["images"] = tmp_path / options["images"]
    with pytest.raises(ServeError, match=sentence):
        serve(index, port=0, encoder=ServedEncoder(), cache=tmp_path / "thumbs", **options)
    with pytest.raises(ArtifactError, match="does not exist"):
        serve(tmp_path / "none", port=0, encoder=ServedEncoder())


def test_a_port_that_is_taken_is_told(index):
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1 port {port} cannot be listened on"):
            serve(index, port=port, encoder=ServedEncoder())
