"""Plot training runs together, ``clipkit plot RUN…``, and similarities of images and captions."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from clipkit.arguments import require_choice
from clipkit.data.images import read_image
from clipkit.errors import ArtifactError, DataError
from clipkit.reports import plots
from clipkit.reports.plots import Drawing
from clipkit.training.log import LOG_FILE, read_log

if TYPE_CHECKING:
    from clipkit.models.encoder import Encoder


THUMBNAIL_SIDE = 160
"""Longer side of the images above a similarity matrix, in pixels."""


def plot_runs(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    by: Literal["step", "time"] = "step",
) -> Drawing:
    """Plot the curves of runs together: loss, held-out recall, learning rate, throughput.

    Args:
        runs: directories of one or several runs, finished or not.
        out: the PNG to write, if any.
        by: the x axis: steps, or minutes of training.

    Raises:
        ArtifactError: a directory is not a run or has no step yet; ``out`` is not a PNG file name.
    """
    require_choice("by", by, ("step", "time"))
    if out is not None and (Path(out).suffix.lower() != ".png" or Path(out).is_dir()):
        raise ArtifactError(f"{out} is not a PNG file name, expected FILE.png")
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    if not folders:
        raise ArtifactError("no run to plot, expected at least one directory")
    logs = {}
    for run in map(Path, folders):
        lines = read_log(run)
        if not any("loss" in line for line in lines):
            raise ArtifactError(_why_not(run))
        logs[_name(run, folders)] = lines
    drawing = plots.plot_runs(logs, by)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        drawing.save(out)
    return drawing


def plot_similarity(
    images: "str | Path | Image.Image | Sequence[str | Path | Image.Image]",
    captions: str | Sequence[str],
    encoder: "Encoder | None" = None,
) -> Drawing:
    """Plot the cosine similarities of a few images and captions.

    Args:
        images: one or several paths or PIL images.
        captions: one or several captions.
        encoder: the model; None loads the default model.

    Raises:
        DataError: there is no image or no caption.
        ImageError: a file cannot be read.
    """
    many = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    texts = [captions] if isinstance(captions, str) else list(captions)
    if not many or not texts:
        raise DataError(
            f"got {len(many)} images and {len(texts)} captions, expected at least one of each"
        )
    if encoder is None:
        from clipkit.models.loading import load_model

        encoder = load_model()
    opened = [read_image(Path(one)) if isinstance(one, str | Path) else one for one in many]
    cosines = encoder.encode_text(texts) @ encoder.encode_images(opened).T
    small = [image.copy() for image in opened]
    for image in small:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return plots.plot_similarity(cosines, texts, small)


def _name(run: Path, runs: Sequence[str | Path]) -> str:
    """The name of the directory, or its path if another run has the same name."""
    names = [Path(os.path.abspath(other)).name for other in runs]
    name = Path(os.path.abspath(run)).name
    return name if names.count(name) == 1 else str(run)


def _why_not(run: Path) -> str:
    if (run / LOG_FILE).is_file():
        return f"{run} has not logged a step in its {LOG_FILE} yet; wait, or leave it out"
    found = "does not exist" if not run.exists() else f"has no {LOG_FILE}"
    return f"{run} {found}, expected the directory of a training run (clipkit train --out)"
