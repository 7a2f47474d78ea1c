"""Measure an index with captions: ``clipkit index calibrate``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import ArtifactError
from clipkit.manifest import ModelRef
from clipkit.store.auto import remeasure
from clipkit.store.calibration import Calibration
from clipkit.store.questions import make_questions, write_calibration
from clipkit.store.tune import Measured
from clipkit.store.vector_index import VectorIndex

if TYPE_CHECKING:
    from clipkit.model.encoder import Encoder
    from clipkit.model.query import QueryEncoder


@dataclass(frozen=True)
class Calibrated:
    """What captions told of an index.

    Attributes:
        measured: what they find, against exact search.
        calibration: how its scores become probabilities.
    """

    measured: Measured
    calibration: Calibration

    @property
    def source(self) -> str:
        """Where the captions come from."""
        return self.calibration.source

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        told = {name: getattr(self.calibration, name) for name in ("auroc", "error", "captions")}
        return {**self.measured.to_dict(), **told, "source": self.source}


def calibrate_index(
    path: str | Path, load_text: "Callable[[ModelRef, str], Encoder | QueryEncoder]"
) -> Calibrated:
    """Measure what captions find in an index, and write how its scores are to be read into it.

    Args:
        path: the index.
        load_text: gives the encoder of a model's captions; told which model, and of what.

    Raises:
        ArtifactError: no index, damaged, empty, or another process is writing it.
        ModelError: its model is out of reach.
    """
    index = VectorIndex.open(path)
    if not len(index):
        raise ArtifactError(f"{path} is empty, expected images to measure scores of; add some")
    encode = load_text(index.model, f"the index {path}").encode_captions
    questions = make_questions((table for _, table in index.shards()), encode)
    measured = remeasure(index, questions.captions)
    return Calibrated(measured, write_calibration(path, questions, measured))
