"""The images of a served index as bytes: originals, thumbnails, uploads.

``IndexImages`` reads the images of the index and no other file of the machine. ``ThumbnailCache``
keeps their thumbnails on disk, ``UploadCache`` keeps uploaded images in memory, and
``ImageWorker`` bounds how many images are decoded at a time.
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
from pathlib import Path
from typing import TypeVar

from PIL import Image

from clipkit.data.formats.huggingface import HUB
from clipkit.data.images import Reduction, content_hash, read_image
from clipkit.display.thumbnails import encode_jpeg, thumbnail
from clipkit.errors import DataError, ImageError
from clipkit.index.hits import InsidePictures
from clipkit.index.roots import Root, file_of, owner
from clipkit.web.batching import Vector
from clipkit.web.schemas import RequestError

Result = TypeVar("Result")
THUMBNAIL_SIDE = 360
"""Longest side of a thumbnail in pixels: twice a tile of the page, for high-density screens."""
MAX_FILE = 256 << 20
"""Bytes of the largest file that is read; with the two decoded at a time, this bounds memory."""
MAX_PIXELS = 50_000_000
"""More than most cameras take; decoded, such an image needs 150 MB."""
MAX_UPLOADS = 64
"""Uploads kept in memory, so that paging does not send them again."""
MAX_CACHE = 500_000_000
"""Bytes of the thumbnail cache: about 25,000 thumbnails."""
_SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
}


class IndexImages:
    """Reads the images of an index by key: files below its folders, rows of tables and tars.

    What a table or tar holds is compared with the index's record, so that a source that has
    changed since never shows another image.

    Args:
        roots: the folders, tables and tars of the index.
        recorded: gives the size in bytes and the content hash, if known, that the index recorded.
    """

    def __init__(
        self, roots: list[Root], recorded: Callable[[str], tuple[int, str | None]]
    ) -> None:
        self._roots, self._recorded = roots, recorded
        self._containers = InsidePictures(roots)

    def why_missing(self, key: str) -> str | None:
        """Why the image of a key has no file and no container; None if it has one.

        A container is opened, not searched.
        """
        if file_of(self._roots, key) is not None:
            return None
        if not self._containers.hold(key):
            return self._gone(key)
        try:
            self._containers.open(key)
        except DataError as error:
            return f"cannot read {key}: {error}"
        return None

    def version(self, key: str) -> str:
        """A text that changes with the content of an image; raises as ``read``."""
        if self._in_container(key):
            size, digest = self._recorded(key)
            return f"{owner(self._roots, key).where}\0{key}\0{size}\0{digest}"
        path = self._path(key)
        try:
            status = path.stat()
        except OSError:
            raise RequestError(404, self._gone(key)) from None
        return f"{path}\0{status.st_size}\0{status.st_mtime_ns}"

    def read(self, key: str) -> bytes:
        """The content of an image file.

        Raises:
            RequestError: the image is gone or has changed (404), or is too large (413).
        """
        return self._read_contained(key) if self._in_container(key) else self._read_file(key)

    def for_browser(self, key: str) -> tuple[bytes, str]:
        """An image in a format that browsers show, and its media type.

        Raises:
            RequestError: as ``read``; or the file is not an image (415).
        """
        data = self.read(key)
        kind = media_type(data)
        if kind is not None:
            return data, kind
        return encode_jpeg(decode(key, data)), "image/jpeg"

    def thumbnail(self, key: str) -> bytes:
        """A small JPEG of an image; raises as ``for_browser``."""

        def reduction(width: int, height: int) -> int:
            # At least twice the final size, so that the last step down is smooth.
            longest = max(width, height)
            return next((n for n in (8, 4, 2) if longest >= 2 * THUMBNAIL_SIDE * n), 1)

        return thumbnail(decode(key, self.read(key), reduction), THUMBNAIL_SIDE)

    def _in_container(self, key: str) -> bool:
        # A table may name some files and contain other images itself.
        return self._containers.hold(key) and file_of(self._roots, key) is None

    def _path(self, key: str) -> Path:
        path = file_of(self._roots, key)
        if path is None:
            raise RequestError(404, self._gone(key))
        return path

    def _read_file(self, key: str) -> bytes:
        path = self._path(key)
        try:
            # The path is resolved, so a link in it is new; O_NONBLOCK keeps a named pipe from
            # blocking the server.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise RequestError(404, self._gone(key)) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise RequestError(404, f"{key} is no longer a regular file")
        with os.fdopen(file, "rb") as stream:
            data = stream.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise _too_large(key)
        return data

    def _read_contained(self, key: str) -> bytes:
        size, digest = self._recorded(key)
        if size > MAX_FILE:
            raise _too_large(key)
        try:
            data = self._containers.read(key)
            same = data is not None and len(data) == size
            if data is not None and same and (digest is None or content_hash(data) == digest):
                return data
        except (DataError, ImageError) as error:
            raise RequestError(404, f"cannot read {key}: {error}") from None
        raise RequestError(
            404, f"the source of {key} has changed since it was indexed; update the index"
        )

    def _gone(self, key: str) -> str:
        where = owner(self._roots, key).where
        if where.startswith(HUB):
            return f"{key} has no local file: it is part of the hub dataset {where}"
        return (
            f"the file of {key} is gone, or a link points outside the index's folder; update the "
            "index"
        )


def _too_large(key: str) -> RequestError:
    return RequestError(413, f"{key} is larger than {MAX_FILE >> 20} MiB")


def media_type(data: bytes) -> str | None:
    """The media type of an image that every browser shows; None for anything else.

    Only the first bytes count: an HTML page named ``a.jpg`` is not an image.
    """
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/avif" if data[4:12] in (b"ftypavif", b"ftypavis") else None


def decode(key: str, data: bytes, reduction: Reduction | None = None) -> Image.Image:
    """An image of the index, decoded; raises RequestError (415) if it is not an image."""
    try:
        return read_image(data, reduction)
    except ImageError as error:
        raise RequestError(415, f"cannot read {key}: it {error}") from None


@dataclass(frozen=True)
class Upload:
    """An uploaded image, as far as it is kept.

    Attributes:
        vector: its embedding, float32 [dim].
        fingerprint: of the model that encoded it.
        jpeg: its thumbnail.
    """

    vector: Vector
    fingerprint: str
    jpeg: bytes


class _TooManyPixelsError(ImageError):
    """The image is larger than ``MAX_PIXELS``."""


def read_upload(data: bytes, reduction: Reduction | None = None) -> tuple[Image.Image, bytes]:
    """An uploaded image, decoded, and its thumbnail.

    Args:
        data: content of an image file.
        reduction: by how much the image may be reduced while decoding; None: not at all.

    Raises:
        RequestError: it is not an image (415), or has too many pixels (413).
    """

    def checked(width: int, height: int) -> int:
        """Called with the size before any pixel is decoded."""
        if width * height > MAX_PIXELS:
            raise _TooManyPixelsError(
                f"has {width} x {height} pixels, at most {MAX_PIXELS // 10**6} million are read; "
                "make it smaller"
            )
        return reduction(width, height) if reduction else 1

    try:
        image = read_image(data, checked)
    except ImageError as error:
        status = 413 if isinstance(error, _TooManyPixelsError) else 415
        raise RequestError(status, f"cannot search with this image: it {error}") from None
    return image, thumbnail(image, THUMBNAIL_SIDE)


class UploadCache:
    """The last uploads, by a name derived from their bytes; never written to disk."""

    def __init__(self) -> None:
        self._uploads: OrderedDict[str, Upload] = OrderedDict()

    def add(self, data: bytes, upload: Upload) -> str:
        """Keep an upload, drop the oldest, and return its name."""
        name = hashlib.sha256(data).hexdigest()[:32]
        self._uploads[name] = upload
        self._uploads.move_to_end(name)
        if len(self._uploads) > MAX_UPLOADS:
            self._uploads.popitem(last=False)
        return name

    def get(self, name: str, fingerprint: str) -> Upload:
        """An upload by its name; raises RequestError (404) if dropped, or of another model."""
        upload = self._uploads.get(name)
        if upload is None or upload.fingerprint != fingerprint:
            raise RequestError(404, "the uploaded image has expired; upload it again")
        self._uploads.move_to_end(name)
        return upload


class ThumbnailCache:
    """Thumbnails on disk, within a bound of bytes; the least recently used go first.

    If the directory cannot be written, thumbnails are computed each time. Thread-safe.

    Args:
        folder: created if missing, readable for its owner only; None: nothing is cached.
        max_bytes: of all thumbnails together.
    """

    def __init__(self, folder: Path | None, max_bytes: int = MAX_CACHE) -> None:
        self._folder, self._max = folder, max_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        if folder is not None:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                for file in sorted(folder.glob("*.jpg"), key=lambda f: f.stat().st_mtime_ns):
                    self._sizes[file.name] = file.stat().st_size
        self.used = sum(self._sizes.values())

    def find(self, version: str) -> bytes | None:
        """The thumbnail of a version of an image, if cached."""
        if self._folder is None:
            return None
        name = _file_name(version)
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return None
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        return data

    def store(self, version: str, data: bytes) -> None:
        """Cache a thumbnail, if the disk permits it."""
        if self._folder is not None and len(data) <= self._max:
            with suppress(OSError):
                self._write(self._folder, _file_name(version), data)

    def _write(self, folder: Path, name: str, data: bytes) -> None:
        number, temp = tempfile.mkstemp(prefix=".new-", dir=folder)
        try:
            with os.fdopen(number, "wb") as stream:
                stream.write(data)
            os.replace(temp, folder / name)
        except BaseException:
            os.unlink(temp)
            raise
        with self._lock:
            self.used += len(data) - self._sizes.pop(name, 0)
            self._sizes[name] = len(data)
            while self.used > self._max:
                oldest, size = self._sizes.popitem(last=False)
                self.used -= size
                (folder / oldest).unlink(missing_ok=True)


def _file_name(version: str) -> str:
    # A digest, so that no key can name a place outside of the directory.
    return hashlib.sha256(version.encode()).hexdigest() + ".jpg"


class ImageWorker:
    """Reads and decodes images in threads, as many at a time as there are cores.

    A page of new thumbnails neither delays searches nor needs memory for all its images at once.

    Args:
        thumbnails: where thumbnails are cached.
    """

    def __init__(self, thumbnails: ThumbnailCache) -> None:
        self.thumbnails = thumbnails
        self._free = asyncio.Semaphore(os.cpu_count() or 1)

    async def thumbnail(self, images: IndexImages, key: str) -> bytes:
        """The thumbnail of a key; raises RequestError if its image cannot be read."""

        def cached() -> tuple[str, bytes | None]:
            version = images.version(key)
            return version, self.thumbnails.find(version)

        version, data = await asyncio.to_thread(cached)
        if data is None:
            data = await self.run(lambda: images.thumbnail(key))
            await asyncio.to_thread(self.thumbnails.store, version, data)
        return data

    async def run(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` in a thread when a core is free; returns what it returns."""
        async with self._free:
            return await asyncio.to_thread(work)
