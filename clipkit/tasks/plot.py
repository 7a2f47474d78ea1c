"""Draw runs side by side, ``clipkit plot RUN…``, and how near images and captions are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clipkit.data.images import read_image
from clipkit.errors import ArtifactError, DataError
from clipkit.reports import plots
from clipkit.reports.plots import Drawing
from clipkit.training.log import LOG_FILE, read_log

if TYPE_CHECKING:
    from PIL import Image

    from clipkit.models.encoder import Encoder


THUMBNAIL = 160
"""Longer side of the pictures above a similarity matrix, in pixels."""


def plot_runs(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    by: Literal["step", "time"] = "step",
) -> Drawing:
    """Draw the curves of runs over each other: loss, held-out recall, learning rate, throughput.

    Args:
        runs: directories of runs, finished, interrupted or under way.
        out: the PNG to write, if any.
        by: what runs to the right: steps, or minutes of training.

    Raises:
        ArtifactError: one of them is no run or has no step yet; ``out`` is no name for a PNG.
    """
    if out is not None and (Path(out).suffix.lower() != ".png" or Path(out).is_dir()):
        raise ArtifactError(f"{out} is no name for a picture, expected FILE.png")
    if not runs:
        raise ArtifactError("there is no run to draw, expected at least one directory")
    logs = {}
    for run in map(Path, runs):
        lines = read_log(run)
        if not any("loss" in line for line in lines):
            raise ArtifactError(_why_not(run))
        logs[_name(run, runs)] = lines
    drawing = plots.plot_runs(logs, by)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        drawing.save(Path(out))
    return drawing


def plot_similarity(
    encoder: "Encoder", images: "Sequence[str | Path | Image.Image]", captions: Sequence[str]
) -> Drawing:
    """Draw the cosines of a few images with a few captions.

    Args:
        encoder: the model.
        images: files or pictures.
        captions: any texts.

    Raises:
        DataError: there is no image or no caption.
        ImageError: a file cannot be read.
    """
    if not images or not captions:
        raise DataError(
            f"there are {len(images)} images and {len(captions)} captions to draw, expected at "
            "least one of each"
        )
    pictures = [read_image(Path(one)) if isinstance(one, str | Path) else one for one in images]
    cosines = encoder.encode_text(captions) @ encoder.encode_images(pictures).T
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return plots.plot_similarity(cosines, captions, small)


def _name(run: Path, runs: Sequence[str | Path]) -> str:
    """The directory's own name where no other run has it."""
    names = [Path(os.path.abspath(other)).name for other in runs]
    name = Path(os.path.abspath(run)).name
    return name if names.count(name) == 1 else str(run)


def _why_not(run: Path) -> str:
    if (run / LOG_FILE).is_file():
        return f"{run} has no step in its {LOG_FILE} yet; wait for one, or leave it out"
    found = "does not exist" if not run.exists() else f"has no {LOG_FILE}"
    return f"{run} {found}, expected the directory of a training run (clipkit train --out)"
