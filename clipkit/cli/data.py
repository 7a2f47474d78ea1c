"""clipkit data."""

from typing import Annotated

import typer

from clipkit.cli.output import (
    DATA_HELP,
    CaptionColumn,
    ImageColumn,
    LabelColumn,
    print_json,
    print_text,
)

app = typer.Typer(help="Look at data before it is used.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("check")
def check(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    against: Annotated[
        str | None, typer.Option(help="Another set: report the pairs that both hold (leaks).")
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    label_column: LabelColumn = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Report what is in data and what is wrong with it."""
    from clipkit.tasks.check_data import check_data

    report = check_data(
        data, against, image=image_column, caption=caption_column, label=label_column
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_text(report.render())
