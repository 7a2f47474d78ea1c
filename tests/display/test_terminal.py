"""Images in a terminal, read back from what is printed."""

import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from clipkit.cli.output import print_images
from clipkit.display.terminal import COLUMNS, ROWS, find_drawer, half_blocks
from clipkit.display.thumbnails import thumbnail
from clipkit.index.hits import Hit, Hits
from clipkit.index.roots import Root
from tests.helpers.toys import square


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_half_blocks_hold_two_pixels_each():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    lines = half_blocks(png(Image.fromarray(pixels))).splitlines()
    assert len(lines) == 4
    assert all(line.endswith("\x1b[0m") for line in lines)
    cells = [re.findall(r"\x1b\[38;2;([\d;]+);48;2;([\d;]+)m▀", line) for line in lines]
    numbers = np.array([[[half.split(";") for half in cell] for cell in line] for line in cells])
    numbers = numbers.astype(int)
    assert np.array_equal(numbers[:, :, 0], pixels[::2])
    assert np.array_equal(numbers[:3, :, 1], pixels[1::2])
    assert np.array_equal(numbers[3, :, 1], pixels[6])  # nothing lies below the last row


def test_large_images_are_made_to_fit():
    lines = half_blocks(png(Image.new("RGB", (640, 320), "red"))).splitlines()
    assert len(lines) == ROWS // 2
    assert all(line.count("▀") == COLUMNS for line in lines)


def test_kitty_gets_the_image_in_parts():
    pixels = np.random.default_rng(0).integers(0, 256, (100, 80, 3), np.uint8)
    text = find_drawer({"KITTY_WINDOW_ID": "1"})(png(Image.fromarray(pixels)))
    parts = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", text)
    assert len(parts) > 1
    assert all(len(data) <= 4096 for _, data in parts)
    assert parts[0][0].startswith("a=T,f=100,q=2,c=26,r=16,m=1")
    assert [head for head, _ in parts[1:]] == ["m=1"] * (len(parts) - 2) + ["m=0"]
    file = base64.b64decode("".join(data for _, data in parts))
    with Image.open(io.BytesIO(file)) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_iterm_gets_the_file():
    file = png(square("blue"))
    text = find_drawer({"TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"})(file)
    head, data = text.removesuffix("\a\n").split(":")
    assert head.startswith(f"\x1b]1337;File=inline=1;size={len(file)};")
    assert base64.b64decode(data) == file


def test_a_terminal_that_says_nothing_gets_nothing():
    assert find_drawer({"TERM": "xterm"}) is None
    assert find_drawer({"TERM": "xterm", "COLORTERM": "24bit"}) is half_blocks


@pytest.fixture
def hits(tmp_path):
    square("red").save(tmp_path / "red.png")
    found = [Hit("red.png", 0.5), Hit("gone\x1b[2J.png", 0.4)]
    return Hits(found, "red", [Root("", str(tmp_path), True)])


def test_hits_are_shown_under_their_keys(hits, monkeypatch, capsys):
    monkeypatch.setenv("COLORTERM", "truecolor")
    for name in ("KITTY_WINDOW_ID", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_images(hits)
    out = capsys.readouterr().out
    wanted = half_blocks(thumbnail(square("red")))
    assert f"   1  red.png\n{wanted}" in out
    assert "   2  gone" in out
    assert "\x1b[2J" not in out
    assert out.endswith("      the image cannot be read\n")


def test_a_pipe_gets_no_images(hits, monkeypatch, capsys):
    monkeypatch.setenv("COLORTERM", "truecolor")
    print_images(hits)
    told = capsys.readouterr()
    assert told.out == ""
    assert "--html" in told.err
