"""clipkit info."""

from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.options import Json
from clipkit.cli.output import print_facts, print_json


def info(
    path: Annotated[Path, typer.Argument(help="A run, checkpoint, store or index.")],
    as_json: Json = False,
) -> None:
    """Say what a directory holds and what made it."""
    from clipkit.tasks.info import describe

    found = describe(path)
    if as_json:
        print_json(found.to_dict())
        return
    files = [(f"file {name}", f"{size:,} bytes") for name, size in found.files.items()]
    print_facts([("path", path), *_flat(found.facts), *files])


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested names with a space between; empty parts, and lists, which --json has, left out."""
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += _flat(value, "" if name == "detail" else f"{prefix}{name} ")
        elif isinstance(value, float):
            lines.append((f"{prefix}{name}", f"{value:.4g}"))
        elif value not in (None, "") and not isinstance(value, list):
            lines.append((f"{prefix}{name}", value))
    return lines
