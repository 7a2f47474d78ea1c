"""What an image may be: labels and templates given in words, or a classifier that was saved."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import Precision, load_encoder, load_maker

if TYPE_CHECKING:
    from clipkit.model.classifier import Classifier
    from clipkit.model.encoder import Encoder

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
        from clipkit.model.classifier import ZeroShotClassifier

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
    from clipkit.data.prompts import read_labels, read_templates
    from clipkit.errors import CaptionError
    from clipkit.manifest import MANIFEST

    # Not Path.is_file, for which a list of labels that is longer than a file name is an error.
    if not os.path.isfile(os.path.join(labels, MANIFEST)):
        return Choice(list(read_labels(labels)), read_templates(templates), None)
    from clipkit.model.classifier_file import open_classifier

    if templates is not None:
        raise CaptionError(
            f"{labels} is a saved classifier, whose captions are encoded already; leave "
            "--templates out, or name labels"
        )
    return Choice([], [], open_classifier(Path(labels)))
