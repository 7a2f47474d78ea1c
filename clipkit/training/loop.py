"""When a run measures, and when it saves.

The steps of a training run, and what happens between them.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipkit.artifacts import Manifest, ModelRef
from clipkit.config import LoopConfig, TrainConfig
from clipkit.data.loader import PairBatch, PairLoader
from clipkit.errors import DataError
from clipkit.evaluation.retrieval import retrieval_recall
from clipkit.models.checkpoint import save_checkpoint
from clipkit.models.tokenizer import TruncationReport
from clipkit.progress import Meter, print_status, share_done
from clipkit.training.data import HeldOut, other_data
from clipkit.training.recovery import FIRST_BAD, go_back, place_to_return, require_finite_steps
from clipkit.training.run_directory import RunDirectory
from clipkit.training.step import Learner, StepReport
from clipkit.training.warnings import Watch

STREAM_EPOCH = 1000
"""Steps that count as an epoch of a stream, whose length is not known."""


@dataclass(frozen=True)
class Outcome:
    """The state of a run when it ends or stops, for its report.

    Attributes:
        path: run directory.
        state: how it ended: finished, interrupted or given up.
        step: last step taken.
        seconds: training time.
        findings: preflight warnings.
        recall: last held-out recall.
        best: best held-out recall: ``step``, ``metric`` and ``value``.
        lines: training log.
        cut: captions truncated at 77 tokens.
        skipped: reason by key for each image that was not used.
        skipped_steps: steps skipped for a non-finite gradient.
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
    skipped_steps: int


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
        return self._falls_on(step, self._config.eval_every_epochs)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is planned after a step."""
        every = self._config.keep_every_steps
        return self._falls_on(step, self._config.save_every_epochs) or (
            every > 0 and step % every == 0
        )

    def is_late(self, seconds: float) -> bool:
        """Whether the last checkpoint lies too long ago."""
        return seconds - self._saved >= 60 * self._config.save_every_minutes > 0

    def note(self, step: int, seconds: float, planned: bool) -> bool:
        """Take note of a checkpoint; whether it is an interim one."""
        self._saved = seconds
        self._planned = step if planned else self._planned
        return step != self._planned

    def _falls_on(self, step: int, epochs: float) -> bool:
        return epochs > 0 and step % max(1, round(epochs * self._epoch)) == 0


class TrainingLoop:
    """The steps of a run, with what is logged, measured and saved between them.

    Args:
        config: of the run, resolved.
        run: its directory; a checkpoint in it is where the run goes on.
        learner: what is trained.
        loader: what it is trained on.
        held_out: what it is measured on, if anything.
        steps: of the whole run; 0 where only the clock ends it.
        cut: what is cut of the captions; a stream's are counted as they come.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        learner: Learner,
        loader: PairLoader,
        held_out: HeldOut | None,
        steps: int,
        cut: TruncationReport,
    ) -> None:
        self.config, self.run, self.learner, self.loader = config, run, learner, loader
        self.world = learner.world
        self.held_out, self.steps, self.cut = held_out, steps, cut
        self.cut_by_all = cut
        self.step = self.epoch = self.batch = 0
        state = learner.restore(run.checkpoint) if run.checkpoint else {}
        self._stand(state)
        self.seconds = state.get("seconds", 0.0)
        epoch = loader.batches_per_epoch
        self.timetable = Timetable(config.train, epoch, steps, self.seconds)
        self.finished = self._progress() >= 1
        run.rewind(state.get("logged", 0))
        if found := other_data(state, loader.source):
            self._alarm("data", found)
        self.watch = Watch(config, steps, run.lines())

    def _stand(self, state: dict[str, Any]) -> None:
        """Stand where a training state says; at the start for an empty one."""
        self.broken = False
        self.step, self.epoch, self.batch = (state.get(k, 0) for k in ("step", "epoch", "batch"))
        self.recall: dict[str, float] = state.get("recall", {})
        self.best: dict[str, Any] = state.get("best", {})
        if state:
            self.loader.restore(state["data"])
        if state and self.loader.source.streaming and self.world.is_main_process:
            self.cut.include(state["cut"])

    def run_steps(self, interrupted: list[int]) -> None:
        """Take the steps that are left, until the end or until something is ``interrupted``.

        At the end the run is measured; one that was killed after its last checkpoint is there.
        """
        if self.finished:
            return
        self._started = time.perf_counter() - self.seconds
        with tqdm(
            total=self.steps or None,
            initial=self.step,
            unit="step",
            disable=None if self.world.is_main_process else True,
            desc="training",
        ) as bar:
            while not self._take_steps(bar, interrupted):
                state, sentence = go_back(self.run, self.learner, self.step, self.broken)
                self._alarm("return", sentence, back_to=state.get("step", 0))
                self._stand(state)
                bar.update(self.step - bar.n)

    def _take_steps(self, bar: Any, interrupted: list[int]) -> bool:
        """Take steps until the run ends (True), or until too many in a row were bad (False)."""
        meter, health = Meter(), self.learner.health
        for batch in meter.waiting(self._batches()):
            report = self.learner.take_step(batch, self.step, self._progress(ahead=1))
            self.step += 1
            # All end at the same step: by the clock of the first, or when one is interrupted.
            told = self.world.all_gather_object(
                (time.perf_counter() - self._started, bool(interrupted), len(batch))
            )
            self.seconds, stop = told[0][0], any(stop for _, stop, _ in told)
            self.finished = self._progress() >= 1
            meter.samples += sum(pairs for *_, pairs in told)
            bar.update()
            # Interrupted or not, a run logs and measures at the same steps.
            if self.finished or self.step % self.config.train.log_every_steps == 0:
                bar.set_postfix_str(self._log(report, batch, meter))
            if health.bad_in_a_row == health.skipped_steps == 1:
                self._alarm("skipped", FIRST_BAD.format(step=self.step))
            if self.finished:
                break
            if health.bad_in_a_row >= self.config.train.max_nonfinite_steps:
                return False
            self._between_steps()
            if stop or self.broken:
                break
        if self.finished:
            require_finite_steps(health, f"no finite loss or gradient in {self.step} steps")
            self._measure()
            self.broken = self.broken or not self.learner.is_finite()
        return not self.broken

    def _batches(self) -> Iterator[PairBatch]:
        """Batches from where the run stands, epoch after epoch."""
        while True:
            for batch in self.loader.batches(self.epoch, self.batch):
                self.batch += 1
                yield batch
            if not self.batch:
                raise DataError(
                    f"{self.config.data.train} holds no pair to train on (a share of "
                    f"{self.config.data.val_fraction:g} was held out); see clipkit data check"
                )
            self.epoch, self.batch = self.epoch + 1, 0

    def _progress(self, ahead: int = 0) -> float:
        """Share of the run done, or that it will be with so many steps more."""
        minutes = self.config.train.minutes
        return share_done(self.step + ahead, self.steps, self.seconds, minutes)

    def _log(self, report: StepReport, batch: PairBatch, meter: Meter) -> str:
        """Write a line of the log; the same in short for the progress bar."""
        speed, waited = meter.read()
        line = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": report.loss,
            "guess": self.learner.guess(batch),
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "scale": float(self.learner.network.scale.detach()),
            "seconds": round(self.seconds, 3),
            "samples_per_second": round(speed, 1),
            "waiting_for_data": round(waited, 4),
        }
        self.run.log(line)
        for about, alarm in self.watch.see(line):
            self._alarm(about, alarm)
        return f"loss {report.loss:.3f}, {speed:.0f} samples/s"

    def _alarm(self, about: str, sentence: str, **more: int) -> None:
        """Tell a person, and the log."""
        if self.world.is_main_process:
            print_status(f"warning: step {self.step}: {sentence}")
        self.run.log({"step": self.step, "about": about, "alarm": sentence, **more})

    def _between_steps(self) -> None:
        is_best = self.timetable.measures(self.step) and self._measure()
        planned = is_best or self.timetable.saves(self.step)
        self.broken = self.broken or (planned and not self.learner.is_finite())
        # An interim checkpoint is of the run as it is, so that it goes on as if never stopped.
        if not self.broken and (planned or self.timetable.is_late(self.seconds)):
            self._save(planned)

    def _measure(self) -> bool:
        """Recall on the held-out pairs, into the log; whether it is the best so far.

        A model whose vectors are not finite is ``broken``, and its run has to go back.
        """
        if self.held_out is None:
            return False
        recall = {}
        # The others wait, unless their parts of the weights are needed.
        if self.world.is_main_process or self.learner.sharded:
            pairs = self.held_out.encode(self.learner.towers.encoder(self.learner.network))
            if np.isfinite(pairs.images).all() and np.isfinite(pairs.captions).all():
                recall = retrieval_recall(pairs.images, pairs.captions, pairs.owners)
        recall = self.world.broadcast(recall)
        self.broken = not recall
        if self.broken:
            return False
        self.recall = recall
        self.run.log({"step": self.step, "epoch": self.epoch, "held_out": self.recall})
        metric = self.config.train.best_metric
        if not metric or self.recall[metric] <= self.best.get("value", -math.inf):
            return False
        self.best = {"step": self.step, "metric": metric, "value": self.recall[metric]}
        return True

    def _save(self, planned: bool) -> ModelRef | None:
        """Write a checkpoint, planned or interim; None on processes that do not write."""
        interim = self.timetable.note(self.step, self.seconds, planned)
        self.cut_by_all = TruncationReport()
        for told in self.world.all_gather_object(asdict(self.cut)):
            self.cut_by_all.include(told)
        state = self.learner.state() | {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "recall": self.recall,
            "best": self.best,
            "logged": self.run.logged,
            "source": self.loader.source.fingerprint,
            # What a stream left out so far it would learn again only by reading it all again.
            "data": self.loader.state() | {"skipped": self.skipped()},
            "cut": asdict(self.cut_by_all),
        }
        towers = self.learner.whole_towers()
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
        self.run.prune({self.best.get("step"), place_to_return(self.run, self.learner.health)})
        return model

    def skipped(self) -> dict[str, str]:
        """Why images could not be used, by key: found on opening the source, or on reading it."""
        found = {s.key: s.reason for s in self.loader.source.skipped} | self.loader.skipped
        return dict(sorted(found.items()))

    def outcome(self, state: str, findings: Sequence[str]) -> Outcome:
        """The state of the run, for its report.

        Args:
            state: how the run ended.
            findings: preflight warnings.
        """
        return Outcome(
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
            skipped_steps=self.learner.health.skipped_steps,
        )

    def save(self) -> ModelRef | None:
        """Write the last checkpoint; None on processes that do not write."""
        return self._save(planned=self.finished)

    def finish(self, model: ModelRef) -> None:
        """Write the manifest of a finished run."""
        source = {"data": self.config.data.train, "fingerprint": self.loader.source.fingerprint}
        detail = {
            "held_out": self.recall,
            "best": self.best,
            "seconds": round(self.seconds, 1),
            "skipped_steps": self.learner.health.skipped_steps,
            "skipped_images": len(self.skipped()),
            "cut_captions": asdict(self.cut_by_all),
        }
        self.run.finish(Manifest("run", model, self.step, source, detail))
