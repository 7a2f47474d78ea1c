"""clipkit index remove and compact: change an index that stands."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import print_facts, print_json

IndexArgument = Annotated[Path, typer.Argument(help="Directory of the index.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def remove(
    index: IndexArgument,
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys, or patterns such as 'holiday/*'.")
    ] = None,
    keys_from: Annotated[
        typer.FileText | None,
        typer.Option("--from", help="A file of keys or patterns, one a line; - reads stdin."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take images out of an index; their files stay."""
    names = [*(keys or []), *(line.rstrip("\r\n") for line in keys_from or [])]
    names = [name for name in names if name]
    if not names:
        raise typer.BadParameter("name a key, a pattern, or a file of them with --from")
    from clipkit.tasks.upkeep import remove_items

    for key in remove_items(index, names):
        if as_json:
            print_json({"removed": key})
        else:
            print_facts([("removed", key)])


def compact(index: IndexArgument, as_json: AsJson = False) -> None:
    """Build an index anew from what it holds, freshly trained."""
    from clipkit.tasks.upkeep import compact_index

    found = compact_index(index)
    facts = {"index": str(index), "vectors": len(found), "spec": found.spec}
    if as_json:
        print_json(facts)
    else:
        print_facts(facts.items())
