"""What a person should hear of a run under way: a loss that learns nothing, and the like."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from clipkit.config import TrainConfig
from clipkit.progress import share_done
from clipkit.training.optim import MAX_LOGIT_SCALE

Line = dict[str, Any]

WINDOW_STEPS, FEWEST_LINES = 100, 5
"""Over so many steps, and so many lines of the log, a state must last to be one."""
STUCK = 0.98
"""Share of the loss of guessing above which a model has learned nothing yet."""
PINNED = 0.999 * math.exp(MAX_LOGIT_SCALE)


class Watch:
    """Reads the log of a run as it grows and raises each alarm once.

    What it says depends on the lines alone, so that a resumed run says the same.

    Args:
        config: of the run.
        steps: of the whole run; 0 where only the clock ends it.
        lines: of the log so far.
    """

    def __init__(self, config: TrainConfig, steps: int, lines: Iterable[Line]) -> None:
        self.config, self.steps = config, steps
        count = max(FEWEST_LINES, math.ceil(WINDOW_STEPS / config.train.log_every_steps))
        self._recent: deque[Line] = deque(maxlen=count)
        self._said: set[str] = set()
        for line in lines:
            self._said.add(line.get("about", ""))
            self._take(line)

    def see(self, line: Line) -> Iterator[tuple[str, str]]:
        """Take in a new line of the log.

        Yields:
            what an alarm is about, in a word, and the alarm.
        """
        self._take(line)
        if len(self._recent) < (self._recent.maxlen or 0):
            return
        for about, alarm in (
            ("stuck", self._stuck()),
            ("temperature", self._temperature()),
            ("waiting", self._waiting()),
        ):
            if alarm and about not in self._said:
                self._said.add(about)
                yield about, alarm

    def _take(self, line: Line) -> None:
        # A step that was left out, whose loss is NaN, tells nothing about what is learned; what
        # guessing gives stands in no older log.
        if "guess" not in line or not math.isfinite(line["loss"]):
            return
        if self._recent and line["step"] <= self._recent[-1]["step"]:
            self._recent.clear()  # the run went back
        self._recent.append(line)

    def _mean(self, name: str) -> float:
        return math.fsum(line[name] for line in self._recent) / len(self._recent)

    def _span(self) -> int:
        return int(self._recent[-1]["step"] - self._recent[0]["step"])

    def _stuck(self) -> str:
        loss, guess = self._mean("loss"), self._mean("guess")
        first, minutes = self._recent[0], self.config.train.minutes
        done = share_done(first["step"], self.steps, first["seconds"], minutes)
        if done < self.config.optim.warmup or not loss >= STUCK * guess:
            return ""
        return (
            f"after the warm-up the loss has averaged {loss:.3f} for {self._span()} steps, and "
            f"guessing gives {guess:.3f} on the same batches: nothing is learned; likely causes "
            f"are a rate too high or too low (optim.lr is {self.config.optim.lr:g}), captions "
            "that do not belong to their images or are all alike (see clipkit data check), frozen "
            "towers, or a temperature far off (optim.temperature is "
            f"{self.config.optim.temperature:g})"
        )

    def _temperature(self) -> str:
        if min(line["scale"] for line in self._recent) < PINNED:
            return ""
        return (
            f"the temperature has been at its limit (a logit scale of 100) for {self._span()} "
            "steps: the model is as sure of its pairs as it may be; on little data that means it "
            "knows them by heart (more data or augmentation, fewer epochs), early in a run that "
            f"the rate is too high (optim.lr is {self.config.optim.lr:g})"
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
