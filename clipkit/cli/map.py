"""clipkit map."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.options import OUTPUT, Json, Model
from clipkit.cli.output import load_encoder, note, print_facts, print_json


def draw(
    collection: Annotated[
        Path, typer.Argument(metavar="INDEX|STORE", help="Directory of an index or a store.")
    ],
    labels: Annotated[
        str | None,
        typer.Option(help="Names for clusters: cat,dog,… or a file; '' numbers the clusters."),
    ] = None,
    clusters: Annotated[
        int, typer.Option(min=0, help="Number of clusters; 0 chooses it from the number of items.")
    ] = 0,
    model: Model = None,
    as_json: Json = False,
    html: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The HTML page to write, with a PNG beside it.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("map.html"),
) -> None:
    """Draw a map of a store or an index."""
    from clipkit.data.labels import EVERYDAY
    from clipkit.data.prompts import read_labels
    from clipkit.tasks.map import draw_map

    names = EVERYDAY if labels is None else read_labels(labels) if labels else ()
    encoder = load_encoder(model, None) if model else None
    note("computing the layout; 50,000 items take a few minutes")
    drawn = draw_map(collection, html, labels=names, encoder=encoder, clusters=clusters)
    if drawn.items < drawn.total:
        note(f"drew a sample of {drawn.items:,} of {drawn.total:,} items")
    if drawn.without_image:
        note(f"{drawn.without_image:,} items have no thumbnail: their image file is missing")
    if as_json:
        files = {"page": str(drawn.page), "image": str(drawn.image)}
        print_json({**files, "items": drawn.items, "clusters": dict(drawn.clusters)})
        return
    facts = [("page", drawn.page), ("image", drawn.image)]
    print_facts([*facts, *((name, f"{size:,}") for name, size in drawn.clusters)])
