"""Batcher: what several requests ask for at the same time is worked on together."""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from clipkit.web.problems import RequestError

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
