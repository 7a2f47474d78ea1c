"""Find images below a directory, and read one safely, whatever its file holds.

What a file holds, as a number by which it is found again under another name.
"""

import io
import os
import re
import stat
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import xxhash
from PIL import Image, UnidentifiedImageError

from clipkit.errors import DataError, ImageError

_NAMES = ["jpg", "jpeg", "jfif", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm", "pgm"]
_NAMES += ["avif", "jp2", "heic", "heif", "hif"]
SUFFIXES = frozenset(f".{name}" for name in _NAMES)
MAX_PIXELS = 178_956_970  # twice Pillow's own warning level: where Pillow too refuses
MAX_ASPECT = 100

# Closed on purpose: Pillow's EPS reader, for one, starts Ghostscript on what it is given.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO", "HEIF")
# Brands of files that hold pictures coded as AV1 (AVIF 1.1, section 6) and, where none of those
# stands beside them, as HEVC (ISO/IEC 23008-12, annex B).
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_ORIENTATION = 0x0112  # EXIF 2.32, table 4
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Skipped:
    """One item that is left out (or a part of it), and why."""

    key: str
    reason: str


def find_images(root: Path) -> tuple[list[str], list[Skipped]]:
    """List the images below ``root`` by their suffix, without opening any.

    Links are followed, each directory is listed once; names that start with a dot are ignored.

    Returns:
        The keys (POSIX paths relative to ``root``), sorted, and what was left out.

    Raises:
        DataError: ``root`` is no directory.
    """
    if not root.is_dir():
        raise DataError(f"{printable(root)} is no directory, expected a folder of images")
    keys: list[str] = []
    skipped: list[Skipped] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [""], deque[str]()
    while folders or links:
        # Linked directories come last, so that an image keeps the key of its real place.
        folder = folders.pop() if folders else links.popleft()
        try:
            entries = _list_once(root, folder, seen)
        except OSError as error:
            skipped.append(Skipped(printable(folder), f"cannot be listed: {_why(error)}"))
            continue
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            is_image = os.path.splitext(entry.name)[1].lower() in SUFFIXES
            if os.path.isdir(entry):
                (links if entry.is_symlink() else folders).append(key)
            if reason := _refusal(entry) if is_image else None:
                skipped.append(Skipped(printable(key), reason))
            elif is_image:
                keys.append(key)
    return sorted(keys), sorted(skipped, key=lambda item: item.key)


def _list_once(root: Path, folder: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    path = root / folder
    status = path.stat()
    if (status.st_dev, status.st_ino) in seen:
        raise OSError("a link to a directory that is listed already")
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(path) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: entry.name)


def _refusal(entry: os.DirEntry[str]) -> str | None:
    if os.path.isdir(entry):
        return "is a directory, not an image; what is in it is read"
    if not is_utf8(entry.path):
        return "its name is not UTF-8; rename it"
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return f"cannot be opened: {_why(error)}"
    return None if stat.S_ISREG(mode) else "is no regular file"


def is_utf8(text: str | os.PathLike[str]) -> bool:
    """Whether a path or text holds no undecodable bytes (lone surrogates)."""
    try:
        os.fspath(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str | os.PathLike[str]) -> str:
    r"""A path or text with undecodable bytes shown as ``\xe9``, safe to print and to store."""
    return os.fspath(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


Decode = Literal["exact", "fast"]
"""How pictures are read: as Pillow and open_clip do, or at the size that is enough."""
Reduction = Callable[[int, int], int]
"""From width and height to the whole number, 1, 2, 4 or 8, that a picture may be divided by."""


def largest_reduction(spare: float) -> int:
    """The largest such number that is at most ``spare``."""
    return next((number for number in (8, 4, 2) if number <= spare), 1)


def read_image(source: Path | bytes, reduction: Reduction | None = None) -> Image.Image:
    """Read one image as an 8-bit RGB picture, upright, fully loaded.

    The EXIF orientation is applied; transparency lies on white; 16 bits are scaled to 8; of an
    animation the first frame is taken. Safe to call from several threads at a time.

    Args:
        source: a file or its content.
        reduction: how much smaller the picture may be; None: not at all. A JPEG is decoded at the
            smaller size, by the scaled inverse transform of its 8 x 8 blocks, which takes a
            fraction of the time; of other pictures blocks of pixels are averaged.

    Raises:
        ImageError: empty, truncated, damaged, not an image, longer than 100 times its width,
            above 178 million pixels, or not readable; the message is the reason alone.
    """
    # Kept in place once set: taking a filter out again would race with other threads.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    try:
        with open_regular(source) as stream, _identified(stream) as image:
            _check_size(*image.size)
            factor = _factor(image.size, reduction) if reduction else 1
            smaller = factor > 1 and _draft(image, factor)
            image.load()
            picture = _to_rgb(_upright(image))
            return picture if smaller or factor == 1 else picture.reduce(factor)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ImageError(_too_large("it")) from None
    # Damaged bytes make decoders raise nearly anything: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise ImageError(f"is damaged or truncated: {_why(error)}") from None


def open_regular(source: Path | bytes) -> AbstractContextManager[BinaryIO]:
    """A regular file that is not empty, or its content, as a stream.

    Raises:
        ImageError: it is something else, or cannot be opened; the message is the reason alone.
    """
    if isinstance(source, bytes):
        stream: BinaryIO = io.BytesIO(source)
        size = len(source)
    else:
        try:
            status = source.stat()
            if stat.S_ISDIR(status.st_mode):
                raise ImageError("is a directory, not an image")
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("is no regular file")
            stream = source.open("rb")
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot be opened: {_why(error)}") from None
        size = status.st_size
    if not size:
        stream.close()
        raise ImageError("is empty (0 bytes)")
    return stream


def _identified(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=_formats())
    except UnidentifiedImageError:
        stream.seek(0)
        raise ImageError(_unknown(stream.read(64))) from None


def _unknown(head: bytes) -> str:
    """Why no reader takes a file that begins so."""
    end = min(int.from_bytes(head[:4]), len(head)) if head[4:8] == b"ftyp" else 0
    brands = {head[at : at + 4] for at in (8, *range(16, end, 4))}
    if brands & _AVIF:
        if "AVIF" not in _formats():
            return "is an AVIF picture, which Pillow reads from version 11.3 on; upgrade Pillow"
    elif brands & _HEIC and "HEIF" not in _formats():
        return "is a HEIC picture, which takes pillow-heif; pip install 'clipkit[heif]'"
    return "is not an image of a known format"


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(f"{width} x {height}"))
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"is {width} x {height}, a side is over {MAX_ASPECT} times the other")


