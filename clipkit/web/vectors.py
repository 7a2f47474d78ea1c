"""Vectors of captions and pictures, encoded together whoever asks for them."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipkit.data.preprocess import as_batch
from clipkit.data.resample import Pixels
from clipkit.model.encoder import Encoder
from clipkit.model.tokenizer import CutReport
from clipkit.web.batching import Batcher

Vector = NDArray[np.float32]
"""float32 [dim], of unit length."""
Result = TypeVar("Result")
CAPTIONS_KEPT = 4096
"""A query comes again while a person types, pages and goes back; its vector takes 2 KiB."""


class Vectors:
    """The one place of a server that uses an encoder.

    Args:
        on_batch: called with the number of captions and pictures of each call of an encoder.
    """

    def __init__(self, on_batch: Callable[[int], object]) -> None:
        self._on_batch = on_batch
        self._batcher: Batcher[tuple[Encoder, Any], Any] = Batcher(self._encode)
        # Both touched by the event loop's thread alone.
        self._captions: OrderedDict[tuple[str, str], Vector] = OrderedDict()
        self._asked: dict[tuple[str, str], asyncio.Task[Vector]] = {}

    async def of_captions(self, encoder: Encoder, captions: Sequence[str]) -> list[Vector]:
        """The vector of each caption; what exceeds 77 tokens is not read."""
        return list(await asyncio.gather(*(self._caption(encoder, text) for text in captions)))

    async def of_picture(self, encoder: Encoder, pixels: Pixels) -> Vector:
        """The vector of a picture, uint8 [height, width, 3] as the model's preprocessing gives."""
        vector: Vector = await self._batcher((encoder, pixels))
        return vector

    async def run(self, encoder: Encoder, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, which may use the encoder: nothing else does meanwhile."""
        result: Result = await self._batcher((encoder, work))
        return result

    def close(self) -> None:
        """Finish what is waiting."""
        self._batcher.close()

    async def _caption(self, encoder: Encoder, text: str) -> Vector:
        name = (encoder.model.fingerprint, text)
        vector = self._captions.get(name)
        if vector is None:
            if name not in self._asked:
                self._asked[name] = asyncio.create_task(self._encoded(encoder, text))
                self._asked[name].add_done_callback(lambda _: self._asked.pop(name))
            # One who asks for the same meanwhile waits for it; who goes leaves it to the others.
            vector = await asyncio.shield(self._asked[name])
        if name in self._captions:
            self._captions.move_to_end(name)
        return vector

    async def _encoded(self, encoder: Encoder, text: str) -> Vector:
        vector: Vector = await self._batcher((encoder, text))
        self._captions[encoder.model.fingerprint, text] = vector
        if len(self._captions) > CAPTIONS_KEPT:
            self._captions.popitem(last=False)
        return vector

    def _encode(self, items: Sequence[tuple[Encoder, Any]]) -> list[Any]:
        results: list[Any] = [None] * len(items)
        # By the encoder: while a newer index takes over there may be two.
        for encoder in {id(encoder): encoder for encoder, _ in items}.values():
            mine = [n for n, item in enumerate(items) if item[0] is encoder]
            captions = [n for n in mine if isinstance(items[n][1], str)]
            pictures = [n for n in mine if isinstance(items[n][1], np.ndarray)]
            if captions:
                texts = list(dict.fromkeys(items[n][1] for n in captions))
                found = encoder.encode_captions(texts, report=CutReport())
                self._on_batch(len(texts))
                # Copies, for a row that is kept would hold on to those of all who asked with it.
                vectors = dict(zip(texts, map(np.copy, found), strict=True))
                for n in captions:
                    results[n] = vectors[items[n][1]]
            if pictures:
                found = encoder.encode_images(as_batch([items[n][1] for n in pictures]))
                self._on_batch(len(pictures))
                for n, vector in zip(pictures, found, strict=True):
                    results[n] = vector
            for n in mine:
                if callable(items[n][1]):
                    results[n] = items[n][1]()
        return results
