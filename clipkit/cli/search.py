"""clipkit search: ask an index."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.options import OUTPUT, Csv, Device, Html, Index, Json, Model, Precision
from clipkit.cli.output import (
    load_encoder,
    load_maker,
    note,
    print_described,
    print_hits,
    print_images,
)

if TYPE_CHECKING:
    from clipkit.index.hits import Hits


def search(
    index: Index,
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[
        str | None,
        typer.Option(help="An image file to search for; it is added to the query."),
    ] = None,
    like: Annotated[
        list[str] | None, typer.Option(help="A key of the index, to find more like it.")
    ] = None,
    minus: Annotated[
        list[str] | None,
        typer.Option(help="Text that is subtracted from the query."),
    ] = None,
    minus_weight: Annotated[float, typer.Option(min=0, help="Weight of each --minus.")] = 0.5,
    image_weight: Annotated[float, typer.Option(min=0, help="Weight of --image.")] = 1.0,
    where: Annotated[
        str | None,
        typer.Option(
            help="Only images for which this holds: \"year >= 2023 and folder = 'holiday'\"."
        ),
    ] = None,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Leave out near-duplicates of better hits.")
    ] = False,
    queries: Annotated[
        typer.FileText | None,
        typer.Option("--from", help="A file of queries, one a line; - reads stdin."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 10,
    model: Model = None,
    precision: Precision = None,
    device: Device = None,
    as_json: Json = False,
    html: Html = None,
    csv: Csv = None,
    show: Annotated[
        bool,
        typer.Option("--show", help="Show the images in the terminal.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Find images by text, by image, or by both together."""
    asked = [line.strip() for line in queries or [] if line.strip()]
    if queries is not None and (query is not None or not asked):
        raise typer.BadParameter("--from takes a file of queries, and no other query")
    if query is None and image is None and not (like or minus or asked):
        raise typer.BadParameter("name a query, an --image, or both")
    printed = csv == Path("-")
    if as_json + printed + show > 1:
        raise typer.BadParameter("choose one of --json, --csv - and --show")
    from clipkit.index.vector_index import VectorIndex

    opened = VectorIndex.open(index)
    if not len(opened):
        note(f"{index} is empty, so there is nothing to find; `clipkit index add` adds images")
        return

    from clipkit.tasks.search import write_page

    if model is not None:
        opened = opened.with_encoder(load_encoder(model, precision or "fp32", device))
    elif precision is not None or device is not None:
        encoder = load_maker(opened.model, f"the index {index}", precision or "fp32", device)
        opened = opened.with_encoder(encoder)
    found: list[tuple[str | None, Hits]] = []
    wanted: list[str | None] = [*asked] or [query]
    for words in wanted:
        hits = opened.search(
            words,
            k,
            where=where,
            image=image,
            like=like or (),
            minus=minus or (),
            minus_weight=minus_weight,
            image_weight=image_weight,
            distinct=distinct,
        )
        found.append((words if asked else None, hits))
        if not (as_json or printed):
            _print(words if asked else None, hits, show)
        _note_no_match(hits)
    if as_json or csv:
        print_described([(*one, one[1].records()) for one in found], as_json, csv)
    if html is not None:
        write_page([hits for _, hits in found], html)
    note(f"answered by {opened.model}")


def _print(query: str | None, hits: "Hits", show: bool) -> None:
    if query is not None:
        print(f"{query}:")
    print_hits(hits)
    if show:
        print_images(hits)


def _note_no_match(hits: "Hits") -> None:
    if hits.matched is not False:
        return
    if hits.any_match is None:
        note("no good match: random words score as high")
    else:
        chance = f"{hits.any_match:.0%}"
        note(f"no good match: the ten best hits hold one with a probability of {chance}")
