"""clipkit classify, and the choice between labels and a saved classifier."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.options import (
    OUTPUT,
    BatchSize,
    Csv,
    Device,
    Html,
    ImageColumn,
    Images,
    Json,
    Labels,
    Model,
    Precision,
    PrecisionName,
    Templates,
    Workers,
)
from clipkit.cli.output import (
    load_encoder,
    load_maker,
    note,
    note_skipped,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clipkit.classifiers.predictions import Prediction
    from clipkit.classifiers.zero_shot import Classifier
    from clipkit.data.labels import Label
    from clipkit.models.encoder import Encoder
    from clipkit.reports.classification import PredictionFiles


@dataclass(frozen=True)
class Choice:
    """Labels with their templates, or a saved classifier."""

    labels: "list[Label]"
    templates: list[str]
    saved: "Classifier | None"

    def load(
        self,
        model: str | None,
        precision: PrecisionName | None,
        device: str | None = None,
        *,
        background: bool = False,
    ) -> "tuple[Encoder, Classifier]":
        """The encoder, and the classifier made with it or opened."""
        from clipkit.classifiers.zero_shot import ZeroShotClassifier

        if self.saved is None:
            encoder = load_encoder(model, precision, device)
            made = ZeroShotClassifier.from_labels(
                encoder, self.labels, self.templates, background=background
            )
            return encoder, made
        if model:
            encoder = load_encoder(model, precision, device)
        else:
            encoder = load_maker(self.saved.model, "the classifier", precision, device)
        self.saved.require(encoder.model)
        return encoder, self.saved


def read_choice(labels: str, templates: str | None) -> Choice:
    """Read what was chosen, before anything that takes time; see ``read_labels``."""
    from clipkit.artifacts import MANIFEST
    from clipkit.data.prompts import read_labels, read_templates
    from clipkit.errors import CaptionError

    # Not Path.is_file, for which a list of labels that is longer than a file name is an error.
    if not os.path.isfile(os.path.join(labels, MANIFEST)):
        return Choice(read_labels(labels), read_templates(templates), None)
    from clipkit.classifiers.heads import open_classifier

    if templates is not None:
        raise CaptionError(
            f"{labels} is a saved classifier, whose captions are encoded already; leave "
            "--templates out, or name labels"
        )
    return Choice([], [], open_classifier(Path(labels)))


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
    files = _files(html=html, csv=csv, sheet=sheet)
    choice = read_choice(labels, templates)

    from clipkit.classifiers.heads import save_classifier
    from clipkit.data.open_source import open_source
    from clipkit.reports.classification import PredictionFiles
    from clipkit.tasks.classify import calibrate_rejection, no_image, predict_images

    # The images alone are wanted: neither captions nor labels need columns.
    sources = [open_source(spec, image=image_column, caption="", label="") for spec in images]
    examples = open_source(calibrate, caption="", label="") if calibrate else None
    reject = reject or examples is not None
    encoder, classifier = choice.load(model, precision, device, background=each or reject)
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
    with PredictionFiles(files, sort, link=link, lead=lead) as writer:
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


def _files(**given: Path | None) -> list[Path]:
    """The files to write; each option takes only names of its own format."""
    formats = {"html": (".html",), "csv": (".csv",), "sheet": (".png", ".jpg")}
    for name, file in given.items():
        wanted = formats[name]
        if file and file.suffix.lower() not in wanted and (name, str(file)) != ("csv", "-"):
            option = "contact-sheet" if name == "sheet" else name
            raise typer.BadParameter(
                f"expected a file name that ends in {' or '.join(wanted)}, found {str(file)!r}",
                param_hint=f"--{option}",
            )
    return [file for file in given.values() if file]


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
