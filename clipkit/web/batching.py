"""Batching of concurrent requests: texts and images that arrive together are encoded together."""

import asyncio
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from clipkit.data.transforms import Pixels, as_batch
from clipkit.models.encoder import Encoder
from clipkit.models.tokenizer import TruncationReport
from clipkit.web.schemas import RequestError

Item = TypeVar("Item")
Result = TypeVar("Result")
Vector = NDArray[np.float32]
"""float32 [dim], unit length."""
MAX_CAPTIONS_CACHED = 4096
"""Cached caption vectors: queries repeat while a user types and pages. 512 floats take 2 KiB."""


class Batcher(Generic[Item, Result]):
    """Passes the items of concurrent callers to one function in batches.

    It never waits to fill a batch. While the function runs, waiting items form the next batch: a
    single request is served at once, and concurrent requests share a call. The function runs in one
    thread and need not be thread-safe.

    Args:
        work: returns the results of items, in the same order.
        max_batch: maximum number of items per call.
        max_waiting: maximum number of waiting items; further items are refused.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int = 64,
        max_waiting: int = 4096,
    ) -> None:
        self._work, self._max_batch, self._closed = work, max_batch, False
        self._waiting: queue.Queue[tuple[Item, Future[Result]] | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    async def __call__(self, item: Item) -> Result:
        """Return the result of one item.

        Raises:
            RequestError: too many items are waiting, or the batcher is closed (503).
            Exception: the error that the function raised for this item.
        """
        if self._closed:
            raise RequestError(503, "the server is shutting down; try again later")
        future: Future[Result] = Future()
        try:
            self._waiting.put_nowait((item, future))
        except queue.Full:
            raise RequestError(
                503, "too many requests are waiting; try again in a moment"
            ) from None
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Process the waiting items and stop the thread."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            batch, running = self._gather()
            # Skip cancelled requests.
            batch = [(item, f) for item, f in batch if f.set_running_or_notify_cancel()]
            if batch:
                self._process(batch)

    def _gather(self) -> tuple[list[tuple[Item, "Future[Result]"]], bool]:
        """Wait for items; return them, none only if closed, and whether to continue."""
        batch = []
        entry = self._waiting.get()
        while entry is not None:
            batch.append(entry)
            if len(batch) == self._max_batch:
                return batch, True
            try:
                entry = self._waiting.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _process(self, batch: list[tuple[Item, "Future[Result]"]]) -> None:
        try:
            results = self._work([item for item, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for entry in batch:  # one by one, so that only the bad item fails
                self._process([entry])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)


@dataclass(frozen=True)
class _Job:
    """A caption, an image, or a call that uses the encoder."""

    encoder: Encoder
    payload: str | Pixels | Callable[[], object]


class EncoderQueue:
    """Runs all encoder calls of a server: batches them and caches caption vectors.

    Args:
        on_batch: called with the number of captions or images of each encoder call.
    """

    def __init__(self, on_batch: Callable[[int], object]) -> None:
        self._on_batch = on_batch
        self._batcher: Batcher[_Job, object] = Batcher(self._encode)
        # Only the event loop's thread uses these two.
        self._cached: OrderedDict[tuple[str, str], Vector] = OrderedDict()
        self._pending: dict[tuple[str, str], asyncio.Task[Vector]] = {}

    async def encode_text(self, encoder: Encoder, captions: Sequence[str]) -> list[Vector]:
        """Encode captions; tokens beyond the context length are truncated."""
        return list(await asyncio.gather(*(self._caption(encoder, text) for text in captions)))

    async def encode_image(self, encoder: Encoder, pixels: Pixels) -> Vector:
        """Encode an image, uint8 [height, width, 3], preprocessed for the model."""
        return cast(Vector, await self._batcher(_Job(encoder, pixels)))

    async def run(self, encoder: Encoder, work: Callable[[], Result]) -> Result:
        """Call ``work`` with exclusive use of the encoder and return its result."""
        return cast(Result, await self._batcher(_Job(encoder, work)))

    def close(self) -> None:
        """Process the waiting items and stop."""
        self._batcher.close()

    async def _caption(self, encoder: Encoder, text: str) -> Vector:
        name = (encoder.model.fingerprint, text)
        vector = self._cached.get(name)
        if vector is None:
            if name not in self._pending:
                self._pending[name] = asyncio.create_task(self._encode_caption(encoder, text))
                self._pending[name].add_done_callback(lambda _: self._pending.pop(name))
            # Requests for the same caption share one task, which survives a cancelled request.
            vector = await asyncio.shield(self._pending[name])
        if name in self._cached:
            self._cached.move_to_end(name)
        return vector

    async def _encode_caption(self, encoder: Encoder, text: str) -> Vector:
        vector = cast(Vector, await self._batcher(_Job(encoder, text)))
        self._cached[encoder.model.fingerprint, text] = vector
        if len(self._cached) > MAX_CAPTIONS_CACHED:
            self._cached.popitem(last=False)
        return vector

    def _encode(self, jobs: Sequence[_Job]) -> list[object]:
        results: list[object] = [None] * len(jobs)
        # There are two encoders while a newer index is being loaded.
        for encoder in {id(job.encoder): job.encoder for job in jobs}.values():
            captions: dict[int, str] = {}
            images: dict[int, Pixels] = {}
            calls: dict[int, Callable[[], object]] = {}
            for n, job in enumerate(jobs):
                if job.encoder is not encoder:
                    continue
                if isinstance(job.payload, str):
                    captions[n] = job.payload
                elif isinstance(job.payload, np.ndarray):
                    images[n] = job.payload
                else:
                    calls[n] = job.payload
            if captions:
                texts = list(dict.fromkeys(captions.values()))
                encoded = encoder.encode_text(texts, report=TruncationReport())
                self._on_batch(len(texts))
                # Copy: a cached view would keep the whole batch in memory.
                vectors = dict(zip(texts, map(np.copy, encoded), strict=True))
                for n, text in captions.items():
                    results[n] = vectors[text]
            if images:
                encoded = encoder.encode_images(as_batch(list(images.values())))
                self._on_batch(len(images))
                for n, vector in zip(images, encoded, strict=True):
                    results[n] = vector
            for n, call in calls.items():
                results[n] = call()
        return results
