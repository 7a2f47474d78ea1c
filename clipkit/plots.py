"""Pictures of a run: pure functions from log lines to PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LogLine = dict[str, Any]


def plot_run(lines: Sequence[LogLine], file: Path, title: str) -> None:
    """Draw the loss and the held-out recall of a run over its steps.

    Args:
        lines: the lines of log.jsonl.
        file: the PNG to write.
        title: what to write above.
    """
    # Imported here because matplotlib takes a second; the object interface keeps no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [line for line in lines if "loss" in line]
    left.plot([line["step"] for line in losses], [line["loss"] for line in losses], color="#1f6feb")
    left.set(xlabel="step", ylabel="InfoNCE loss", title=title)
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
    figure.savefig(file, dpi=110)
