"""A run's log as TensorBoard event files (extra ``tensorboard``)."""

from pathlib import Path
from typing import Any

from clipkit.errors import MissingExtraError

BOARD = "tensorboard"
_SCALARS = ("loss", "guess", "lr", "scale", "grad_norm", "samples_per_second", "waiting_for_data")


def require_tensorboard() -> Any:
    """The class that writes event files; raises MissingExtraError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "train.tensorboard is set and tensorboard is not installed; "
            "pip install 'clipkit[tensorboard]', or leave train.tensorboard out"
        ) from None
    return SummaryWriter


class Board:
    """Event files in ``RUN/tensorboard``.

    Args:
        run: the directory of the run.
        step: the last step that stands; what was written of later ones is withdrawn.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._folder = run / BOARD
        self._open(step)

    def _open(self, step: int) -> None:
        # A reader drops what it has read of the steps from purge_step on.
        self._writer = require_tensorboard()(str(self._folder), purge_step=step + 1)

    def add(self, line: dict[str, Any]) -> None:
        """Write a line of log.jsonl; on disk when this returns, so that a kill loses nothing."""
        for name in _SCALARS:
            if name in line:
                self._writer.add_scalar(name, line[name], line["step"])
        for name, value in line.get("held_out", {}).items():
            self._writer.add_scalar(f"held_out/{name}", value, line["step"])
        self._writer.flush()
        if "back_to" in line:
            self.close()
            self._open(line["back_to"])

    def close(self) -> None:
        """Write no more."""
        self._writer.close()
