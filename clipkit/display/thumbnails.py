"""Small JPEGs of images, alone and together on a contact sheet."""

import io
from collections.abc import Sequence
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels
_ACROSS, _GAP, _LINE = 8, 6, 26


def thumbnail(image: Image.Image, side: int = SIDE) -> bytes:
    """An RGB image as JPEG, at most ``side`` pixels wide and high."""
    small = image.copy()
    small.thumbnail((side, side), reducing_gap=2)
    return encode_jpeg(small)


def encode_jpeg(image: Image.Image) -> bytes:
    """An RGB image as JPEG, without the metadata of its file."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def contact_sheet(images: Sequence[tuple[str, bytes]]) -> Image.Image:
    """One image of many, those of one name together under it.

    Args:
        images: name and JPEG of each, sorted by name.
    """
    groups = [(name, list(part)) for name, part in groupby(images, key=lambda one: one[0])]
    cell = SIDE + _GAP
    height = sum(_LINE + -(-len(part) // _ACROSS) * cell for _, part in groups) + _GAP
    sheet = Image.new("RGB", (_ACROSS * cell + _GAP, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    top = 0
    for name, part in groups:
        draw.text((_GAP, top + 5), f"{name} ({len(part)})", fill="black", font=font)
        top += _LINE
        for place, (_, data) in enumerate(part):
            with Image.open(io.BytesIO(data)) as small:
                left = _GAP + place % _ACROSS * cell + (SIDE - small.width) // 2
                down = top + place // _ACROSS * cell + (SIDE - small.height) // 2
                sheet.paste(small, (left, down))
        top += -(-len(part) // _ACROSS) * cell
    return sheet
