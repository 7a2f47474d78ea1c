"""When a run measures, and when it saves."""

from clipkit.config import LoopConfig

STREAM_EPOCH = 1000
"""Steps that count as an epoch of a stream, whose length is not known."""


class Timetable:
    """What is due after a step, by plan or by the clock.

    What is planned depends on the step alone, so that a run is the same however often it is
    interrupted. A checkpoint between, which the clock or an interruption asks for, is an interim
    one: the next one takes its place, and the run never goes back to it.

    Args:
        config: of the run.
        epoch: steps in an epoch; None for a stream.
        steps: of the whole run; 0 where only the clock ends it.
        seconds: that the run took to its last checkpoint.
    """

    def __init__(self, config: LoopConfig, epoch: int | None, steps: int, seconds: float) -> None:
        self._config = config
        self._epoch = epoch or min(steps or STREAM_EPOCH, STREAM_EPOCH)
        self._saved, self._planned = seconds, -1

    def measures(self, step: int) -> bool:
        """Whether the held-out pairs are to be measured on after a step."""
        return self._falls_on(step, self._config.eval_epochs)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is planned after a step."""
        every = self._config.keep_every
        return self._falls_on(step, self._config.save_epochs) or (every > 0 and step % every == 0)

    def is_late(self, seconds: float) -> bool:
        """Whether the last checkpoint lies too long ago."""
        return seconds - self._saved >= 60 * self._config.save_minutes > 0

    def note(self, step: int, seconds: float, planned: bool) -> bool:
        """Take note of a checkpoint; whether it is an interim one."""
        self._saved = seconds
        self._planned = step if planned else self._planned
        return step != self._planned

    def _falls_on(self, step: int, epochs: float) -> bool:
        return epochs > 0 and step % max(1, round(epochs * self._epoch)) == 0
