"""clipkit info."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.options import Json
from clipkit.cli.output import print_facts, print_json


def info(
    path: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="A run, checkpoint, store or index.")
    ],
    as_json: Json = False,
) -> None:
    """Show what a directory holds and what built it."""
    from clipkit.tasks.info import info as run

    found = run(path)
    if as_json:
        print_json(found.to_dict())
    else:
        print_facts(found.lines())
