"""The log of a run, log.jsonl, as anyone may read it while it grows; needs no torch."""

import json
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; a line torn by a crash is left out."""
    file = run / LOG_FILE
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
