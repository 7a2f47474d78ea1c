"""The training loop: the steps of a run, and the logging, evaluation and checkpoints between them.

Each process of a run executes the same loop; every decision that depends on the clock or on a
signal is taken together, so that all processes stop at the same step.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipkit.artifacts import Manifest, ModelRef
from clipkit.config import LoopConfig, TrainConfig
from clipkit.data.loader import PairBatch, PairLoader
from clipkit.errors import DataError
from clipkit.evaluation.retrieval import retrieval_recall
from clipkit.models.checkpoint import save_checkpoint
from clipkit.models.tokenizer import TruncationReport
from clipkit.progress import Meter, print_status, progress_bar, share_done
from clipkit.training.data import ValidationSet, changed_data_warning
from clipkit.training.recovery import last_good_checkpoint, require_finite_steps, roll_back
from clipkit.training.run_directory import RunDirectory
from clipkit.training.step import StepReport, Trainer
from clipkit.training.warnings import RunMonitor

STREAM_EPOCH = 1000
"""Steps that count as an epoch of a stream, whose length is unknown."""


class StepOutcome(Enum):
    """What the loop does after a step."""

    CONTINUE = auto()
    """Take the next step."""
    FINISHED = auto()
    """The run is complete."""
    INTERRUPTED = auto()
    """A process was asked to stop."""
    NONFINITE_STEPS = auto()
    """Too many consecutive steps had a non-finite loss or gradient: roll back."""
    NONFINITE_MODEL = auto()
    """The weights or the held-out vectors are not finite: roll back."""


@dataclass(frozen=True)
class RunSummary:
    """The state of a run when it ends or stops, for its report.

    Attributes:
        path: run directory.
        state: finished, interrupted or failed.
        step: last step taken.
        seconds: training time.
        findings: preflight warnings.
        recall: last held-out recall.
        best: best held-out recall: ``step``, ``metric`` and ``value``.
        lines: training log.
        cut: captions truncated at 77 tokens.
        skipped: reason by key for each image that was not used.
        drawn: pairs drawn from each source of a mixture, by name.
        skipped_steps: steps skipped for a non-finite loss or gradient.
    """

    path: Path
    state: str
    step: int
    seconds: float
    findings: Sequence[str]
    recall: dict[str, float]
    best: dict[str, Any]
    lines: Sequence[dict[str, Any]]
    cut: TruncationReport
    skipped: dict[str, str]
    drawn: dict[str, int]
    skipped_steps: int


class CheckpointSchedule:
    """After which steps to evaluate and to save.

    Planned checkpoints depend on the step alone, so an interrupted run takes the same ones as an
    uninterrupted run. A checkpoint that the clock or an interruption causes is an interim one: the
    next checkpoint replaces it, and a run never rolls back to it.

    Args:
        config: of the run.
        epoch: steps per epoch; None for a stream.
        steps: total steps; 0 if only the clock ends the run.
        seconds: training time at the last checkpoint.
    """

    def __init__(self, config: LoopConfig, epoch: int | None, steps: int, seconds: float) -> None:
        self._config = config
        self._epoch = epoch or min(steps or STREAM_EPOCH, STREAM_EPOCH)
        self._saved_at, self._planned_step = seconds, -1

    def evaluates(self, step: int) -> bool:
        """Whether to evaluate on the held-out pairs after a step."""
        return self._is_due(step, self._config.eval_every_epochs)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is planned after a step."""
        every = self._config.keep_every_steps
        return self._is_due(step, self._config.save_every_epochs) or (
            every > 0 and step % every == 0
        )

    def is_overdue(self, seconds: float) -> bool:
        """Whether ``save_every_minutes`` have passed since the last checkpoint."""
        return seconds - self._saved_at >= 60 * self._config.save_every_minutes > 0

    def record(self, step: int, seconds: float, planned: bool) -> bool:
        """Record a checkpoint; returns whether it is an interim one."""
        self._saved_at = seconds
        self._planned_step = step if planned else self._planned_step
        return step != self._planned_step

    def _is_due(self, step: int, epochs: float) -> bool:
        return epochs > 0 and step % max(1, round(epochs * self._epoch)) == 0


