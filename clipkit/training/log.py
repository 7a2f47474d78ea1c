"""The log of a run, log.jsonl, as anyone may read it while it grows; needs no torch.

JSON has no number that is not finite (RFC 8259, section 6), and readers other than Python's refuse
a file with one: such a number is written as null, and read as NaN.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"


def log_line(line: dict[str, Any]) -> str:
    """A line of log.jsonl as JSON; a number that is not finite is null."""
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, null as NaN; a line torn by a crash is left out."""
    file = run / LOG_FILE
    lines = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for one in text.splitlines():
        try:
            line = json.loads(one, object_pairs_hook=_numbers)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def mean_guess(lines: Sequence[dict[str, Any]]) -> float | None:
    """What guessing comes to on the batches of a log, on average; None where it does not tell."""
    guesses = [line["guess"] for line in lines if "guess" in line]
    return math.fsum(guesses) / len(guesses) if guesses else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in pairs}
