"""`clipkit serve` as a process, with a real network."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from urllib.parse import urlencode

import numpy as np

import clipkit
from clipkit.tasks.index import build_index


def test_the_command_serves_until_it_is_interrupted(colour_folder, tiny_checkpoint, tmp_path):
    encoder = clipkit.load(tiny_checkpoint)
    index = build_index(colour_folder, tmp_path / "index", load=lambda: encoder)
    words = [sys.executable, "-m", "clipkit", "serve", str(index.path), "--port", "0"]
    words += ["--cache", str(tmp_path / "thumbs")]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        found = re.search(r"12 pictures at (http://127\.0\.0\.1:\d+)/", server.stderr.readline())
        query = urlencode({"q": "a red picture", "minus": "blue"})
        with urllib.request.urlopen(f"{found[1]}/search?{query}") as answer:
            hits = json.load(answer)["hits"]
        red, blue = encoder.encode_captions(["a red picture", "blue"])
        wanted = red - 0.5 * blue
        expected = encoder.encode_images(
            [clipkit.read_image(colour_folder / hit["key"]) for hit in hits]
        ) @ (wanted / np.linalg.norm(wanted))
        np.testing.assert_allclose([hit["score"] for hit in hits], expected, atol=1e-5)
        assert (np.diff(expected) <= 1e-6).all()
        with urllib.request.urlopen(f"{found[1]}/thumb/{hits[0]['key']}") as answer:
            assert answer.read().startswith(b"\xff\xd8\xff")
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=20)
    assert (server.returncode, out) == (130, "")
    assert "Traceback" not in err
