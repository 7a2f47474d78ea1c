"""Images in a terminal, by its graphics protocol or as coloured half blocks."""

import base64
import io
from collections.abc import Callable, Mapping

from PIL import Image

COLUMNS, ROWS = 32, 16
"""Size limit of an image in cells; a cell is about twice as high as wide."""
_CHUNK = 4096  # characters of data per command, the limit of kitty's protocol

Drawer = Callable[[bytes], str]


def find_drawer(environment: Mapping[str, str]) -> Drawer | None:
    """The function that turns an image file into text which the terminal shows as the image.

    Args:
        environment: the environment variables, by which terminals identify themselves.

    Returns:
        None if the terminal announces neither a graphics protocol nor 24-bit colours.
    """
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or program == "ghostty":
        return _kitty
    if program in ("iTerm.app", "WezTerm"):
        return _inline
    if environment.get("COLORTERM", "") in ("truecolor", "24bit"):
        return half_blocks
    return None


def half_blocks(image: bytes) -> str:
    """Lines of upper half blocks; each has the colours of two pixels, one above the other."""
    with Image.open(io.BytesIO(image)) as opened:
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


def _inline(image: bytes) -> str:
    """iTerm2's protocol, "Inline Images": the file as it is."""
    data = base64.b64encode(image).decode()
    place = f"inline=1;size={len(image)};width={COLUMNS};height={ROWS};preserveAspectRatio=1"
    return f"\x1b]1337;File={place}:{data}\a\n"


def _kitty(image: bytes) -> str:
    """Kitty's graphics protocol, "Transferring pixel data": a PNG in parts."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
        opened.save(stream, "PNG")
    # The terminal stretches an image to the given cells.
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
