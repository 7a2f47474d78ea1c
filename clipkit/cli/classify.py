"""clipkit classify."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.options import (
    OUTPUT,
    BatchSize,
    Csv,
    Device,
    Encoding,
    Html,
    ImageColumn,
    ImageRoot,
    Images,
    Json,
    Labels,
    Model,
    Precision,
    Templates,
    Workers,
)
from clipkit.cli.output import (
    load_classifier_option,
    note,
    note_skipped,
    print_json,
    print_table,
    read_labels_option,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clipkit.classifiers.predictions import Prediction
    from clipkit.data.source import Source
    from clipkit.reports.classification import PredictionFiles


def classify(
    images: Images,
    labels: Labels,
    model: Model = None,
    templates: Templates = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Labels per image.")] = 3,
    each: Annotated[
        bool,
        typer.Option("--each", help="Score each label by itself: an image may show several."),
    ] = False,
    reject: Annotated[
        bool, typer.Option("--reject", help="Mark images that show none of the labels.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Images that show a label: reject so that 95 % of them pass."
        ),
    ] = None,
    sort: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Copy the images to a new folder, by label."),
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="With --sort: link, do not copy.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Directory to save the classifier to, for --labels.")
    ] = None,
    image_column: ImageColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
    html: Html = None,
    csv: Csv = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            "--contact-sheet",
            metavar="FILE",
            help="Write a PNG or JPEG of thumbnails.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Classify images zero-shot or with a saved classifier."""
    found = read_labels_option(labels, templates, single=each)

    from clipkit.classifiers.heads import save_classifier
    from clipkit.data.open_source import open_source
    from clipkit.reports.classification import PredictionFiles
    from clipkit.tasks.classify import calibrate_rejection, no_image, predict_images

    # The images alone are wanted: neither captions nor labels need columns.
    def open_images(spec: str) -> "Source":
        return open_source(
            spec, image=image_column, caption="", label="", image_root=image_root, encoding=encoding
        )

    sources = [open_images(spec) for spec in images]
    examples = open_images(calibrate) if calibrate else None
    reject = reject or examples is not None
    encoder, classifier = load_classifier_option(
        found, templates, model, precision, device, background=each or reject
    )
    if examples:
        calibrate_rejection(
            examples,
            encoder,
            classifier,
            batch_size=batch_size,
            workers=workers,
            progress=not as_json,
        )
    if save:
        save_classifier(classifier, save, {"labels": labels, "templates": templates})
    skipped: list[str] = []

    def on_skip(key: str, reason: str) -> None:
        skipped.append(key)
        note(f"skipped {key}: {reason}")

    lead = f"{', '.join(images)}, by {encoder.model}."
    with PredictionFiles(csv, html, sheet, sort, link=link, lead=lead) as writer:
        predictions = predict_images(
            sources,
            encoder,
            classifier,
            k=k,
            each=each,
            reject=reject,
            on_skip=on_skip,
            batch_size=batch_size,
            workers=workers,
            progress=not as_json,
        )
        if not _print(predictions, writer, as_json, quiet=csv == Path("-")):
            raise no_image(skipped)
    note(f"classified by {encoder.model}")
    note_skipped(len(skipped), "see above")


def _print(
    predictions: "Iterator[Prediction]", files: "PredictionFiles", as_json: bool, *, quiet: bool
) -> int:
    """Print and write predictions one by one; returns their number."""
    rows, count = [], 0
    for prediction in predictions:
        count += 1
        files.add(prediction)
        if as_json:
            print_json(prediction.to_dict())
        elif not quiet:
            rows.append(_row(prediction))
    if rows:
        print_table(("key", "label", "probability", "then"), rows)
    return count


def _row(prediction: "Prediction") -> tuple[str, str, str, str]:
    others = prediction.top if prediction.rejected else prediction.top[1:]
    then = [f"{one.label} {one.score:.1%}" for one in others]
    then += [f"[{group.label} {group.score:.1%}]" for group in prediction.groups[:2]]
    return prediction.key, prediction.label, f"{prediction.score:.1%}", "  ".join(then)
