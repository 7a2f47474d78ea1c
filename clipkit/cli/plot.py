"""clipkit plot."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import print_facts


class Axis(StrEnum):
    """What runs to the right."""

    step = "step"
    time = "time"


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("runs.png"),
    by: Annotated[Axis, typer.Option(help="Over steps, or over minutes of training.")] = Axis.step,
) -> None:
    """Draw the curves of training runs over each other.

    Loss, held-out recall, learning rate and throughput; of runs under way too.
    """
    from clipkit.tasks.plot import plot_runs

    plot_runs(runs, out, by.value)
    print_facts([("picture", out)])
