"""Vectors of captions and pictures, encoded together whoever asks for them.

Batcher: what several requests ask for at the same time is worked on together.
"""

import asyncio
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipkit.data.transforms import Pixels, as_batch
from clipkit.models.encoder import Encoder
from clipkit.models.tokenizer import TruncationReport
from clipkit.web.security import RequestError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Hands the items of concurrent callers to one function, as many at a time as are waiting.

    Nobody waits for company: the next batch gathers while the function works on the last one, so
    that a lone request is answered at once and many share the work. The function runs in one
    thread of its own, and so need not be safe to call from several.

    Args:
        work: from items to their results, in the same order.
        most: items handed over at once.
        room: items that may wait; one more is refused.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        most: int = 64,
        room: int = 4096,
    ) -> None:
        self._work, self._most, self._closed = work, most, False
        self._waiting: queue.Queue[tuple[Item, Future[Result]] | None] = queue.Queue(room)
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    async def __call__(self, item: Item) -> Result:
        """The result of one item.

        Raises:
            RequestError: too many are waiting already, or it is closed; or whatever the function
                raised for it.
        """
        if self._closed:
            raise RequestError(503, "the server is being stopped; ask again when it is back")
        future: Future[Result] = Future()
        try:
            self._waiting.put_nowait((item, future))
        except queue.Full:
            raise RequestError(
                503, "too many requests are waiting for an answer; try again in a moment"
            ) from None
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what is waiting and end the thread."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            batch, going = self._gather()
            # One whose caller has gone is left out.
            batch = [(item, f) for item, f in batch if f.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _gather(self) -> tuple[list[tuple[Item, "Future[Result]"]], bool]:
        """What is waiting, at least one item unless the end has come, and whether to go on."""
        batch = []
        entry = self._waiting.get()
        while entry is not None:
            batch.append(entry)
            if len(batch) == self._most:
                return batch, True
            try:
                entry = self._waiting.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _answer(self, batch: list[tuple[Item, "Future[Result]"]]) -> None:
        try:
            results = self._work([item for item, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for entry in batch:  # each by itself, so that one bad item harms no other
                self._answer([entry])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)


Vector = NDArray[np.float32]
"""float32 [dim], of unit length."""
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
                found = encoder.encode_text(texts, report=TruncationReport())
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
