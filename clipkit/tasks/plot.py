"""Draw runs side by side: ``clipkit plot RUN…``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from clipkit import plots
from clipkit.errors import ArtifactError
from clipkit.model.log import LOG_FILE, read_log


def plot_runs(
    runs: Sequence[str | Path],
    out: str | Path = "runs.png",
    by: Literal["step", "time"] = "step",
) -> Path:
    """Draw the curves of runs over each other: loss, held-out recall, learning rate, throughput.

    Args:
        runs: directories of runs, finished, interrupted or under way.
        out: the PNG to write.
        by: what runs to the right: steps, or minutes of training.

    Returns:
        the file.

    Raises:
        ArtifactError: one of them is no run or has no step yet; ``out`` is no name for a PNG.
    """
    out = Path(out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ArtifactError(f"{out} is no name for a picture, expected FILE.png")
    if not runs:
        raise ArtifactError("there is no run to draw, expected at least one directory")
    logs = {}
    for run in map(Path, runs):
        lines = read_log(run)
        if not any("loss" in line for line in lines):
            raise ArtifactError(_why_not(run))
        logs[_name(run, runs)] = lines
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.plot_runs(logs, out, by)
    return out


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
