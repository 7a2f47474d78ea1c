"""clipkit compare."""

from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.classify import Templates
from clipkit.cli.output import (
    DATA_HELP,
    MODEL_HELP,
    CaptionColumn,
    ImageColumn,
    LabelColumn,
    Precision,
    load_encoder,
    note,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from clipkit.evaluation.significance import Difference


def compare(
    one: Annotated[str, typer.Argument(help=MODEL_HELP)],
    other: Annotated[str, typer.Argument(help="The model to compare it with.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    labels: Annotated[
        str | None,
        typer.Option(help="Compare zero-shot classification among these; without: retrieval."),
    ] = None,
    templates: Templates = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    label_column: LabelColumn = None,
    precision: Precision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say which of two models is better on data.

    Also by how much, and whether that could be chance. Both see the same images, so that what is
    hard for both does not hide their difference, which is how much higher the second one's figure
    is. A better one is named where that is no chance; of median ranks and errors the lower is
    better. The verdict is about mean recall, or about top-1 accuracy with --labels; p-values of
    the other figures are corrected for how many there are.
    """
    from clipkit.data.open_source import open_source
    from clipkit.data.prompts import read_labels

    classes = None if labels is None else read_labels(labels)
    captions = caption_column if classes is None else ""
    source = open_source(data, image=image_column, caption=captions, label=label_column)

    from clipkit.tasks.compare import compare as run

    found = run(
        load_encoder(one, precision),
        load_encoder(other, precision),
        source,
        labels=classes,
        templates=templates,
        names=(one, other),
        progress=not as_json,
    )
    for text in found.reports[0].notes:
        note(text)
    if as_json:
        print_json(found.to_dict())
        return
    header = ("metric", one, other, "difference", "95 % interval", "p", "better")
    rows = (found.headline, *found.differences)
    print_table(header, [(*_row(row), found.better_at(row) or "") for row in rows])
    print(found.verdict)


def _row(row: "Difference") -> tuple[str, ...]:
    change = row.difference
    p = "" if row.p is None else f"{row.p:.2g}"
    return (
        row.name,
        f"{row.first:.3f}",
        f"{row.second:.3f}",
        f"{change.value:+.3f}",
        f"{change.low:+.3f} to {change.high:+.3f}",
        p,
    )
