"""Work that takes a while, beside the event loop and a bounded number at a time.

ThumbCache: thumbnails on disk, made once, in a directory that never outgrows its bound.

Pictures as bytes: what a browser takes as it is, and small JPEGs of what it does not.

Pictures that people hand in: bounded, never written to disk, forgotten after a while.

Pictures of an index that lie inside tables and tars, and are what was indexed.

The picture files of an index, and no other file of the machine.
"""

import asyncio
import hashlib
import os
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from PIL import Image

from clipkit.data.formats.huggingface import HUB
from clipkit.data.images import Reduction, content_hash, read_image
from clipkit.errors import DataError, ImageError
from clipkit.index.hits import InsidePictures
from clipkit.index.roots import Root, file_of, owner
from clipkit.web.batching import Vector
from clipkit.web.security import RequestError

LIMIT = 500_000_000
"""Bytes of all thumbnails together: about 25,000 of them."""
_SUFFIX = ".jpg"


class ThumbCache:
    """Keeps what was made for a name; what was not asked for longest goes first.

    A directory that cannot be written to is no error: then each is made anew. Safe to use from
    several threads.

    Args:
        folder: where the files lie, made if need be, for its owner's eyes only.
        limit: most bytes to keep.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self.used = 0
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for file in sorted(folder.glob(f"*{_SUFFIX}"), key=lambda f: f.stat().st_mtime_ns):
                self._sizes[file.name] = file.stat().st_size
        self.used = sum(self._sizes.values())

    def find(self, name: str) -> bytes | None:
        """What is kept for a name."""
        file = self._file(name)
        try:
            data = file.read_bytes()
        except OSError:
            return None
        with self._lock:
            if file.name in self._sizes:
                self._sizes.move_to_end(file.name)
        return data

    def keep(self, name: str, data: bytes) -> None:
        """Keep something for a name, if the disk lets us."""
        if len(data) <= self.limit:
            with suppress(OSError):
                self._write(self._file(name), data)

    def _file(self, name: str) -> Path:
        # A digest, so that no key can name a place outside of the directory.
        return self.folder / (hashlib.sha256(name.encode()).hexdigest() + _SUFFIX)

    def _write(self, file: Path, data: bytes) -> None:
        number, temp = tempfile.mkstemp(prefix=".new-", dir=self.folder)
        try:
            with os.fdopen(number, "wb") as stream:
                stream.write(data)
            os.replace(temp, file)
        except BaseException:
            os.unlink(temp)
            raise
        with self._lock:
            self.used += len(data) - self._sizes.pop(file.name, 0)
            self._sizes[file.name] = len(data)
            while self.used > self.limit:
                oldest, size = self._sizes.popitem(last=False)
                self.used -= size
                (self.folder / oldest).unlink(missing_ok=True)


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


MAX_PIXELS = 50_000_000
"""More than most cameras make; decoded it takes 150 MB, and two are decoded at a time."""
KEPT = 64
"""Pictures remembered, so that paging and going back need not send them again."""


@dataclass(frozen=True)
class Upload:
    """A picture handed in, as far as it is remembered.

    Attributes:
        vector: of the picture as it came.
        model: fingerprint of the model that encoded it.
        jpeg: a thumbnail of it.
    """

    vector: Vector
    model: str
    jpeg: bytes


class _TooManyError(ImageError):
    """More pixels than are read."""


def read_upload(data: bytes, reduction: Reduction | None = None) -> tuple[Image.Image, bytes]:
    """The picture that was handed in, and a thumbnail of it, a JPEG.

    Args:
        data: a picture file's content.
        reduction: how much smaller it may be read; None: not at all.

    Raises:
        RequestError: it is no picture that can be read (415), or has too many pixels (413).
    """

    def checked(width: int, height: int) -> int:
        """Told the size before any pixel is decoded, which is when to refuse."""
        if width * height > MAX_PIXELS:
            raise _TooManyError(
                f"has {width} x {height} pixels, at most {MAX_PIXELS // 10**6} million are read; "
                "make it smaller"
            )
        return reduction(width, height) if reduction else 1

    try:
        picture = read_image(data, checked)
    except ImageError as error:
        status = 413 if isinstance(error, _TooManyError) else 415
        raise RequestError(status, f"the picture cannot be searched with, it {error}") from None
    return picture, as_jpeg(shrink(picture))


class Uploads:
    """The last pictures handed in, by a name made from their bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Upload] = OrderedDict()

    def keep(self, data: bytes, upload: Upload) -> str:
        """Remember one, forget the oldest, and return its name."""
        name = hashlib.sha256(data).hexdigest()[:32]
        self._kept[name] = upload
        self._kept.move_to_end(name)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str, model: str) -> Upload:
        """One by its name; raises RequestError (404) where it is forgotten, or of another model."""
        upload = self._kept.get(name)
        if upload is None or upload.model != model:
            raise RequestError(404, "this picture is not held any more; hand it in again")
        self._kept.move_to_end(name)
        return upload


Facts = tuple[int, str | None]
"""Bytes of a picture when it was indexed, and the hash of its content, where that was noted."""


