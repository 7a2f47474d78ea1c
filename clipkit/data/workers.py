"""Prefetching with threads: an ordered parallel map, and the number of threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from clipkit.arguments import require_size

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int
) -> Iterator[Result]:
    """``map(function, items)`` in ``workers`` threads, prefetching up to ``ahead`` results.

    Threads suffice for Pillow, which releases the GIL while it decodes and resizes. Results come in
    the order of ``items``. The caller's thread reads ``items``, at most ``ahead`` beyond the next
    result, so memory is bounded.

    An exception from ``function`` or ``items`` is raised in its place, after the results before it.
    If the caller stops early (an exception, Ctrl-C, closing the generator), pending items are
    cancelled and running calls are waited for.

    Args:
        function: called with one item; must be thread-safe if there are several workers.
        items: may be infinite.
        workers: number of threads; 0 runs in the caller's thread, without prefetching.
        ahead: at least 1.
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
                    except Exception as error:  # including StopIteration, which also comes last
                        failure = error
                if not waiting:
                    break
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    if failure is not None and not isinstance(failure, StopIteration):
        raise failure


def worker_count(setting: int | str) -> int:
    """Number of decoding threads: ``setting``, or for ``"auto"`` one per core, at most 16."""
    chosen = require_size("workers", setting, least=0)
    if isinstance(chosen, int):
        return chosen
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        16,
    )
