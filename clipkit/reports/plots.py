"""Plots of runs, maps, similarities and confusions: pure functions from numbers to figures.

matplotlib is imported inside the functions because it takes half a second; they use its object
interface, which keeps no global state.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL import Image


LogLine = dict[str, Any]
MAX_NAMED = 60
"""A confusion matrix of more classes has no names at its axes."""
_SMOOTHED = 10
"""Lines over which the loss of several runs is averaged."""


@dataclass(frozen=True)
class Drawing:
    """A plot, shown as an image in a notebook.

    Attributes:
        figure: matplotlib's figure.
    """

    figure: "Figure"

    def save(self, file: "str | Path | BytesIO") -> None:
        """Write the plot as a PNG."""
        self.figure.savefig(file, dpi=110, format="png")

    def _repr_png_(self) -> bytes:
        stream = BytesIO()
        self.save(stream)
        return stream.getvalue()


def plot_run(lines: Sequence[LogLine], title: str) -> Drawing:
    """Plot the loss and the held-out recall of a run over its steps.

    Args:
        lines: the lines of log.jsonl.
        title: written above.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [line for line in lines if "loss" in line]
    left.plot([line["step"] for line in losses], [line["loss"] for line in losses], color="#1f6feb")
    left.set(xlabel="step", ylabel="InfoNCE loss", title=as_text(title))
    measured = [line for line in lines if "held_out" in line]
    for name, colour in (("text_to_image", "#d1242f"), ("image_to_text", "#1a7f37")):
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            right.plot(
                [line["step"] for line in measured],
                [line["held_out"][f"{name}_r{k}"] for line in measured],
                style,
                color=colour,
                marker="." if len(measured) < 30 else None,
                label=f"{name.replace('_', ' ')} @{k}",
            )
    right.set(xlabel="step", ylabel="recall", ylim=(0, 1), title="held-out retrieval")
    if measured:
        right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return Drawing(figure)


def plot_runs(logs: Mapping[str, Sequence[LogLine]], by: Literal["step", "time"]) -> Drawing:
    """Plot several runs together: loss, held-out recall, learning rate, throughput.

    Args:
        logs: the lines of log.jsonl of each run, by its name.
        by: the x axis: steps, or minutes of training.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    titles = ("InfoNCE loss", "held-out recall", "learning rate", "samples per second")
    for number, (name, lines) in enumerate(logs.items()):
        colour = f"C{number % 10}"
        x, loss = curve(lines, by, lambda line: line.get("loss"))
        panels[0].plot(x, loss, color=colour, alpha=0.25, linewidth=0.8)
        name = as_text(name)
        panels[0].plot(x, smooth(loss), color=colour, label=name)
        for direction, style in (("text_to_image", "-"), ("image_to_text", ":")):
            at, recall = curve(lines, by, lambda line, d=direction: _recall(line, d))  # type: ignore[misc]
            label = f"{name} {direction.replace('_', ' ')} R@1"
            panels[1].plot(at, recall, style, marker=".", color=colour, label=label)
        panels[2].plot(*curve(lines, by, lambda line: line.get("lr")), color=colour, label=name)
        speed = curve(lines, by, lambda line: line.get("samples_per_second"))
        panels[3].plot(*speed, color=colour, label=name)
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xlabel="step" if by == "step" else "minutes", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in panels[1:]:
        axes.set_ylim(bottom=0)
    return Drawing(figure)


def plot_map(
    places: "NDArray[np.float32]",
    clusters: "NDArray[np.int64]",
    names: Sequence[tuple[str, float, float]],
    title: str,
) -> Drawing:
    """Plot the projection of a collection, coloured by cluster.

    Args:
        places: float [n, 2]; y points down, as on the page.
        clusters: int [n].
        names: of the clusters, each with its x and y.
        title: written above.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(10, 10), layout="constrained")
    axes = figure.subplots()
    size = min(40.0, 6e4 / len(places))
    axes.scatter(
        places[:, 0],
        places[:, 1],
        s=size,
        c=clusters % 20,
        cmap="tab20",
        vmin=0,
        vmax=19,
        linewidths=0,
    )
    outline = [withStroke(linewidth=3, foreground="white")]
    for name, x, y in names:
        axes.text(x, y, name, ha="center", va="center", weight="bold", path_effects=outline)
    axes.set(title=title, aspect="equal")
    axes.invert_yaxis()
    axes.axis("off")
    return Drawing(figure)


