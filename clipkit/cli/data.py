"""clipkit data."""

from typing import Annotated

import typer

from clipkit.cli.options import (
    CaptionColumn,
    Data,
    Encoding,
    ImageColumn,
    ImageRoot,
    Json,
    LabelColumn,
    new_group,
)
from clipkit.cli.output import print_json, print_text

app = new_group("Look at data before using them.")


@app.callback()
def _group() -> None:
    pass


@app.command("check")
def check(
    data: Data,
    against: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Report the pairs that these data hold too (leaks)."),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    label_column: LabelColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    as_json: Json = False,
) -> None:
    """Report the contents of data and their problems."""
    from clipkit.tasks.check_data import check_data

    report = check_data(
        data,
        against,
        image=image_column,
        caption=caption_column,
        label=label_column,
        image_root=image_root,
        encoding=encoding,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_text(report.render())
