"""Work done ahead by threads, results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int
) -> Iterator[Result]:
    """``map(function, items)`` with ``workers`` threads working up to ``ahead`` items ahead.

    Threads suffice where the work is Pillow's, which lets go of the interpreter while it decodes
    and resizes. Results come in the order of ``items``, which is read in the caller's thread and
    never more than ``ahead`` items beyond the result asked for, so memory is bounded.

    An exception of ``function`` or of ``items`` is raised in its place, after the results before
    it. When the caller stops early (an exception, Ctrl-C, closing the generator), waiting work is
    dropped, and what is under way is waited for.

    Args:
        function: called with one item; with several threads it must be safe to call from them.
        items: may be endless.
        workers: 0 works in the caller's own thread, with nothing ahead.
        ahead: at least 1 item.
    """
    if not workers:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    source = iter(items)
    failure: Exception | None = None
    with ThreadPoolExecutor(workers, thread_name_prefix="clipkit") as pool:
        try:
            while True:
                while failure is None and len(waiting) < ahead:
                    try:
                        waiting.append(pool.submit(function, next(source)))
                    except Exception as error:  # StopIteration included: it comes last as well
                        failure = error
                if not waiting:
                    break
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    if failure is not None and not isinstance(failure, StopIteration):
        raise failure


def worker_count(setting: int | str) -> int:
    """How many threads to decode with: as asked, or for ``"auto"`` one per core, at most 16."""
    if isinstance(setting, int):
        return setting
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        16,
    )