def plot_similarity(
    cosines: "NDArray[np.float32]", captions: Sequence[str], images: "Sequence[Image.Image]"
) -> Drawing:
    """Plot cosine similarities of captions (rows) and images (columns).

    Args:
        cosines: float [captions, images].
        captions: written beside the rows.
        images: drawn above the columns, one each.
    """
    from matplotlib.figure import Figure

    rows, columns = cosines.shape
    size = (3.5 + 0.9 * columns, 1.6 + 0.45 * rows)
    figure = Figure(figsize=size, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(0.9, 0.45 * rows), sharex=True)
    for column, image in enumerate(images):
        side = max(image.size)
        half = (0.46 * image.width / side, 0.46 * image.height / side)
        corners = (column - half[0], column + half[0], half[1], -half[1])
        above.imshow(image, extent=corners, aspect="equal")
    above.set(xlim=(-0.5, columns - 0.5), ylim=(0.5, -0.5))
    above.axis("off")
    below.imshow(cosines, cmap="viridis", aspect="auto")
    below.set_yticks(range(rows), [shorten(text, 60, placeholder=" …") for text in captions])
    below.set_xticks([])
    middle = (float(cosines.min()) + float(cosines.max())) / 2
    for row in range(rows):
        for column in range(columns):
            value = float(cosines[row, column])
            colour = "white" if value < middle else "black"
            below.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    return Drawing(figure)


def plot_confusion(counts: "NDArray[np.int64]", labels: Sequence[str]) -> Drawing:
    """Plot a confusion matrix, each row as shares of its class.

    Args:
        counts: int [classes, classes]: items of a class (row) by prediction (column).
        labels: the classes; written for at most 60 of them.
    """
    from matplotlib.figure import Figure

    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = min(14.0, 3 + 0.3 * len(labels))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(labels) <= MAX_NAMED:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= 15:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.5 else "black"
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=colour)
    figure.colorbar(drawn, label="share of the class", shrink=0.7)
    return Drawing(figure)


def _recall(line: LogLine, direction: str) -> float | None:
    return line["held_out"][f"{direction}_r1"] if "held_out" in line else None


def curve(
    lines: Sequence[LogLine],
    by: Literal["step", "time"],
    value: Callable[[LogLine], float | None],
) -> tuple[list[float], list[float]]:
    """The x and y of a curve, with a gap wherever the run was rolled back.

    Args:
        lines: the lines of log.jsonl.
        by: steps, or minutes; a line without a time has that of the line before it.
        value: gives y of a line; None leaves the line out.
    """
    x: list[float] = []
    y: list[float] = []
    minutes = 0.0
    for line in lines:
        minutes = line.get("seconds", 60 * minutes) / 60
        number = value(line)
        if number is None:
            continue
        place = line["step"] if by == "step" else minutes
        if x and place < x[-1]:
            x.append(math.nan)
            y.append(math.nan)
        x.append(place)
        y.append(number)
    return x, y


def as_text(name: str) -> str:
    """A name that matplotlib writes as it is: no formula between dollars, not hidden in legends."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def smooth(values: Sequence[float]) -> list[float]:
    """Means of the last 10 values since the last gap."""
    result: list[float] = []
    window: list[float] = []
    for value in values:
        window = [*window, value][-_SMOOTHED:] if math.isfinite(value) else []
        result.append(math.fsum(window) / len(window) if window else math.nan)
    return result
