"""The directory of a training run: config.toml, log.jsonl, step-N/, and a manifest at the end.

The log is also written as TensorBoard event files if ``train.tensorboard`` is set.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from clipkit.artifacts import (
    MANIFEST,
    DirectoryLock,
    Manifest,
    is_complete,
    read_manifest,
    sync_tree,
    write_json,
    write_text,
)
from clipkit.config import TrainConfig, dump_config, load_config
from clipkit.data.images import is_utf8, printable
from clipkit.errors import ArtifactError, ConfigError, MissingExtraError
from clipkit.models.checkpoint import checkpoint_step, is_step, run_checkpoints
from clipkit.training.distributed import World
from clipkit.training.log import LOG_FILE, log_line, read_log

TENSORBOARD_DIR = "tensorboard"
_SCALARS = (
    "loss",
    "chance_loss",
    "lr",
    "scale",
    "grad_norm",
    "samples_per_second",
    "waiting_for_data",
)


def require_tensorboard() -> Any:
    """TensorBoard's SummaryWriter; raises MissingExtraError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "train.tensorboard is set, but tensorboard is not installed; "
            "pip install 'clipkit[tensorboard]', or remove train.tensorboard"
        ) from None
    return SummaryWriter


class TensorBoardWriter:
    """Writes the log of a run as event files in ``RUN/tensorboard``.

    Args:
        run: the directory of the run.
        step: the last valid step; events of later steps are purged.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._folder = run / TENSORBOARD_DIR
        self._open(step)

    def _open(self, step: int) -> None:
        # Readers discard events from purge_step on.
        self._writer = require_tensorboard()(str(self._folder), purge_step=step + 1)

    def add(self, line: dict[str, Any]) -> None:
        """Write a line of log.jsonl, flushed to disk so that a crash loses nothing."""
        for name in _SCALARS:
            if name in line:
                self._writer.add_scalar(name, line[name], line["step"])
        for name, value in line.get("held_out", {}).items():
            self._writer.add_scalar(f"held_out/{name}", value, line["step"])
        self._writer.flush()
        if "rolled_back_to" in line:
            self.close()
            self._open(line["rolled_back_to"])

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


CONFIG_FILE = "config.toml"
SKIPPED_FILE = "skipped.jsonl"
CHANGEABLE = (
    "data.workers",
    "data.image_cache",
    "data.max_skipped_fraction",
    "train.keep_last",
    "train.keep_every_steps",
    "train.save_every_minutes",
    "train.tensorboard",
)
"""Fields that may change when a run is resumed, because the weights do not depend on them."""


class RunDirectory:
    """The directory of a run, locked by the process that writes it.

    Args:
        path: the directory.
        config: the resolved configuration of the run.
        resume: continue the run that is there.

    Raises:
        ArtifactError: it has checkpoints and ``resume`` is not set, it is not a run, it cannot be
            written, or another process has locked it.
        ConfigError: ``resume`` is set and the run was started with another configuration.
    """

    def __init__(self, path: Path, config: TrainConfig, *, resume: bool) -> None:
        self.path = path.absolute()
        self.config = config
        if not is_utf8(path):
            raise ArtifactError(
                f"the path {printable(path)} is not UTF-8, as manifests are; choose another --out"
            )
        if resume:
            self._require_same_config()
        else:
            self._refuse_taken()
        self._lock = DirectoryLock(self.path / ".lock", self.path)
        try:
            write_text(self.path / CONFIG_FILE, dump_config(config))
            (self.path / MANIFEST).unlink(missing_ok=True)
            self._clear()
        except OSError:
            self._lock.release()
            raise
        steps = run_checkpoints(self.path)
        self.checkpoint = steps[-1] if steps else None
        self.logged = 0
        self._tensorboard: TensorBoardWriter | None = None

    def _clear(self) -> None:
        """Remove partial checkpoints and image caches that a crash left behind."""
        steps = [path for path in self.path.glob("step-*") if is_step(path)]
        partial = [path for path in steps if not is_complete(path)]
        for path in (*partial, *self.path.glob(".step-*.partial")):
            shutil.rmtree(path)
        for pattern in (".step-*.lock", ".images-*"):
            for path in self.path.glob(pattern):
                path.unlink()

    def _refuse_taken(self) -> None:
        """Raise ArtifactError unless a run may start here. One without a checkpoint is replaced."""
        steps = run_checkpoints(self.path)
        if steps:
            raise ArtifactError(
                f"{self.path} already contains a run (its last checkpoint is {steps[-1].name}); "
                "continue it with --resume, or choose another --out"
            )
        begun = (self.path / CONFIG_FILE).is_file()
        if self.path.exists() and not begun and (not self.path.is_dir() or _visible(self.path)):
            raise ArtifactError(
                f"{self.path} exists and is not a clipkit run; choose another --out"
            )

    def _require_same_config(self) -> None:
        file = self.path / CONFIG_FILE
        if not file.is_file():
            raise ArtifactError(
                f"{self.path} contains no run to resume ({CONFIG_FILE} is missing); "
                "start one without --resume"
            )
        before, now = asdict(load_config(file)), asdict(self.config)
        changed = [
            f"{section}.{name} = {value}"
            for section, values in now.items()
            for name, value in values.items()
            if value != before[section][name] and f"{section}.{name}" not in CHANGEABLE
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was started with another configuration (now: {'; '.join(changed)}); "
                f"resume with {file}, or start a new run"
            )

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to log.jsonl; non-finite numbers become null."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(log_line(line))
        self.logged += 1
        if self._tensorboard:
            self._tensorboard.add(line)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl so far, without a line torn by a crash."""
        return read_log(self.path)

    def rewind(self, logged: int) -> None:
        """Keep the first ``logged`` lines of the log; the steps after them are repeated."""
        kept = self.lines()[:logged]
        write_text(self.path / LOG_FILE, "".join(map(log_line, kept)))
        self.logged = len(kept)
        if self.config.train.tensorboard:
            self._tensorboard = TensorBoardWriter(
                self.path, checkpoint_step(self.checkpoint) if self.checkpoint else -1
            )

    def list_skipped(self, skipped: dict[str, str]) -> None:
        """Write skipped.jsonl: key and reason of each skipped image."""
        lines = (
            json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n"
            for key, reason in skipped.items()
        )
        write_text(self.path / SKIPPED_FILE, "".join(lines))

    def step_path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.path / f"step-{step}"

    def prune(self, spared: Collection[int | None]) -> None:
        """Remove the checkpoints that the configuration does not keep.

        Args:
            spared: steps to keep in addition to ``keep_last`` and ``keep_every_steps``.
        """
        keep, every = self.config.train.keep_last, self.config.train.keep_every_steps
        paths = run_checkpoints(self.path)
        planned = planned_checkpoints(self.path)
        for path in paths[:-1]:
            step = checkpoint_step(path)
            kept = path in planned[-keep:] or step in spared or (every and step % every == 0)
            if path not in planned or not kept:
                self.remove(path)

    def remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint."""
        (checkpoint / MANIFEST).unlink()  # from here on it is incomplete, whatever happens
        shutil.rmtree(checkpoint)

    def finish(self, manifest: Manifest) -> None:
        """Mark the run as complete."""
        sync_tree(self.path)
        write_json(self.path / MANIFEST, manifest.to_dict())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        self._lock.release()


class ReadOnlyRunDirectory(RunDirectory):
    """The directory of a run in processes other than the main one, which write nothing.

    Args:
        path: the directory.
        config: the resolved configuration of the run.
        checkpoint: name of the checkpoint to resume from; None for a new run.

    Raises:
        ArtifactError: the checkpoint is not visible from this process.
    """

    def __init__(self, path: Path, config: TrainConfig, checkpoint: str | None) -> None:
        self.path, self.config, self.logged = path.absolute(), config, 0
        self.checkpoint = self.path / checkpoint if checkpoint else None
        if self.checkpoint and not self.checkpoint.is_dir():
            raise ArtifactError(
                f"the checkpoint {self.checkpoint} is not visible from every process; put the run "
                "on a file system that all machines share"
            )

    def _ignore(self, *_: Any) -> None:
        """Do nothing: the main process writes."""

    log = rewind = list_skipped = prune = remove = finish = _ignore  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        pass


def open_run(path: Path, config: TrainConfig, world: World, *, resume: bool) -> RunDirectory:
    """Open the directory of a run in all processes; raises what ``RunDirectory`` raises."""
    run = RunDirectory(path, config, resume=resume) if world.is_main_process else None
    checkpoint = world.broadcast(run.checkpoint.name if run and run.checkpoint else None)
    return run or ReadOnlyRunDirectory(path, config, checkpoint)


def planned_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run in order, without an interim one."""
    paths = run_checkpoints(run)
    return [p for p in paths if not read_manifest(p, "checkpoint").detail.get("interim")]


def _visible(folder: Path) -> list[Path]:
    """The entries of a directory except hidden files, such as a stale lock."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]
