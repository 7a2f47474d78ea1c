"""Find the image files below a directory, read an image safely, and hash the content of a file.

Every problem with a file is an ``ImageError`` with a short reason, so that callers can skip the
image and report why.
"""

import ctypes
import io
import logging
import os
import re
import stat
import sys
import threading
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
from PIL import Image, UnidentifiedImageError, _imaging

from clipkit.errors import DataError, ImageError

Decode = Literal["exact", "fast"]
"""How to read images: "exact" as Pillow and open_clip do, "fast" at a sufficient size."""
Reduction = Callable[[int, int], int]
"""Maps width and height to the factor, 1, 2, 4 or 8, by which an image may be reduced."""

_NAMES = ["jpg", "jpeg", "jfif", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm", "pgm"]
_NAMES += ["avif", "jp2", "heic", "heif", "hif"]
SUFFIXES = frozenset(f".{name}" for name in _NAMES)
JUNK = frozenset({"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"})
"""Files and folders of file managers, in lower case; like hidden files, they are ignored."""
MAX_PIXELS = 178_956_970  # twice Pillow's warning level, where Pillow raises an error
MAX_ASPECT = 100

_CHUNK = 1 << 20  # bytes read at a time

# An allowlist for safety: Pillow's EPS reader, for example, runs Ghostscript on the file.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO", "HEIF")
# Brands of AV1-coded files (AVIF 1.1, section 6), and of HEVC-coded ones (ISO/IEC 23008-12,
# annex B) if no AVIF brand is listed too.
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
    """An item that is skipped, wholly or in part, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The files below a directory, as sorted keys: POSIX paths relative to it.

    Attributes:
        images: those with the suffix of an image.
        others: all other files, without hidden ones and those of file managers.
        skipped: images and folders that cannot be read.
    """

    images: list[str]
    others: list[str]
    skipped: list[Skipped]


def find_images(root: str | Path) -> tuple[list[str], list[Skipped]]:
    """List the images below ``root`` by their suffix, without opening them.

    Symbolic links are followed, but each directory is listed only once. Hidden files and those of
    file managers (``__MACOSX``, ``@eaDir``, …) are ignored.

    Returns:
        The sorted keys (POSIX paths relative to ``root``), and the skipped items.

    Raises:
        DataError: ``root`` is not a directory.
    """
    found = list_files(Path(root))
    return found.images, found.skipped


def list_files(root: Path) -> Listing:
    """List all files below ``root``, as ``find_images`` does; raises DataError likewise."""
    if not root.is_dir():
        raise DataError(f"{printable(root)} is not a directory, expected a folder of images")
    images: list[str] = []
    others: list[str] = []
    skipped: list[Skipped] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [""], deque[str]()
    while folders or links:
        # Linked directories come last, so that an image gets the key of its real path.
        folder = folders.pop() if folders else links.popleft()
        try:
            entries = _list_once(root, folder, seen)
        except OSError as error:
            skipped.append(Skipped(printable(folder), f"cannot be listed: {_why(error)}"))
            continue
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            is_image = os.path.splitext(entry.name)[1].lower() in SUFFIXES
            is_folder = os.path.isdir(entry)
            if is_folder:
                (links if entry.is_symlink() else folders).append(key)
            if reason := _refusal(entry) if is_image else None:
                skipped.append(Skipped(printable(key), reason))
            elif is_image:
                images.append(key)
            elif not is_folder:
                others.append(key)
    return Listing(sorted(images), sorted(others), sorted(skipped, key=lambda item: item.key))


def is_image(file: Path) -> bool:
    """Whether a file is an image by its content, of which only the beginning is read."""
    try:
        with open_regular(file) as stream, _identified(stream):
            return True
    except Exception:  # as in read_image
        return False


def is_junk(path: str) -> bool:
    """Whether a POSIX path is hidden (``._a.jpg``) or that of a file manager's own file."""
    return any(
        (part[:1] == "." and part not in (".", "..")) or part.lower() in JUNK
        for part in path.split("/")
    )


def _list_once(root: Path, folder: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    path = root / folder
    status = path.stat()
    if (status.st_dev, status.st_ino) in seen:
        raise OSError("a link to a directory that is already listed")
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(path) as entries:
        shown = [entry for entry in entries if not is_junk(entry.name)]
    return sorted(shown, key=lambda entry: entry.name)


def _refusal(entry: os.DirEntry[str]) -> str | None:
    if os.path.isdir(entry):
        return "is a directory, not an image; its contents are read"
    if not is_utf8(entry.path):
        return "its name is not UTF-8; rename it"
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return f"cannot be opened: {_why(error)}"
    return None if stat.S_ISREG(mode) else "is not a regular file"


def is_utf8(text: str | os.PathLike[str]) -> bool:
    """Whether a path or text is free of undecodable bytes (lone surrogates)."""
    try:
        os.fspath(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str | os.PathLike[str]) -> str:
    r"""A path or text with undecodable bytes shown as ``\xe9``, safe to print and to store."""
    return os.fspath(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def largest_reduction(spare: float) -> int:
    """The largest factor for a ``Reduction`` that is at most ``spare``."""
    return next((number for number in (8, 4, 2) if number <= spare), 1)


def read_image(source: str | Path | bytes, reduction: Reduction | None = None) -> Image.Image:
    """Read one image as 8-bit RGB, upright and fully loaded.

    Applies the EXIF orientation, composites transparency over white, scales 16 bits to 8, and takes
    the first frame of an animation. Thread-safe.

    Args:
        source: the path of a file, or its content.
        reduction: gives the factor by which the image may be reduced; None reads it in full. A JPEG
            is decoded at the reduced size, by the scaled inverse transform of its 8 x 8 blocks, in
            a fraction of the time. For other formats, blocks of pixels are averaged.

    Raises:
        ImageError: the image is empty, truncated, damaged, unreadable or of an unknown format, has
            more than 178 million pixels, or one side over 100 times the other. The message is only
            the reason, without the file name.
        TypeError: ``source`` is neither a path nor bytes.
    """
    if not isinstance(source, str | Path | bytes):
        raise TypeError(f"source is a {type(source).__name__}, expected a path or bytes")
    # The filter stays: removing it would race with other threads.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    said = _libtiff.said = []
    try:
        with open_regular(source) as stream, _identified(stream) as image:
            _check_size(*image.size)
            factor = _factor(image.size, reduction) if reduction else 1
            smaller = factor > 1 and _draft(image, factor)
            image.load()
            rgb = _to_rgb(_upright(image))
            return rgb if smaller or factor == 1 else rgb.reduce(factor)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ImageError(_too_large("it")) from None
    # On damaged data decoders raise almost anything: OSError, SyntaxError, struct.error, …
    except Exception as error:
        more = f" (libtiff: {said[0]})" if said else ""
        raise ImageError(f"is damaged or truncated: {_why(error)}{more}") from None
    finally:
        _libtiff.said = None


def open_regular(source: str | Path | bytes) -> AbstractContextManager[BinaryIO]:
    """Open a regular, non-empty file, or its content, as a stream.

    Raises:
        ImageError: the file is empty, not a regular file, or cannot be opened. The message is only
            the reason.
    """
    if isinstance(source, bytes):
        stream: BinaryIO = io.BytesIO(source)
        size = len(source)
    else:
        try:
            path = Path(source)
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise ImageError("is a directory, not an image")
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("is not a regular file")
            stream = path.open("rb")
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
    """The reason why no reader supports a file with these first bytes."""
    end = min(int.from_bytes(head[:4]), len(head)) if head[4:8] == b"ftyp" else 0
    brands = {head[at : at + 4] for at in (8, *range(16, end, 4))}
    if brands & _AVIF:
        if "AVIF" not in _formats():
            return "is an AVIF image, which needs Pillow 11.3 or newer; upgrade Pillow"
    elif brands & _HEIC and "HEIF" not in _formats():
        return "is a HEIC image, which needs pillow-heif; pip install 'clipkit[heif]'"
    return "is not an image of a known format"


class _LibtiffErrors(threading.local):
    """What libtiff has said in this thread; None outside ``read_image``."""

    said: list[str] | None = None


_libtiff = _LibtiffErrors()


def _take_libtiff_error(module: bytes | None, template: bytes, arguments: int) -> None:
    """Keep an error of libtiff for ``read_image``; other callers get it on stderr, as before."""
    buffer = ctypes.create_string_buffer(200)
    form = (ctypes.c_size_t(len(buffer)), ctypes.c_char_p(template), ctypes.c_void_p(arguments))
    ctypes.CDLL(None).vsnprintf(buffer, *form)
    text = buffer.value.decode(errors="replace").rstrip(".")
    if _libtiff.said is not None:
        _libtiff.said.append(text)
    else:
        print(f"{(module or b'libtiff').decode(errors='replace')}: {text}.", file=sys.stderr)


# The last argument is a va_list, which these platforms pass as one pointer.
_LIBTIFF_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(
    _take_libtiff_error
)


def _catch_messages() -> None:
    """Keep messages of decoders off stderr, where they would tear a progress bar apart.

    Of the libraries that Pillow decodes with, only libtiff prints errors. Its functions are found
    through Pillow's extension module, which is linked to it. Pillow itself logs a few errors, which
    Python prints if logging is not set up.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(OSError, AttributeError):  # a Pillow without libtiff
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(_LIBTIFF_HANDLER)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    _catch_messages()
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
    # The orientation is known only after loading, so the image may be on its side.
    return min(reduction(*size), reduction(*size[::-1]))


def _draft(image: Image.Image, factor: int) -> bool:
    """Set up a JPEG to be decoded at 1 / ``factor`` of its size; False for other formats."""
    size = (max(1, image.width // factor), max(1, image.height // factor))
    return image.draft(None, size) is not None


def _too_large(size: str) -> str:
    return f"is too large: {size} has more than {MAX_PIXELS // 10**6} million pixels"


def _upright(image: Image.Image) -> Image.Image:
    # Only after load(): a PNG may store EXIF after the pixels, and Pillow rotates TIFFs itself.
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF but intact pixels: leave the orientation as it is
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("has float pixels of unknown range; save it with 8 or 16 bits per channel")
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


def content_hash(source: str | Path | bytes) -> str:
    """The 128-bit XXH3 hash of a file or its content, as 32 hexadecimal digits.

    It takes 0.2 ms for the JPEG of a 12-megapixel photo; SHA-256 takes 2 ms. The hash is not
    cryptographic: the only effect of a forged collision is that the second file gets the vector of
    the first.

    Raises:
        ImageError: the file is empty, not a regular file, or cannot be read. The message is only
            the reason.
    """
    digest = xxhash.xxh3_128()
    with open_regular(source) as stream:
        try:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