class CheckedPictures:
    """Reads pictures by the keys of an index from the sources that its manifest names.

    No part of a key becomes a path, and what is read is checked against the index's record, so
    that a source that changed since never shows another picture.

    Args:
        roots: the sources.
        facts: gives the record of a key.
        most: bytes of the largest picture that is read.
    """

    def __init__(self, roots: list[Root], facts: Callable[[str], Facts], most: int) -> None:
        self._roots, self._facts, self._most = roots, facts, most
        self._inside = InsidePictures(roots)
        self.hold = self._inside.hold

    def missing(self, key: str) -> str | None:
        """Why what should hold the picture of a key cannot be opened; None where it can."""
        try:
            self._inside.open(key)
        except DataError as error:
            return f"{key} cannot be shown: {error}"
        return None

    def stamp(self, key: str) -> str:
        """A text that changes when the picture of a key does."""
        size, digest = self._facts(key)
        return f"{owner(self._roots, key).where}\0{key}\0{size}\0{digest}"

    def read(self, key: str) -> bytes:
        """The content of a picture.

        Raises:
            RequestError: it is not there any more (404), or too large (413).
        """
        size, digest = self._facts(key)
        if size > self._most:
            raise RequestError(413, f"{key} has more than {self._most >> 20} MiB")
        try:
            data = self._inside.read(key)
            same = data is not None and len(data) == size
            if data is not None and same and (digest is None or content_hash(data) == digest):
                return data
        except (DataError, ImageError) as error:
            raise RequestError(404, f"{key} cannot be shown: {error}") from None
        raise RequestError(
            404,
            f"what holds {key} has changed since it was indexed; bring the index up to date",
        )


Result = TypeVar("Result")
MAX_FILE = 256 << 20
"""Bytes of the largest file that is read: decoding runs two at a time, so this bounds memory."""


def readable(key: str, read: Callable[[], Result]) -> Result:
    """What ``read`` returns; raises RequestError (415) where it meets no picture."""
    try:
        return read()
    except ImageError as error:
        raise RequestError(415, f"{key} cannot be read, it {error}") from None


class PictureFiles:
    """Reads the file of a key below the folder it was indexed from, or out of a table or tar.

    Args:
        roots: those folders, tables and tars.
        facts: gives the record of a key, by which a picture inside something is known again.
    """

    def __init__(self, roots: list[Root], facts: Callable[[str], Facts]) -> None:
        self._roots = roots
        self._inside = CheckedPictures(roots, facts, MAX_FILE)

    def missing(self, key: str) -> str | None:
        """Why a key has neither a file nor something that should hold its picture; else None."""
        if self._is_inside(key):
            return self._inside.missing(key)
        return self._missing(key) if file_of(self._roots, key) is None else None

    def path(self, key: str) -> Path:
        """The file of a key, its links followed.

        Raises:
            RequestError: there is none (404), or it lies outside of the key's folder.
        """
        path = file_of(self._roots, key)
        if path is None:
            raise RequestError(404, self._missing(key))
        return path

    def stamp(self, key: str) -> str:
        """A text that changes when the picture of a key does; raises as ``path``."""
        if self._is_inside(key):
            return self._inside.stamp(key)
        path = self.path(key)
        try:
            status = path.stat()
        except OSError:
            raise RequestError(404, self._missing(key)) from None
        return f"{path}\0{status.st_size}\0{status.st_mtime_ns}"

    def read(self, key: str) -> bytes:
        """The content of a picture as its file holds it.

        Raises:
            RequestError: as ``path``; or it is no regular file (404), or too large (413).
        """
        if self._is_inside(key):
            return self._inside.read(key)
        path = self.path(key)
        try:
            # The path holds no link any more; not waiting keeps a named pipe from holding us up.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise RequestError(404, self._missing(key)) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise RequestError(404, f"{key} is no regular file any more")
        with os.fdopen(file, "rb") as stream:
            data = stream.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise RequestError(413, f"the file of {key} has more than {MAX_FILE >> 20} MiB")
        return data

    def shown(self, key: str) -> tuple[bytes, str]:
        """What a browser shows of a key, and its media type: the file, or a JPEG made of it.

        Raises:
            RequestError: as ``read``; or the file is no picture that can be read (415).
        """
        data = self.read(key)
        kind = media_type(data)
        if kind is not None:
            return data, kind
        return as_jpeg(readable(key, lambda: read_image(data))), "image/jpeg"

    def thumbnail(self, key: str) -> bytes:
        """A small JPEG of a key; raises as ``shown``."""
        data = self.read(key)
        return readable(key, lambda: thumbnail(data))

    def _is_inside(self, key: str) -> bool:
        # A table may name some files and hold other pictures itself.
        return self._inside.hold(key) and file_of(self._roots, key) is None

    def _missing(self, key: str) -> str:
        where = owner(self._roots, key).where
        if where.startswith(HUB):
            return f"{key} has no file on this machine: it lies in the data set {where} of the hub"
        return (
            f"the file of {key} is not there any more, or a link leads out of the index's folder; "
            "bring the index up to date"
        )


class Work:
    """Reads and decodes pictures, as many at a time as there are cores.

    So a page of new thumbnails neither holds up searches nor takes the memory of all its pictures
    at once.

    Args:
        thumbs: where thumbnails are kept.
    """

    def __init__(self, thumbs: ThumbCache) -> None:
        self.thumbs = thumbs
        self._free = asyncio.Semaphore(os.cpu_count() or 1)

    async def thumb(self, files: PictureFiles, key: str) -> bytes:
        """The thumbnail of a key; raises RequestError where its picture cannot be read."""
        name, kept = await asyncio.to_thread(self._kept, files, key)
        if kept is not None:
            return kept
        made = await self.run(lambda: files.thumbnail(key))
        await asyncio.to_thread(self.thumbs.keep, name, made)
        return made

    def _kept(self, files: PictureFiles, key: str) -> tuple[str, bytes | None]:
        name = files.stamp(key)
        return name, self.thumbs.find(name)

    async def run(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, when its turn has come."""
        async with self._free:
            return await asyncio.to_thread(work)
