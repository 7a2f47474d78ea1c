"""`clipkit serve`, with a real network; that it starts as a process, the README's test shows."""

import json
import os
import re
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest

import clipkit
from clipkit.cli import main
from clipkit.tasks.index import build_index


def test_the_command_serves_until_it_is_interrupted(
    colour_folder, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    encoder = clipkit.load_model(tiny_checkpoint)
    index = build_index(colour_folder, tmp_path / "index", encoder=encoder)
    told = []

    def ask(stderr):
        """What a person sees and does in another window: two requests, then Ctrl-C in this one."""
        told.append(stderr.readline())
        found = re.search(r"12 images at (http://127\.0\.0\.1:\d+)/", told[0])
        if found is None:
            return None
        try:
            query = urlencode({"q": "a red picture", "minus": "blue"})
            with urlopen(f"{found[1]}/search?{query}", timeout=60) as answer:
                hits = json.load(answer)["hits"]
            with urlopen(f"{found[1]}/thumb/{hits[0]['key']}", timeout=60) as answer:
                return hits, answer.read()
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    words = ["clipkit", "serve", str(index.path), "--port", "0"]
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # which a command changes
    monkeypatch.setattr("sys.argv", [*words, "--cache", str(tmp_path / "thumbs")])
    reading, writing = os.pipe()
    with os.fdopen(reading) as stderr, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, stderr)
        with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            with pytest.raises(SystemExit) as end:
                main()
        assert asked.result() is not None, told
        hits, thumb = asked.result()
        assert stderr.read() == ""
    assert end.value.code == 130
    assert capsys.readouterr().out == ""
    red, blue = encoder.encode_text(["a red picture", "blue"])
    wanted = red - 0.5 * blue
    expected = encoder.encode_images(
        [clipkit.read_image(colour_folder / hit["key"]) for hit in hits]
    ) @ (wanted / np.linalg.norm(wanted))
    np.testing.assert_allclose([hit["score"] for hit in hits], expected, atol=1e-5)
    assert (np.diff(expected) <= 1e-6).all()
    assert thumb.startswith(b"\xff\xd8\xff")
