"""Pictures in a terminal: whole where it has a protocol for them, else as coloured half blocks."""

import base64
import io
from collections.abc import Callable, Mapping

from PIL import Image

COLUMNS, ROWS = 32, 16
"""The most cells that a picture takes. A cell is about twice as high as wide."""
_CHUNK = 4096  # the most letters of a picture in one of kitty's commands

Drawer = Callable[[bytes], str]


def find_drawer(environment: Mapping[str, str]) -> Drawer | None:
    """What turns a picture's file into text that a terminal shows as the picture.

    Args:
        environment: the variables by which terminals say what they are.

    Returns:
        None where the terminal says neither that it shows pictures nor 24-bit colours.
    """
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or program == "ghostty":
        return _kitty
    if program in ("iTerm.app", "WezTerm"):
        return _inline
    if environment.get("COLORTERM", "") in ("truecolor", "24bit"):
        return half_blocks
    return None


def half_blocks(picture: bytes) -> str:
    """Lines of upper half blocks, each with the colours of two pixels, one above the other."""
    with Image.open(io.BytesIO(picture)) as opened:
        small = opened.convert("RGB")
    small.thumbnail((COLUMNS, 2 * ROWS))
    pixels, (width, height) = small.load(), small.size
    assert pixels is not None
    lines = []
    for y in range(0, height, 2):
        cells = []
        for x in range(width):
            above, below = pixels[x, y], pixels[x, min(y + 1, height - 1)]
            cells.append(f"\x1b[38;2;{_numbers(above)};48;2;{_numbers(below)}m▀")
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def _numbers(colour: object) -> str:
    return ";".join(map(str, colour)) if isinstance(colour, tuple) else str(colour)


def _inline(picture: bytes) -> str:
    """iTerm2's protocol, "Inline Images": the file as it is."""
    data = base64.b64encode(picture).decode()
    place = f"inline=1;size={len(picture)};width={COLUMNS};height={ROWS};preserveAspectRatio=1"
    return f"\x1b]1337;File={place}:{data}\a\n"


def _kitty(picture: bytes) -> str:
    """Kitty's graphics protocol, "Transferring pixel data": a PNG in parts."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as opened:
        width, height = opened.size
        opened.save(stream, "PNG")
    # The terminal stretches a picture to the cells it is given.
    rows = max(1, min(ROWS, round(COLUMNS / 2 * height / width)))
    columns = max(1, min(COLUMNS, round(2 * rows * width / height)))
    data = base64.b64encode(stream.getvalue()).decode()
    parts = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    head = f"a=T,f=100,q=2,c={columns},r={rows},"
    commands = [
        f"\x1b_G{'' if number else head}m={int(number + 1 < len(parts))};{part}\x1b\\"
        for number, part in enumerate(parts)
    ]
    return "".join(commands) + "\n"
