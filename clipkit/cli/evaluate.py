"""clipkit eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import DATA_HELP, MODEL_HELP, note, note_skipped, print_facts, print_json

if TYPE_CHECKING:
    from clipkit.tasks.evaluate import Report

app = typer.Typer(help="Measure a model on data.", no_args_is_help=True)
Data = Annotated[str, typer.Argument(help=DATA_HELP)]
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command("retrieval")
def retrieval(data: Data, model: Model, as_json: Json = False) -> None:
    """Recall@1, 5 and 10: captions finding images, images finding captions."""
    from clipkit.data.sources import open_source

    source = open_source(data)

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
    as_json: Json = False,
) -> None:
    """Accuracy of classification by captions, on images with labels."""
    from clipkit.data.prompts import read_labels, read_templates
    from clipkit.data.sources import open_source

    names, captions, source = read_labels(labels), read_templates(templates), open_source(data)

    from clipkit.model.load import load
    from clipkit.tasks.evaluate import evaluate_zeroshot

    _print(evaluate_zeroshot(source, load(model), names, captions), as_json)


def _print(report: "Report", as_json: bool) -> None:
    note_skipped(len(report.skipped), "; ".join(f"{s.key}: {s.reason}" for s in report.skipped[:5]))
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
