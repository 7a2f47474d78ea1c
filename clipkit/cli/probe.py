"""clipkit probe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.classify import Templates
from clipkit.cli.output import (
    DATA_HELP,
    MODEL_HELP,
    ImageColumn,
    LabelColumn,
    Precision,
    load_encoder,
    note,
    print_facts,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from clipkit.tasks.probe import ProbeReport


def probe(
    data: Annotated[str, typer.Argument(help=f"Images with labels. {DATA_HELP}")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    shots: Annotated[
        str, typer.Option(help="Labelled images of each class to learn from.")
    ] = "1,2,4,8,16",
    test: Annotated[
        str | None, typer.Option(help="Data to test on; without: half of each class.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Words for the classes, as for classify.")
    ] = None,
    templates: Templates = None,
    methods: Annotated[
        str, typer.Option(help="Which of these.")
    ] = "linear,neighbours,tip-adapter,tip-adapter-f",
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of the shots.")] = 5,
    save: Annotated[
        Path | None, typer.Option(help="Directory for the best classifier of the most shots.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    precision: Precision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Learn from a few labelled images of each class.

    Says how well that goes with logistic regression, nearest neighbours and Tip-Adapter, from
    vectors that are made once. As many further images of each class (at most four) choose the
    settings. Intervals are over draws and test images together.
    """
    from clipkit.data.open_source import open_source
    from clipkit.data.prompts import read_labels, read_templates

    counts = _numbers(shots)
    classes, captions = labels and read_labels(labels), read_templates(templates)
    source = open_source(data, image=image_column, caption="", label=label_column)
    tested = None
    if test is not None:
        tested = open_source(test, image=image_column, caption="", label=label_column)

    from clipkit.classifiers.few_shot import require_methods
    from clipkit.classifiers.heads import save_classifier
    from clipkit.tasks.probe import probe as run

    chosen = require_methods(methods.split(","))
    found = run(
        source,
        load_encoder(model, precision),
        test=tested,
        labels=classes or None,
        templates=captions,
        shots=counts,
        methods=chosen,
        seeds=seeds,
        progress=not as_json,
    )
    for text in found.notes:
        note(text)
    if save:
        save_classifier(found.best, save, {"data": data, "shots": shots, "methods": methods})
        note(f"saved the {found.best.kind} classifier as {save}")
    _print(found, as_json)


def _print(found: "ProbeReport", as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    facts = [("model", found.model), ("data", found.data), ("classes", len(found.classes))]
    print_facts([*facts, ("tested on", found.tested)])
    print()
    header = ("method", "shots", "accuracy", "95 % interval", "mean per class")
    print_table(
        header,
        [
            (
                row.method,
                str(row.shots),
                f"{row.accuracy.value:.3f}",
                f"{row.accuracy.low:.3f} to {row.accuracy.high:.3f}",
                f"{row.mean_per_class.value:.3f}",
            )
            for row in found.results
        ],
    )


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of numbers from 1, like 1,2,4")
    return [int(part) for part in parts]
