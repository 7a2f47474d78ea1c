"""A served index whose scores can be computed in the head, and clients for it."""

import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from starlette.testclient import TestClient

from clipkit.tasks.index import build_index
from clipkit.web.app import create_app
from clipkit.web.collection import ServedIndex
from clipkit.web.images import ThumbnailCache
from clipkit.web.server import server
from tests.helpers.toys import ColourEncoder, _colour_words, write_squares

ADDRESS = "http://127.0.0.1"


class ServedEncoder(ColourEncoder):
    """The toy encoder as a server uses it; words without a colour mean white.

    ``calls`` holds the captions of each call. While ``gate`` is closed, calls wait.
    """

    logit_scale = 10.0

    def __init__(self, name: str = "colours") -> None:
        super().__init__(name)
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode_text(self, captions, *, policy="cut", report=None):
        self.calls.append(list(captions))
        assert self.gate.wait(60)
        plain = [text if _colour_words(text) else "white" for text in captions]
        return super().encode_text(plain)


def build(folder: Path, per_colour: int = 3) -> Path:
    """An index of squares: folder/photos and folder/index."""
    write_squares(folder / "photos", per_colour)
    build_index(folder / "photos", folder / "index", encoder=ServedEncoder())
    return folder / "index"


def application(index: Path, *, encoder=None, cache=None, images=None, **options):
    """The application of an index, and the index that it serves."""
    served = ServedIndex(index, images, encoder or ServedEncoder())
    thumbs = ThumbnailCache(cache or index.with_name("thumbs"))
    options.setdefault("hosts", ["127.0.0.1"])
    return create_app(served, thumbs, **options), served


@contextmanager
def client(index: Path, **options):
    """A client of the application, in this process."""
    app, served = application(index, **options)
    with TestClient(app, base_url=ADDRESS) as asking:
        asking.served = served
        yield asking


@contextmanager
def running(app):
    """A real server of an application; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = server(app)
        thread = threading.Thread(target=one.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not one.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
        one.should_exit = True
        thread.join(10)


def keys(answer) -> list[str]:
    """The keys of an answer's hits."""
    assert answer.status_code == 200, answer.text
    return [hit["key"] for hit in answer.json()["hits"]]


def scores(answer) -> np.ndarray:
    """The scores of an answer's hits."""
    return np.array([hit["score"] for hit in answer.json()["hits"]])
