"""Work that takes a while, beside the event loop and a bounded number at a time."""

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from clipkit.data.images import read_image
from clipkit.errors import ImageError
from clipkit.web.files import PictureFiles
from clipkit.web.pictures import thumbnail
from clipkit.web.problems import RequestError
from clipkit.web.thumbs import ThumbCache
from clipkit.web.uploads import read_upload

Result = TypeVar("Result")


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

    async def read_upload(self, data: bytes) -> tuple[Image.Image, bytes]:
        """As ``uploads.read_upload``."""
        return await self._run(lambda: read_upload(data))

    async def read_picture(self, files: PictureFiles, key: str) -> Image.Image:
        """The picture of a key, RGB; raises RequestError where it cannot be read."""
        return await self._run(lambda: _read(key, lambda: read_image(files.read(key))))

    async def shown(self, files: PictureFiles, key: str) -> tuple[bytes, str]:
        """As ``PictureFiles.shown``."""
        return await self._run(lambda: files.shown(key))

    async def thumb(self, files: PictureFiles, key: str) -> bytes:
        """The thumbnail of a key; raises RequestError where its picture cannot be read."""
        name, kept = await asyncio.to_thread(self._kept, files, key)
        if kept is not None:
            return kept
        made = await self._run(lambda: _read(key, lambda: thumbnail(files.read(key))))
        await asyncio.to_thread(self.thumbs.keep, name, made)
        return made

    def _kept(self, files: PictureFiles, key: str) -> tuple[str, bytes | None]:
        name = files.stamp(key)
        return name, self.thumbs.find(name)

    async def _run(self, work: Callable[[], Result]) -> Result:
        async with self._free:
            return await asyncio.to_thread(work)


def _read(key: str, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except ImageError as error:
        raise RequestError(415, f"{key} cannot be shown, it {error}") from None
