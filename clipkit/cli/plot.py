"""clipkit plot."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipkit.cli.options import Json
from clipkit.cli.output import print_result


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("runs.png"),
    by: Annotated[
        Literal["step", "time"], typer.Option(help="Horizontal axis: steps, or minutes.")
    ] = "step",
    as_json: Json = False,
) -> None:
    """Plot the curves of training runs in one image.

    Shows loss, held-out recall, learning rate and throughput, also of unfinished runs.
    """
    from clipkit.tasks.plot import plot_runs

    plot_runs(runs, out, by)
    print_result({"image": str(out)}, as_json)
