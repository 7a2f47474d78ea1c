"""Time clipkit and its peers in alternation, and report ratios with their spread.

A shared machine changes speed from minute to minute. So every benchmark alternates its contenders
and compares them round by round. It prints the median with the lowest and the highest value.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Times = dict[str, list[float]]


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warmup: int = 1
) -> Times:
    """Seconds of each run, one value per round, measured after ``warmup`` untimed rounds."""
    times: Times = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def synchronize(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device == "cuda":
        import torch  # here, because some benchmarks measure processes without torch

        torch.cuda.synchronize()


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the lowest and highest value in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def run_command(command: Sequence[str], extra: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Run a command. A failure ends the benchmark.

    Args:
        command: the program and its arguments.
        extra: environment variables to set in addition to those of this process.

    Returns:
        its stdout, and its stdout followed by its stderr.
    """
    environment = {**os.environ, **(extra or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout, done.stdout + done.stderr
