"""JSON tables of images and captions: JSON lines."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipkit.data.images import Skipped
from clipkit.data.source import Row


def json_records(
    file: Path, skipped: list[Skipped], start: Sequence[int] = (0, 0)
) -> Iterator[tuple[Row, list[int]]]:
    """The objects of a JSON lines file, each with the position after it.

    Args:
        file: one JSON object a line, UTF-8.
        skipped: takes the lines that are not JSON objects.
        start: where to begin: bytes and lines before the first line to read.
    """
    offset, number = start
    with file.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            offset, number = offset + len(line), number + 1
            text = line.decode("utf-8", "replace")
            text = (text.removeprefix("\ufeff") if number == 1 else text).strip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                skipped.append(Skipped(f"{file.name}:{number}", f"is not JSON: {error}"))
                continue
            if isinstance(record, dict):
                yield record, [offset, number]
            else:
                skipped.append(Skipped(f"{file.name}:{number}", "is not a JSON object"))
