"""Work that takes a while, beside the event loop and a bounded number at a time."""

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

from clipkit.web.files import PictureFiles
from clipkit.web.thumbs import ThumbCache

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
