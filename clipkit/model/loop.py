"""The steps of a training run, and what happens between them."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from clipkit.config import TrainConfig
from clipkit.data.pairs import PairBatch, PairLoader
from clipkit.data.sources import Source
from clipkit.errors import DataError
from clipkit.manifest import Manifest, ModelRef
from clipkit.metrics import retrieval_recall
from clipkit.model.checkpoint import save_checkpoint
from clipkit.model.encode_pairs import encode_pairs
from clipkit.model.learner import Learner, StepReport
from clipkit.model.run import RunDirectory
from clipkit.model.tokenizer import CutReport
from clipkit.plots import plot_run
from clipkit.progress import Meter


class TrainingLoop:
    """The steps of a run, with what is logged, measured and saved between them.

    Args:
        config: of the run, resolved.
        run: its directory; a checkpoint in it is where the run goes on.
        learner: what is trained.
        loader: what it is trained on.
        held_out: what it is measured on, if anything.
        steps: of the whole run; 0 where only the clock ends it.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        learner: Learner,
        loader: PairLoader,
        held_out: Source | None,
        steps: int,
    ) -> None:
        self.config, self.run, self.learner, self.loader = config, run, learner, loader
        self.held_out, self.steps = held_out, steps
        self.step = self.epoch = self.batch = 0
        self.seconds = 0.0
        self.recall: dict[str, float] = {}
        self.best: dict[str, Any] = {}
        self.finished = False
        if run.checkpoint:
            state = learner.restore(run.checkpoint)
            self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
            self.seconds, self.recall = state["seconds"], state["recall"]
            self.best = state["best"]
            self.loader.skipped.update(state["skipped"])
            run.rewind(state["logged"])
        else:
            run.rewind(0)

    def run_steps(self, interrupted: list[int]) -> None:
        """Take the steps that are left, until the end or until something is ``interrupted``."""
        started = time.perf_counter() - self.seconds
        meter = Meter()
        with tqdm(
            total=self.steps or None, initial=self.step, unit="step", disable=None, desc="training"
        ) as bar:
            for batch in meter.waiting(self._batches()):
                report = self.learner.take_step(batch, self.step, self._progress(ahead=1))
                self.step += 1
                self.seconds = time.perf_counter() - started
                self.finished = self._progress() >= 1
                meter.samples += len(batch.keys)
                bar.update()
                if self.finished or interrupted or self.step % self.config.train.log_steps == 0:
                    bar.set_postfix_str(self._log(report, meter))
                if self.finished or interrupted:
                    break
                self._between_steps()

    def _batches(self) -> Iterator[PairBatch]:
        """Batches from where the run stands, epoch after epoch."""
        while True:
            for batch in self.loader.batches(self.epoch, self.batch):
                self.batch += 1
                yield batch
            if not self.batch:
                raise DataError(
                    f"{self.config.data.train} holds no pair to train on (a share of "
                    f"{self.config.data.held_out_share:g} was held out); see clipkit data check"
                )
            self.epoch, self.batch = self.epoch + 1, 0

    def _progress(self, ahead: int = 0) -> float:
        """Share of the run done, by steps or by the clock, whichever is further."""
        limit = 60 * self.config.train.minutes
        by_steps = (self.step + ahead) / self.steps if self.steps else 0.0
        return max(by_steps, self.seconds / limit if limit else 0.0)

    def _log(self, report: StepReport, meter: Meter) -> str:
        """Write a line of the log; the same in short for the progress bar."""
        loss = float(report.loss)
        speed, waited = meter.read()
        self.run.log(
            {
                "step": self.step,
                "epoch": self.epoch,
                "loss": loss,
                "grad_norm": report.grad_norm,
                "lr": report.lr,
                "scale": float(self.learner.network.scale.detach()),
                "seconds": round(self.seconds, 3),
                "samples_per_second": round(speed, 1),
                "waiting_for_data": round(waited, 4),
            }
        )
        return f"loss {loss:.3f}, {speed:.0f} samples/s"

    def _between_steps(self) -> None:
        is_best = self._due(self.config.train.eval_epochs) and self._measure()
        every = self.config.train.keep_every
        kept = every and self.step % every == 0
        if is_best or kept or self._due(self.config.train.save_epochs):
            self._save()

    def _due(self, epochs: float) -> bool:
        every = epochs * (self.loader.batches_per_epoch or self.steps)
        return every > 0 and self.step % max(1, round(every)) == 0

    def _measure(self) -> bool:
        """Recall on the held-out pairs, into the log; whether it is the best so far."""
        if self.held_out is None:
            return False
        encoder = self.learner.towers.encoder(self.learner.network)
        pairs = encode_pairs(encoder, self.held_out, workers=self.loader.workers, progress=False)
        self.recall = retrieval_recall(pairs.images, pairs.captions, pairs.owners)
        self.run.log({"step": self.step, "epoch": self.epoch, "held_out": self.recall})
        metric = self.config.train.best
        if not metric or self.recall[metric] <= self.best.get("value", -math.inf):
            return False
        self.best = {"step": self.step, "metric": metric, "value": self.recall[metric]}
        return True

    def _save(self) -> ModelRef:
        state = self.learner.state() | {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "recall": self.recall,
            "best": self.best,
            "logged": self.run.logged,
            "skipped": self.loader.skipped,
        }
        model = save_checkpoint(
            self.run.step_path(self.step),
            self.learner.towers,
            state,
            {"step": self.step, "epoch": self.epoch, "held_out": self.recall, "best": self.best},
        )
        self.run.prune({self.best.get("step", self.step)})
        return model

    def skipped(self) -> dict[str, str]:
        """Why images could not be used, by key: found on opening the source, or on reading it."""
        return {s.key: s.reason for s in self.loader.source.skipped} | self.loader.skipped

    def close(self, cut: CutReport) -> None:
        """End a run: measure, save and draw; a run that came to its end gets its manifest."""
        if self.finished:
            self._measure()
        model = self._save()
        self.run.list_skipped(self.skipped())
        plot_run(self.run.lines(), self.run.path / "curve.png", self.run.path.name)
        if self.finished:
            source = {"data": self.config.data.train, "fingerprint": self.loader.source.fingerprint}
            detail = {
                "held_out": self.recall,
                "best": self.best,
                "seconds": round(self.seconds, 1),
                "skipped_steps": self.learner.skipped_steps,
                "skipped_images": len(self.skipped()),
                "cut_captions": asdict(cut),
            }
            self.run.finish(Manifest("run", model, self.step, source, detail))
