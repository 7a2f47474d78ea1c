"""What a measurement found, for pages, tables and comparisons."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipkit.data.images import Skipped
from clipkit.manifest import ModelRef
from clipkit.metrics import Classified, Estimate, Retrieved
from clipkit.pages.cards import card, table
from clipkit.pages.parts import bullets


@dataclass(frozen=True)
class Report:
    """What a measurement found.

    Attributes:
        task: ``"retrieval"`` or ``"zeroshot"``.
        model: the model measured.
        data: the source measured on, as it was named.
        fingerprint: of that source.
        settings: what else was chosen, for whoever measures the same again.
        counts: images, captions, classes, captions cut, images skipped.
        figures: each with its 95 % interval; shares in [0, 1], ranks from 1, logit scales.
        outcome: the single queries or items, as ``Retrieval`` or ``Classification``.
        notes: what to keep in mind about this data, in sentences.
        skipped: images that could not be used.
        cut: what was cut from captions over 77 tokens, in words; empty if nothing was.
    """

    task: str
    model: ModelRef
    data: str
    fingerprint: str
    settings: dict[str, Any]
    counts: dict[str, int]
    figures: dict[str, Estimate]
    outcome: "Retrieval | Classification"
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    cut: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """The figures without their intervals."""
        return {name: estimate.value for name, estimate in self.figures.items()}

    def _repr_html_(self) -> str:
        rows = [
            (name, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}")
            for name, one in self.figures.items()
        ]
        title = f"{self.task} on {self.data}: {self.counts['images']:,} images, {self.model}"
        return card(title, []) + table(("", "", "95 % interval"), rows) + bullets(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; what is no number is None."""
        return {
            "task": self.task,
            "model": str(self.model),
            "fingerprint": self.model.fingerprint,
            "precision": self.model.precision,
            "data": self.data,
            "data_fingerprint": self.fingerprint,
            "settings": self.settings,
            **self.counts,
            **{name: _known(value) for name, value in self.metrics.items()},
            "intervals": {
                name: [_known(one.low), _known(one.high)] for name, one in self.figures.items()
            },
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Retrieval:
    """The queries of a retrieval: the outcome of each direction beside what was asked.

    Attributes:
        found: outcomes by direction.
        keys: the images' keys.
        texts: the captions; equal ones once, if they were merged.
    """

    found: dict[str, Retrieved]
    keys: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Classification:
    """The items of a classification beside what was said of them.

    Attributes:
        found: what the classifier said.
        keys: the images' keys.
        labels: the classes.
        scale: the classifier's logit scale; fitted: the one at which right classes are likeliest
            on these items (None for fewer than 20).
    """

    found: Classified
    keys: list[str]
    labels: list[str]
    scale: float
    fitted: float | None


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None