def _factor(size: tuple[int, int], reduction: Reduction) -> int:
    # Whether it lies on its side is known only once it is loaded.
    return min(reduction(*size), reduction(*size[::-1]))


def _draft(image: Image.Image, factor: int) -> bool:
    """Have a JPEG decoded at 1 / ``factor`` of its size; False for another format."""
    size = (max(1, image.width // factor), max(1, image.height // factor))
    return image.draft(None, size) is not None


def _too_large(size: str) -> str:
    return f"is too large: {size} has more than {MAX_PIXELS // 10**6} million pixels"


def _upright(image: Image.Image) -> Image.Image:
    # Only after load(): a PNG may hold its EXIF behind the pixels, and Pillow turns TIFFs itself.
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # good pixels beside damaged EXIF: read them as they lie
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("has float pixels without a known white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        high_byte = np.clip(np.asarray(image), 0, 65535) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _why(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text or type(error).__name__
    return text[:1].lower() + text[1:]


_CHUNK = 1 << 20  # bytes read at a time


def content_hash(source: Path | bytes) -> str:
    """XXH3 of a file or its content: 128 bits as 32 hexadecimal digits.

    It takes 0.2 ms for the JPEG of a 12-megapixel photo, where SHA-256 takes 2. Someone who forges
    two files with one hash gains that the second is found by the vector of the first.

    Raises:
        ImageError: the file is empty, irregular or cannot be read; the message is the reason alone.
    """
    digest = xxhash.xxh3_128()
    with open_regular(source) as stream:
        try:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
