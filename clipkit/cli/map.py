"""clipkit map."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import note, print_facts


def draw(
    collection: Annotated[
        Path, typer.Argument(metavar="INDEX|STORE", help="Directory of an index or a store.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write; a PNG stands beside it.")] = Path(
        "map.html"
    ),
    labels: Annotated[
        str | None,
        typer.Option(help="Names for clusters: cat,dog,… or a file; '' for none, numbers."),
    ] = None,
    clusters: Annotated[int, typer.Option(min=0, help="How many; 0: by the items.")] = 0,
) -> None:
    """Draw a map of a store or an index."""
    from clipkit.data.labels import EVERYDAY
    from clipkit.data.prompts import read_labels
    from clipkit.tasks.map import draw_map

    names = EVERYDAY if labels is None else read_labels(labels) if labels else ()
    note("laying out the map; 50,000 items take a few minutes")
    drawn = draw_map(collection, out, labels=names, clusters=clusters)
    facts = [("page", drawn.page), ("image", drawn.image)]
    if drawn.items < drawn.total:
        note(f"drew {drawn.items:,} of {drawn.total:,} items, chosen evenly")
    if drawn.without_image:
        note(f"{drawn.without_image:,} items show no picture: it is in no file, or gone")
    print_facts([*facts, *((name, f"{size:,}") for name, size in drawn.clusters)])
