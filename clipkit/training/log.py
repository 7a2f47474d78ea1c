"""Read and write the log of a run, log.jsonl; needs no torch.

JSON has no non-finite numbers (RFC 8259, section 6), and most readers reject a file with one. They
are written as null and read as NaN.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"


def log_line(line: dict[str, Any]) -> str:
    """A line of log.jsonl as JSON; non-finite numbers are null."""
    return json.dumps(_nonfinite_to_none(line), allow_nan=False) + "\n"


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, with null as NaN, without a line torn by a crash."""
    file = run / LOG_FILE
    lines = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for one in text.splitlines():
        try:
            line = json.loads(one, object_pairs_hook=_none_to_nan)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def mean_chance_loss(lines: Sequence[dict[str, Any]]) -> float | None:
    """The mean loss of a uniform predictor over the logged batches; None if it was not logged."""
    losses = [line["chance_loss"] for line in lines if "chance_loss" in line]
    return math.fsum(losses) / len(losses) if losses else None


def _nonfinite_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nonfinite_to_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _none_to_nan(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in pairs}
