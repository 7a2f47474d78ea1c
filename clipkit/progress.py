"""Progress on stderr: bars, status messages, throughput, graceful interruption."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


_silent = False


def silence(silent: bool = True) -> None:
    """Hide all later progress bars and status messages of this process, or show them again."""
    global _silent
    _silent = silent


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
) -> "tqdm[Any]":
    """A tqdm bar on stderr.

    Args:
        items: what to iterate over; None for a bar that the caller updates.
        desc: what is done, such as ``"encoding"``.
        unit: what is counted, such as ``"img"``.
        total: number of units; None if it is unknown.
        initial: units that are already done.
        shown: False hides the bar. It is also hidden after ``silence()``, or if stderr is not a
            terminal.
    """
    return tqdm(
        items,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        disable=None if shown and not _silent else True,
    )


def print_status(message: str) -> None:
    """Print a message on stderr, above a progress bar if there is one; not after ``silence()``."""
    if not _silent:
        tqdm.write(message, file=sys.stderr)


def is_main_process() -> bool:
    """Whether this process reports progress: rank 0 under torchrun, or a single process."""
    return os.environ.get("RANK", "0") == "0"


class Meter:
    """Measures samples per second and the fraction of time spent waiting for data."""

    def __init__(self) -> None:
        self.samples, self._waited, self._since = 0, 0.0, time.perf_counter()

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield ``items`` and count the time until each arrives as waiting."""
        while True:
            asked = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - asked
            yield item

    def read(self) -> tuple[float, float]:
        """Return samples per second and the waiting fraction in [0, 1] since the last call."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        result = self.samples / elapsed, self._waited / elapsed
        self.samples, self._waited, self._since = 0, 0.0, time.perf_counter()
        return result


@contextmanager
def catch_interrupts(patient: bool = False) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of stopping in the middle of a step.

    The first signal restores the previous handlers, so a second one stops at once. Outside the main
    thread signals cannot be caught, and the list stays empty.

    Args:
        patient: ignore further signals. torchrun forwards a signal that the terminal has already
            sent, and kills its processes after 30 seconds. SIGTERM stays ignored after an error:
            torchrun sends it when a process dies, and this process may be about to report why.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        if not patient:
            restore()

    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield received
    except Exception:
        if patient:
            before.pop(signal.SIGTERM, None)
        raise
    finally:
        restore()


def share_done(step: int, steps: int, seconds: float, minutes: float) -> float:
    """Completed fraction of a run, by steps or time, whichever is larger; 0 means no limit."""
    by_steps = step / steps if steps else 0.0
    return max(by_steps, seconds / (60 * minutes) if minutes else 0.0)
