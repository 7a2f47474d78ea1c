"""clipkit eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import (
    DATA_HELP,
    MODEL_HELP,
    CaptionColumn,
    ImageColumn,
    LabelColumn,
    note,
    note_skipped,
    print_facts,
    print_json,
)

if TYPE_CHECKING:
    from clipkit.tasks.evaluate import Report

app = typer.Typer(help="Measure a model on data.", no_args_is_help=True)
Data = Annotated[str, typer.Argument(help=DATA_HELP)]
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]
SHOWN = 5


@app.command("retrieval")
def retrieval(
    data: Data,
    model: Model,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    as_json: Json = False,
) -> None:
    """Recall of captions finding images and the reverse.

    Recall@1, 5 and 10 both ways: the share of queries that find what belongs to them among the
    first 1, 5 or 10.
    """
    from clipkit.data.sources import open_source

    source = open_source(data, image=image_column, caption=caption_column)

    from clipkit.model.load import load
    from clipkit.tasks.evaluate import evaluate_retrieval

    _print(evaluate_retrieval(source, load(model)), as_json)


@app.command("zeroshot")
def zeroshot(
    data: Data,
    model: Model,
    labels: Annotated[str, typer.Option(help="cat,dog,red fox, or a file with one per line.")],
    templates: Annotated[
        Path | None, typer.Option(help="File of captions, one a line, {} for the label.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    as_json: Json = False,
) -> None:
    """Accuracy of classifying images that have labels.

    The share of images whose label is the likeliest one, or among the five likeliest, and the mean
    of that share over the classes.
    """
    from clipkit.data.prompts import read_labels, read_templates
    from clipkit.data.sources import open_source

    names, captions = read_labels(labels), read_templates(templates)
    source = open_source(data, image=image_column, caption="", label=label_column)

    from clipkit.model.load import load
    from clipkit.tasks.evaluate import evaluate_zeroshot

    _print(evaluate_zeroshot(source, load(model), names, captions), as_json)


def _print(report: "Report", as_json: bool) -> None:
    first = "; ".join(f"{item.key}: {item.reason}" for item in report.skipped[:SHOWN])
    more = len(report.skipped) - SHOWN
    note_skipped(len(report.skipped), first + (f"; and {more} more" if more > 0 else ""))
    if report.cut:
        note(report.cut)
    if as_json:
        print_json(report.to_dict())
        return
    print_facts(
        [
            ("model", report.model),
            ("data", report.data),
            *report.counts.items(),
            *((name, f"{value:.3f}") for name, value in report.metrics.items()),
        ]
    )
