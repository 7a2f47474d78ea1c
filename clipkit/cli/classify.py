"""clipkit classify.

What an image may be: labels and templates given in words, or a classifier that was saved.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import (
    DATA_HELP,
    MODEL_HELP,
    ImageColumn,
    Precision,
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
    from clipkit.models.encoder import Encoder
    from clipkit.reports.classification import PredictionFiles


Labels = Annotated[
    str,
    typer.Option(
        help="cat,dog,red fox; a file with one per line (fox: red fox, vixen, or animal/fox); "
        "imagenet; or the directory of a saved classifier."
    ),
]
Templates = Annotated[
    str | None,
    typer.Option(help="File of captions, one a line, {} for the label; or openai; or simple."),
]


@dataclass(frozen=True)
class Choice:
    """Labels with their templates, or a saved classifier."""

    labels: list[str]
    templates: list[str]
    saved: "Classifier | None"

    def load(
        self, model: str | None, precision: Precision, *, background: bool = False
    ) -> "tuple[Encoder, Classifier]":
        """The encoder, and the classifier made with it or opened."""
        from clipkit.classifiers.zero_shot import ZeroShotClassifier

        if self.saved is None:
            encoder = load_encoder(model, precision)
            made = ZeroShotClassifier.from_labels(
                encoder, self.labels, self.templates, background=background
            )
            return encoder, made
        if model:
            encoder = load_encoder(model, precision)
        else:
            encoder = load_maker(self.saved.model, "the classifier", precision)
        self.saved.require(encoder.model)
        return encoder, self.saved


def read_choice(labels: str, templates: str | None) -> Choice:
    """Read what was chosen, before anything that takes time; see ``read_labels``."""
    from clipkit.artifacts import MANIFEST
    from clipkit.data.prompts import read_labels, read_templates
    from clipkit.errors import CaptionError

    # Not Path.is_file, for which a list of labels that is longer than a file name is an error.
    if not os.path.isfile(os.path.join(labels, MANIFEST)):
        return Choice(list(read_labels(labels)), read_templates(templates), None)
    from clipkit.classifiers.heads import open_classifier

    if templates is not None:
        raise CaptionError(
            f"{labels} is a saved classifier, whose captions are encoded already; leave "
            "--templates out, or name labels"
        )
    return Choice([], [], open_classifier(Path(labels)))


def classify(
    images: Annotated[list[str], typer.Argument(help=f"Image files, or: {DATA_HELP}")],
    labels: Labels,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    templates: Templates = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many labels per image.")] = 3,
    each: Annotated[
        bool, typer.Option("--each", help="Judge each label by itself: several may be shown.")
    ] = False,
    reject: Annotated[
        bool, typer.Option("--reject", help="Say where an image shows none of the labels.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Images that do show a label: reject so that 95 % like these are kept."),
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="A .csv, .json, .html or .png (contact sheet) to write; repeatable."),
    ] = None,
    sort: Annotated[
        Path | None, typer.Option(help="New folder for copies, in a folder for each label.")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Sort links instead of copies.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Directory to keep the classifier in, for --labels.")
    ] = None,
    image_column: ImageColumn = None,
    precision: Precision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Classify images zero-shot or by a saved classifier."""
    choice = read_choice(labels, templates)

    from clipkit.classifiers.heads import save_classifier
    from clipkit.data.open_source import open_source
    from clipkit.reports.classification import PredictionFiles
    from clipkit.tasks.classify import calibrate_rejection, no_image, predict_images

    # The images alone are wanted: neither captions nor labels need columns.
    sources = [open_source(spec, image=image_column, caption="", label="") for spec in images]
    examples = open_source(calibrate, caption="", label="") if calibrate else None
    reject = reject or examples is not None
    encoder, classifier = choice.load(model, precision, background=each or reject)
    if examples:
        calibrate_rejection(examples, encoder, classifier, progress=not as_json)
    if save:
        save_classifier(classifier, save, {"labels": labels, "templates": templates})
    skipped: list[str] = []

    def on_skip(key: str, reason: str) -> None:
        skipped.append(key)
        note(f"skipped {key}: {reason}")

    lead = f"{', '.join(images)}, by {encoder.model}."
    with PredictionFiles(out or [], sort, link=link, lead=lead) as files:
        predictions = predict_images(
            sources,
            encoder,
            classifier,
            k=k,
            each=each,
            reject=reject,
            on_skip=on_skip,
            progress=not as_json,
        )
        if not _print(predictions, files, as_json):
            raise no_image(skipped)
    note(f"classified by {encoder.model}")
    note_skipped(len(skipped), "see above")


def _print(predictions: "Iterator[Prediction]", files: "PredictionFiles", as_json: bool) -> int:
    """Print and write predictions one by one; returns their number."""
    rows, count = [], 0
    for prediction in predictions:
        count += 1
        files.add(prediction)
        if as_json:
            print_json(prediction.to_dict())
        else:
            rows.append(_row(prediction))
    if rows:
        print_table(("key", "label", "probability", "then"), rows)
    return count


def _row(prediction: "Prediction") -> tuple[str, str, str, str]:
    others = prediction.top if prediction.rejected else prediction.top[1:]
    then = [f"{one.label} {one.score:.1%}" for one in others]
    then += [f"[{group.label} {group.score:.1%}]" for group in prediction.groups[:2]]
    return prediction.key, prediction.label, f"{prediction.score:.1%}", "  ".join(then)
