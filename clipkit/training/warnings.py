"""Warnings during a run: a loss at chance level, a saturated temperature, waiting for images."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from clipkit.config import TrainConfig
from clipkit.progress import share_done
from clipkit.training.optim import MAX_LOGIT_SCALE

Line = dict[str, Any]

WINDOW_STEPS, MIN_LINES = 100, 5
"""Steps, and at least so many lines of the log, that a condition must last before a warning."""
STUCK_RATIO = 0.98
"""Ratio of loss to chance loss above which a model has learned nothing yet."""
SATURATED_SCALE = 0.999 * math.exp(MAX_LOGIT_SCALE)


class RunMonitor:
    """Follows the log of a run and issues each kind of warning once.

    Warnings depend on the log alone, so a resumed run issues the same ones.

    Args:
        config: of the run.
        steps: total steps; 0 if only the clock ends the run.
        lines: the log so far.
    """

    def __init__(self, config: TrainConfig, steps: int, lines: Iterable[Line]) -> None:
        self.config, self.steps = config, steps
        count = max(MIN_LINES, math.ceil(WINDOW_STEPS / config.train.log_every_steps))
        self._recent: deque[Line] = deque(maxlen=count)
        self._issued: set[str] = set()
        for line in lines:
            self._issued.add(line.get("kind", ""))
            self._append(line)

    def update(self, line: Line) -> Iterator[tuple[str, str]]:
        """Add a line of the log; yields the kind and text of each new warning."""
        self._append(line)
        if len(self._recent) < (self._recent.maxlen or 0):
            return
        for kind, warning in (
            ("stuck", self._stuck()),
            ("temperature", self._temperature()),
            ("waiting", self._waiting()),
        ):
            if warning and kind not in self._issued:
                self._issued.add(kind)
                yield kind, warning

    def _append(self, line: Line) -> None:
        # Skipped steps, whose loss is NaN, say nothing about learning.
        if "chance_loss" not in line or not math.isfinite(line["loss"]):
            return
        if self._recent and line["step"] <= self._recent[-1]["step"]:
            self._recent.clear()  # the run was rolled back
        self._recent.append(line)

    def _mean(self, name: str) -> float:
        return math.fsum(line[name] for line in self._recent) / len(self._recent)

    def _span(self) -> int:
        return int(self._recent[-1]["step"] - self._recent[0]["step"])

    def _stuck(self) -> str:
        loss, chance = self._mean("loss"), self._mean("chance_loss")
        first, minutes = self._recent[0], self.config.train.minutes
        done = share_done(first["step"], self.steps, first["seconds"], minutes)
        if done < self.config.optim.warmup or not loss >= STUCK_RATIO * chance:
            return ""
        return (
            f"the loss has averaged {loss:.3f} for {self._span()} steps after the warm-up, and "
            f"chance level is {chance:.3f}: nothing is learned. Likely causes: a learning rate too "
            f"high or too low (optim.lr is {self.config.optim.lr:g}), captions that do not match "
            "their images or are all alike (see clipkit data check), frozen towers, or a bad "
            f"temperature (optim.temperature is {self.config.optim.temperature:g})"
        )

    def _temperature(self) -> str:
        if min(line["scale"] for line in self._recent) < SATURATED_SCALE:
            return ""
        return (
            f"the temperature has been at its limit (a logit scale of 100) for {self._span()} "
            "steps. On little data this means that the model memorises its pairs (use more data "
            "or augmentation, or fewer epochs); early in a run, that the learning rate is too high "
            f"(optim.lr is {self.config.optim.lr:g})"
        )

    def _waiting(self) -> str:
        share = self._mean("waiting_for_data")
        if share <= 0.5:
            return ""
        data = self.config.data
        return (
            f"{share:.0%} of the last {self._span()} steps' time was spent waiting for images: "
            f"raise data.workers (now {data.workers}) if cores are idle, cache decoded images with "
            f'data.image_cache = "yes" (now {data.image_cache}), decode with data.decode = "fast" '
            f"(now {data.decode}), or store smaller images, near the model's input size"
        )
