"""Pictures as bytes: what a browser takes as it is, and small JPEGs of what it does not."""

from io import BytesIO

from PIL import Image

from clipkit.data.images import read_image

EDGE = 360
"""Longest side of a thumbnail in pixels: twice a tile of the page, for sharp screens."""
QUALITY = 82
_STARTS = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
}


def media_type(data: bytes) -> str | None:
    """The media type of a picture that every browser shows, by its first bytes; None for others.

    Never by its name: a page that calls itself ``a.jpg`` is none of these.
    """
    for start, kind in _STARTS.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/avif" if data[4:12] in (b"ftypavif", b"ftypavis") else None


def as_jpeg(picture: Image.Image) -> bytes:
    """An RGB picture as a JPEG, without anything that stood beside its pixels."""
    stream = BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of a picture file's content; raises ImageError where it cannot be read."""
    return as_jpeg(shrink(read_image(data, lambda width, height: _spare(max(width, height)))))


def shrink(picture: Image.Image) -> Image.Image:
    """A picture of at most ``EDGE`` pixels a side."""
    picture = picture.copy()
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    return picture


def _spare(longest: int) -> int:
    # Decoded at twice the size at least, so that the rest of the way down is smooth.
    return next((n for n in (8, 4, 2) if longest >= 2 * EDGE * n), 1)