class TrainingLoop:
    """The steps of a run, with logging, evaluation and checkpoints in between.

    Args:
        config: of the run, resolved.
        run: its directory. A checkpoint in it is resumed.
        trainer: the model and its optimizer.
        loader: training batches.
        held_out: pairs to evaluate on; None for no evaluation.
        steps: total steps; 0 if only the clock ends the run.
        cut: counts truncated captions; a stream's are counted during training.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        trainer: Trainer,
        loader: PairLoader,
        held_out: ValidationSet | None,
        steps: int,
        cut: TruncationReport,
    ) -> None:
        self.config, self.run, self.trainer, self.loader = config, run, trainer, loader
        self.world = trainer.world
        self.held_out, self.steps, self.cut = held_out, steps, cut
        self.cut_by_all = cut
        state = trainer.restore(run.checkpoint) if run.checkpoint else {}
        self._set_position(state)
        self.seconds = state.get("seconds", 0.0)
        self.schedule = CheckpointSchedule(
            config.train, loader.batches_per_epoch, steps, self.seconds
        )
        self.finished = self._progress() >= 1
        run.rewind(state.get("logged", 0))
        if changed := changed_data_warning(state, loader.source):
            self._warn("data", changed)
        self.monitor = RunMonitor(config, steps, run.lines())

    def _set_position(self, state: dict[str, Any]) -> None:
        """Continue from a training state; from the start if it is empty."""
        self.step, self.epoch, self.batch = (state.get(k, 0) for k in ("step", "epoch", "batch"))
        self.recall: dict[str, float] = state.get("recall", {})
        self.best: dict[str, Any] = state.get("best", {})
        if state:
            self.loader.restore(state["data"])
        if state and self.loader.source.streaming and self.world.is_main_process:
            self.cut.include(state["cut"])

    def run_steps(self, interrupted: list[int]) -> None:
        """Train until the run is finished, or until ``interrupted`` is not empty.

        A finished run ends with an evaluation. A run killed after its last checkpoint has had it.
        """
        if self.finished:
            return
        self._started = time.perf_counter() - self.seconds
        with progress_bar(
            total=self.steps or None,
            initial=self.step,
            unit="step",
            shown=self.world.is_main_process,
            desc="training",
        ) as bar:
            while True:
                outcome = self._take_steps(bar, interrupted)
                if outcome in (StepOutcome.FINISHED, StepOutcome.INTERRUPTED):
                    return
                self._roll_back(outcome)
                bar.update(self.step - bar.n)

    def _take_steps(self, bar: Any, interrupted: list[int]) -> StepOutcome:
        """Take steps until one has an outcome other than CONTINUE."""
        meter, recovery = Meter(), self.trainer.recovery
        for batch in meter.waiting(self._batches()):
            report = self.trainer.take_step(batch, self.step, self._progress(ahead=1))
            self.step += 1
            stop = self._synchronise(meter, len(batch), bool(interrupted))
            bar.update()
            if self.finished or self.step % self.config.train.log_every_steps == 0:
                bar.set_postfix_str(self._log(report, batch, meter))
            if recovery.consecutive_skipped == recovery.skipped_steps == 1:
                self._warn(
                    "skipped",
                    f"the loss or its gradient is not finite, so step {self.step} was skipped; "
                    "`skipped_steps` counts such steps",
                )
            if self.finished:
                return self._finish_steps()
            if recovery.consecutive_skipped >= self.config.train.max_nonfinite_steps:
                return StepOutcome.NONFINITE_STEPS
            # A run evaluates and saves at the same steps whether or not it is interrupted.
            outcome = self._after_step()
            if outcome is not StepOutcome.CONTINUE:
                return outcome
            if stop:
                return StepOutcome.INTERRUPTED
        raise AssertionError("batches never end")

    def _batches(self) -> Iterator[PairBatch]:
        """Batches from the present position, epoch after epoch."""
        while True:
            for batch in self.loader.batches(self.epoch, self.batch):
                self.batch += 1
                yield batch
            if not self.batch:
                raise DataError(
                    f"{self.loader.source.spec} has no pairs left to train on (a fraction of "
                    f"{self.config.data.val_fraction:g} is held out); run clipkit data check"
                )
            self.epoch, self.batch = self.epoch + 1, 0

    def _synchronise(self, meter: Meter, pairs: int, interrupted: bool) -> bool:
        """Agree on time, pairs and interruption; returns whether any process was interrupted.

        All processes go by the clock of the main process, in one all-reduce of three numbers. It
        runs on the CPU, so that no GPU is waited for.
        """
        seconds = time.perf_counter() - self._started if self.world.is_main_process else 0.0
        numbers = torch.tensor([seconds, interrupted, pairs], dtype=torch.float64)
        self.seconds, stop, all_pairs = self.world.add(numbers).tolist()
        meter.samples += int(all_pairs)
        self.finished = self._progress() >= 1
        return bool(stop > 0)

    def _progress(self, ahead: int = 0) -> float:
        """Completed fraction of the run, now or ``ahead`` steps later."""
        minutes = self.config.train.minutes
        return share_done(self.step + ahead, self.steps, self.seconds, minutes)

    def _log(self, report: StepReport, batch: PairBatch, meter: Meter) -> str:
        """Write a line of the log; returns a summary of it for the progress bar."""
        speed, waited = meter.read()
        line = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": report.loss,
            "chance_loss": self.trainer.chance_loss(batch),
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "scale": float(self.trainer.network.scale.detach()),
            "seconds": round(self.seconds, 3),
            "samples_per_second": round(speed, 1),
            "waiting_for_data": round(waited, 4),
        }
        if self.loader.drawn:
            line["drawn"] = self.drawn()
        self.run.log(line)
        for kind, warning in self.monitor.update(line):
            self._warn(kind, warning)
        return f"loss {report.loss:.3f}, {speed:.0f} samples/s"

    def _warn(self, kind: str, warning: str, **more: int) -> None:
        """Print a warning and write it to the log."""
        if self.world.is_main_process:
            print_status(f"warning: step {self.step}: {warning}")
        self.run.log({"step": self.step, "kind": kind, "warning": warning, **more})

    def _after_step(self) -> StepOutcome:
        """Evaluate and save if due."""
        best = False
        if self.schedule.evaluates(self.step):
            if not self._evaluate():
                return StepOutcome.NONFINITE_MODEL
            best = self.best.get("step") == self.step
        planned = best or self.schedule.saves(self.step)
        if planned and not self.trainer.is_finite():
            return StepOutcome.NONFINITE_MODEL
        # An interim checkpoint saves the run as it is, so that it resumes as if never stopped.
        if planned or self.schedule.is_overdue(self.seconds):
            self._save(planned)
        return StepOutcome.CONTINUE

    def _finish_steps(self) -> StepOutcome:
        """Evaluate after the last step."""
        require_finite_steps(
            self.trainer.recovery, f"no finite loss or gradient in {self.step} steps"
        )
        if not self._evaluate() or not self.trainer.is_finite():
            return StepOutcome.NONFINITE_MODEL
        return StepOutcome.FINISHED

    def _roll_back(self, outcome: StepOutcome) -> None:
        """Return to the last good checkpoint after a non-finite outcome."""
        if outcome is StepOutcome.NONFINITE_STEPS:
            count = self.trainer.recovery.consecutive_skipped
            reason = f"no finite loss or gradient in the {count} steps up to step {self.step}"
        else:
            reason = f"the model's weights or its vectors are not finite after step {self.step}"
        state, warning = roll_back(self.run, self.trainer, reason)
        self._warn("rollback", warning, rolled_back_to=state.get("step", 0))
        self._set_position(state)

    def _evaluate(self) -> bool:
        """Measure recall on the held-out pairs and log it; False if the vectors are not finite."""
        if self.held_out is None:
            return True
        recall = {}
        # The other processes wait, unless their shards of the weights are needed.
        if self.world.is_main_process or self.trainer.sharded:
            pairs = self.held_out.encode(self.trainer.towers.encoder(self.trainer.network))
            if np.isfinite(pairs.images).all() and np.isfinite(pairs.captions).all():
                recall = retrieval_recall(
                    pairs.images, pairs.captions, pairs.owners, texts=pairs.texts
                )
        recall = self.world.broadcast(recall)
        if not recall:
            return False
        self.recall = recall
        self.run.log({"step": self.step, "epoch": self.epoch, "held_out": self.recall})
        metric = self.config.train.best_metric
        if metric and self.recall[metric] > self.best.get("value", -math.inf):
            self.best = {"step": self.step, "metric": metric, "value": self.recall[metric]}
        return True

    def _save(self, planned: bool) -> ModelRef | None:
        """Write a checkpoint, planned or interim; returns None except on the main process."""
        interim = self.schedule.record(self.step, self.seconds, planned)
        self.cut_by_all = TruncationReport()
        for counts in self.world.all_gather_object(asdict(self.cut)):
            self.cut_by_all.include(counts)
        state = self.trainer.state() | {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "recall": self.recall,
            "best": self.best,
            "logged": self.run.logged,
            "source": self.loader.source.fingerprint,
            # A resumed stream would have to be read again to find what was skipped.
            "data": self.loader.state() | {"skipped": self.skipped()},
            "cut": asdict(self.cut_by_all),
        }
        towers = self.trainer.whole_towers()
        if not self.world.is_main_process:
            return None
        model = save_checkpoint(
            self.run.step_path(self.step),
            towers,
            state,
            {
                "step": self.step,
                "epoch": self.epoch,
                "held_out": self.recall,
                "best": self.best,
                "interim": interim,
            },
        )
        self.run.prune({self.best.get("step"), last_good_checkpoint(self.run, self.trainer)})
        return model

    def skipped(self) -> dict[str, str]:
        """Why images were skipped, by key: found on opening the source or on reading it."""
        found = {s.key: s.reason for s in self.loader.source.skipped} | self.loader.skipped
        return dict(sorted(found.items()))

    def drawn(self) -> dict[str, int]:
        """Pairs drawn from each source of a mixture, by name; empty for a single source."""
        names = [part.name for part in self.loader.source.parts]
        return dict(zip(names, self.loader.drawn, strict=True))

    def summary(self, state: str, findings: Sequence[str]) -> RunSummary:
        """The state of the run, for its report.

        Args:
            state: how the run ended.
            findings: preflight warnings.
        """
        return RunSummary(
            path=self.run.path,
            state=state,
            step=self.step,
            seconds=self.seconds,
            findings=findings,
            recall=self.recall,
            best=self.best,
            lines=self.run.lines(),
            cut=self.cut_by_all,
            skipped=self.skipped(),
            drawn=self.drawn(),
            skipped_steps=self.trainer.recovery.skipped_steps,
        )

    def save(self) -> ModelRef | None:
        """Write the last checkpoint; returns None except on the main process."""
        return self._save(planned=self.finished)

    def finish(self, model: ModelRef) -> None:
        """Write the manifest of a finished run."""
        source = {"data": self.loader.source.spec, "fingerprint": self.loader.source.fingerprint}
        detail = {
            "held_out": self.recall,
            "best": self.best,
            "seconds": round(self.seconds, 1),
            "skipped_steps": self.trainer.recovery.skipped_steps,
            "skipped_images": len(self.skipped()),
            "cut_captions": asdict(self.cut_by_all),
            **({"drawn": self.drawn()} if self.loader.drawn else {}),
        }
        self.run.finish(Manifest("run", model, self.step, source, detail))
