"""The images of a served index as bytes: originals, thumbnails, uploads.

``IndexImages`` reads images of the index and no other files. ``ThumbnailCache`` stores thumbnails
on disk, ``UploadCache`` keeps uploaded images in memory, and ``ImageWorker`` limits the number of
images decoded at a time.
"""

import asyncio
import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from clipkit.artifacts import replacing
from clipkit.data.formats.huggingface import HUB
from clipkit.data.images import Reduction, content_hash, read_image
from clipkit.display.thumbnails import encode_jpeg, thumbnail
from clipkit.errors import DataError, ImageError
from clipkit.index.hits import EmbeddedImages
from clipkit.index.roots import Root, file_of, owner
from clipkit.web.batching import Vector
from clipkit.web.schemas import RequestError

Result = TypeVar("Result")
THUMBNAIL_SIDE = 360
"""Longest side of a thumbnail in pixels: twice a tile of the page, for high-density screens."""
MAX_FILE = 256 << 20
"""Maximum size of an image file in bytes, which bounds memory."""
MAX_PIXELS = 50_000_000
"""More than most cameras produce; an image of this size takes 150 MB decoded."""
MAX_UPLOADS = 64
"""Number of uploads kept in memory, so that paging does not upload them again."""
MAX_CACHE = 500_000_000
"""Size of the thumbnail cache in bytes: about 25,000 thumbnails."""
_SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
}


class IndexImages:
    """Reads the images of an index by key: files below its folders, rows of tables and tars.

    Images in a table or tar are compared with the index's record, so that a changed source never
    shows a different image.

    Args:
        roots: the folders, tables and tars of the index.
        recorded: returns the size in bytes and the content hash, if known, from the index.
    """

    def __init__(
        self, roots: list[Root], recorded: Callable[[str], tuple[int, str | None]]
    ) -> None:
        self._roots, self._recorded = roots, recorded
        self._containers = EmbeddedImages(roots)

    def why_missing(self, key: str) -> str | None:
        """Why the image of a key has no file and no container; None if it has one.

        This opens a container, but does not search it.
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
        """A string that changes with the content of an image; raises the errors of ``read``."""
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
            RequestError: the image is missing or has changed (404), or is too large (413).
        """
        return self._read_contained(key) if self._in_container(key) else self._read_file(key)

    def for_browser(self, key: str) -> tuple[bytes, str]:
        """An image in a format that browsers can display, and its media type.

        Raises:
            RequestError: as for ``read``, or the file is not an image (415).
        """
        data = self.read(key)
        kind = media_type(data)
        if kind is not None:
            return data, kind
        return encode_jpeg(decode(key, data)), "image/jpeg"

    def thumbnail(self, key: str) -> bytes:
        """The JPEG thumbnail of an image; raises the errors of ``for_browser``."""

        def reduction(width: int, height: int) -> int:
            # At least twice the final size, for a smooth final reduction.
            longest = max(width, height)
            return next((n for n in (8, 4, 2) if longest >= 2 * THUMBNAIL_SIDE * n), 1)

        return thumbnail(decode(key, self.read(key), reduction), THUMBNAIL_SIDE)

    def _in_container(self, key: str) -> bool:
        # A table may list paths of some images and contain others.
        return self._containers.hold(key) and file_of(self._roots, key) is None

    def _path(self, key: str) -> Path:
        path = file_of(self._roots, key)
        if path is None:
            raise RequestError(404, self._gone(key))
        return path

    def _read_file(self, key: str) -> bytes:
        path = self._path(key)
        try:
            # The path is already resolved, so a link in it is new. O_NONBLOCK prevents a named pipe
            # from blocking the server.
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
    """The media type of an image that every browser can display; None for anything else.

    The type is detected from the first bytes: an HTML page named ``a.jpg`` is not an image.
    """
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/avif" if data[4:12] in (b"ftypavif", b"ftypavis") else None


def decode(key: str, data: bytes, reduction: Reduction | None = None) -> Image.Image:
    """Decode an image of the index; raises RequestError (415) if it is not an image."""
    try:
        return read_image(data, reduction)
    except ImageError as error:
        raise RequestError(415, f"cannot read {key}: it {error}") from None


@dataclass(frozen=True)
class Upload:
    """The cached data of an uploaded image.

    Attributes:
        vector: its embedding, float32 [dim].
        fingerprint: fingerprint of the model that encoded it.
        jpeg: its thumbnail.
    """

    vector: Vector
    fingerprint: str
    jpeg: bytes


class _TooManyPixelsError(ImageError):
    """The image is larger than ``MAX_PIXELS``."""


def read_upload(data: bytes, reduction: Reduction | None = None) -> tuple[Image.Image, bytes]:
    """Decode an uploaded image; return it and its thumbnail.

    Args:
        data: content of an image file.
        reduction: chooses the reduction factor while decoding; None decodes at full size.

    Raises:
        RequestError: it is not an image (415), or has too many pixels (413).
    """

    def checked(width: int, height: int) -> int:
        """Check the image size before any pixel is decoded."""
        if width * height > MAX_PIXELS:
            raise _TooManyPixelsError(
                f"has {width} x {height} pixels, expected at most {MAX_PIXELS // 10**6} million; "
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
    """The latest uploads by a name derived from their bytes; never written to disk."""

    def __init__(self) -> None:
        self._uploads: OrderedDict[str, Upload] = OrderedDict()

    def add(self, data: bytes, upload: Upload) -> str:
        """Store an upload, drop the oldest one if full, and return its name."""
        name = hashlib.sha256(data).hexdigest()[:32]
        self._uploads[name] = upload
        self._uploads.move_to_end(name)
        if len(self._uploads) > MAX_UPLOADS:
            self._uploads.popitem(last=False)
        return name

    def get(self, name: str, fingerprint: str) -> Upload:
        """Get an upload by name; raises RequestError (404) if dropped or of another model."""
        upload = self._uploads.get(name)
        if upload is None or upload.fingerprint != fingerprint:
            raise RequestError(404, "the uploaded image has expired; upload it again")
        self._uploads.move_to_end(name)
        return upload


class ThumbnailCache:
    """A size-limited LRU cache of thumbnails on disk.

    If the directory is not writable, thumbnails are computed each time. Thread-safe.

    Args:
        folder: created if missing, readable only by its owner; None disables the cache.
        max_bytes: total size of all thumbnails.
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
        with replacing(folder / name, durable=False, shared=True) as temp:
            temp.write_bytes(data)
        with self._lock:
            self.used += len(data) - self._sizes.pop(name, 0)
            self._sizes[name] = len(data)
            while self.used > self._max:
                oldest, size = self._sizes.popitem(last=False)
                self.used -= size
                (folder / oldest).unlink(missing_ok=True)


def _file_name(version: str) -> str:
    # A digest, so that no key can name a path outside the directory.
    return hashlib.sha256(version.encode()).hexdigest() + ".jpg"


class ImageWorker:
    """Reads and decodes images in threads, one per core.

    A page of new thumbnails neither delays searches nor decodes all its images into memory at once.

    Args:
        thumbnails: cache for thumbnails.
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
        """Call ``work`` in a thread when a core is free and return its result."""
        async with self._free:
            return await asyncio.to_thread(work)
