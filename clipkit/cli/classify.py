"""clipkit classify."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import (
    DATA_HELP,
    MODEL_HELP,
    ImageColumn,
    model_or_default,
    note,
    note_skipped,
    print_json,
    print_table,
)


def classify(
    images: Annotated[list[str], typer.Argument(help=f"Image files, or: {DATA_HELP}")],
    labels: Annotated[str, typer.Option(help="cat,dog,red fox, or a file with one per line.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    templates: Annotated[
        Path | None, typer.Option(help="File of captions, one a line, {} for the label.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many labels per image.")] = 3,
    image_column: ImageColumn = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Classify images zero-shot, with probabilities."""
    from clipkit.data.prompts import read_labels, read_templates

    names, captions = read_labels(labels), read_templates(templates)

    from clipkit.data.sources import open_source
    from clipkit.errors import DataError
    from clipkit.model.classifier import ZeroShotClassifier
    from clipkit.model.load import load
    from clipkit.tasks.classify import classify as run

    # The images alone are wanted: neither captions nor labels need columns.
    sources = [open_source(spec, image=image_column, caption="", label="") for spec in images]
    encoder = load(model_or_default(model))
    classifier = ZeroShotClassifier.from_labels(encoder, names, captions)
    skipped: list[str] = []

    def on_skip(key: str, reason: str) -> None:
        skipped.append(key)
        note(f"skipped {key}: {reason}")

    rows, count = [], 0
    for predictions in run(
        sources, encoder, classifier, k=k, on_skip=on_skip, progress=not as_json
    ):
        count += 1
        if as_json:
            found = [{"label": p.label, "score": p.score} for p in predictions]
            print_json({"key": predictions[0].key, "predictions": found})
            continue
        then = "  ".join(f"{p.label} {p.score:.1%}" for p in predictions[1:])
        rows.append((predictions[0].key, predictions[0].label, f"{predictions[0].score:.1%}", then))
    if not count:
        raise DataError(f"not one of {len(skipped)} images could be read")
    if not as_json:
        print_table(("key", "label", "probability", "then"), rows)
    note(f"answered by {encoder.model}")
    note_skipped(len(skipped), "see above")
