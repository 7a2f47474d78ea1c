"""What long work tells of itself: throughput, waiting, and that someone wants it to stop."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def print_status(message: str) -> None:
    """Say something on stderr, above a progress bar that may stand there."""
    tqdm.write(message, file=sys.stderr)


def is_main_process() -> bool:
    """Whether this is the one process of a run that tells how it goes; torchrun numbers them."""
    return os.environ.get("RANK", "0") == "0"


class Meter:
    """Samples per second and the share of time spent waiting, since it was last read."""

    def __init__(self) -> None:
        self.samples, self._waited, self._since = 0, 0.0, time.perf_counter()

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass items on, counting the time each took to come as waiting."""
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
        """Samples per second and the share of time waited, in [0, 1]; then start over."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        result = self.samples / elapsed, self._waited / elapsed
        self.samples, self._waited, self._since = 0, 0.0, time.perf_counter()
        return result


@contextmanager
def catch_interrupts(patient: bool = False) -> Iterator[list[int]]:
    """Collect the numbers of SIGINT and SIGTERM instead of stopping in the middle of a step.

    After the first one the usual handlers are back, so a second stops at once. Outside the main
    thread signals cannot be caught; there the list stays empty.

    Args:
        patient: a second one does not stop it: torchrun sends its own after that of a terminal,
            and kills after 30 seconds. After an error SIGTERM still stops nothing, for torchrun
            sends it once a process is dead, which another is about to tell.
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
    """Share of a run done, by steps or by the clock, whichever is further; a limit of 0 is none."""
    by_steps = step / steps if steps else 0.0
    return max(by_steps, seconds / (60 * minutes) if minutes else 0.0)
