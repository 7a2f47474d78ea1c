"""Train a dual encoder on image–caption pairs: ``clipkit train CONFIG.toml --out RUN``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit.artifacts import is_complete, write_text
from clipkit.config import LoopConfig, TrainConfig, load_config, parse_config
from clipkit.data.loader import PairLoader
from clipkit.data.open_source import open_source
from clipkit.data.source import Data, Source
from clipkit.display.html import bullets, card
from clipkit.errors import FULL, ArtifactError, ConfigError, DataError, TrainingError
from clipkit.models.checkpoint import Towers
from clipkit.models.tokenizer import TruncationReport
from clipkit.progress import catch_interrupts, print_status
from clipkit.reports.plots import plot_run
from clipkit.reports.run import REPORT_FILE, render_run, run_page
from clipkit.training.allocator import freed_memory_kept
from clipkit.training.build import build_towers
from clipkit.training.data import (
    ValidationSet,
    count_truncated_captions,
    image_cache,
    open_training_data,
    pair_loader,
    require_captions,
)
from clipkit.training.distributed import World, join_world
from clipkit.training.frozen_towers import locked_features, uses_features
from clipkit.training.loop import TrainingLoop
from clipkit.training.precision import resolve_precision
from clipkit.training.preflight import collect_facts, preflight_warnings
from clipkit.training.run_directory import CONFIG_FILE, open_run, require_tensorboard
from clipkit.training.step import Trainer


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        run: run directory.
        step: last step taken.
        finished: False if the run was interrupted; ``resume=True`` continues it.
        held_out: recall on the held-out pairs at the end, by name, in [0, 1].
        best: ``step``, ``metric`` and ``value`` of the best evaluation, whose checkpoint is kept;
            empty if there is none.
        cut: captions truncated at 77 tokens.
        skipped: why images were skipped, by key.
        drawn: pairs drawn from each source of a mixture, by name; empty for a single source.
        findings: preflight warnings.
    """

    run: Path
    step: int
    finished: bool
    held_out: dict[str, float]
    best: dict[str, Any]
    cut: TruncationReport
    skipped: dict[str, str]
    drawn: dict[str, int]
    findings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "run": str(self.run),
            "step": self.step,
            "finished": self.finished,
            "held_out": self.held_out,
            "best": self.best,
            "captions_cut": self.cut.cut,
            "skipped": self.skipped,
            "drawn": self.drawn,
            "findings": self.findings,
        }

    def _repr_html_(self) -> str:
        state = "finished" if self.finished else "interrupted; continue with resume=True"
        facts: list[tuple[str, object]] = [("steps", f"{self.step:,}"), ("state", state)]
        facts += [(name, f"{value:.3f}") for name, value in self.held_out.items()]
        facts += [(f"pairs of {name}", f"{count:,}") for name, count in self.drawn.items()]
        facts += [("captions truncated", self.cut.cut), ("images skipped", len(self.skipped))]
        return card(f"run {self.run}", facts) + bullets(self.findings)


def train(
    config: TrainConfig | dict[str, Any] | str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train a model; Ctrl-C saves a checkpoint and returns a result with ``finished=False``.

    Under ``torchrun --nproc-per-node N -m clipkit train …`` the N processes share each batch, and
    the first one writes the run.

    Args:
        config: a TOML file, a nested dictionary with its content, or a TrainConfig.
        out: run directory.
        data: image–caption pairs to train on, instead of ``data.train``: whatever ``open_source``
            opens, or a map-style torch Dataset or another iterable of ``(image, caption)`` pairs.
            Pairs are read into memory once, and to resume you pass them again. A list of paths is a
            mixture, as in ``data.train``.
        resume: continue from the last checkpoint, step for step as if never interrupted.

    Raises:
        ConfigError, DataError, ModelError, ArtifactError: an input cannot be used.
        MissingExtraError: ``train.tensorboard`` is set, but tensorboard is not installed.
        TrainingError: the run is already finished, its gradients stay non-finite, or another
            process of it has ended.
    """
    if isinstance(config, str | Path):
        config = load_config(Path(config))
    elif isinstance(config, dict):
        config = parse_config(config)
    elif not isinstance(config, TrainConfig):
        raise TypeError(
            f"config is a {type(config).__name__}, expected a TOML file, a dictionary or a "
            "TrainConfig"
        )
    source = None
    if data is not None:
        paths = [data] if isinstance(data, str | Path) else data
        spec: str | tuple[str, ...]
        if isinstance(paths, list | tuple) and all(isinstance(one, str | Path) for one in paths):
            spec = str(paths[0]) if len(paths) == 1 else tuple(map(str, paths))
        else:
            source = open_source(data)
            spec = source.spec
        config = replace(config, data=replace(config.data, train=spec))
    if not config.data.train:
        raise ConfigError("data.train is empty; name the image–caption pairs to train on")
    out = Path(out)
    if resume and is_complete(out):
        raise TrainingError(
            f"{out} is finished; to train it further, start a new run with model.init_from={out}"
        )
    if config.train.tensorboard:
        require_tensorboard()
    with join_world() as world, freed_memory_kept():
        return _train(config, out, world, source, resume=resume)


def _train(
    config: TrainConfig, out: Path, world: World, source: Source | None, *, resume: bool
) -> TrainResult:
    _require_shareable(config.train, world)
    training, held_out = open_training_data(config.data, config.train.seed, source)
    cut = TruncationReport()
    if world.is_main_process and not training.streaming:
        count_truncated_captions(training, config.data, cut)
    if world.is_main_process and held_out and not held_out.streaming:
        # Fail before training, not at the first evaluation.
        require_captions(held_out)
    towers = build_towers(config.model, config.optim.temperature, config.train.seed)
    config = _with_precision(config, out, towers, world, resume)
    trainer = Trainer(towers, config, world)
    loader = pair_loader(config, training, trainer.towers.image_size, cut, world)
    steps = _steps_in_all(config.train, loader)
    stored = uses_features(config, training)
    if stored and trainer.sharded:
        raise ConfigError(
            "train.fsdp shards the locked tower, whose features cannot be cached then; set "
            "data.feature_views = 0, or remove train.fsdp"
        )
    findings = []
    if world.is_main_process:
        findings = preflight_warnings(config, collect_facts(config, training, held_out, steps, cut))
    with open_run(out, config, world, resume=resume) as run:
        for finding in findings:
            print_status(f"warning: {finding}")
        measured = ValidationSet(held_out, loader.workers) if held_out else None
        for turn in (world.is_main_process, not world.is_main_process) if stored else ():
            if turn:  # the main process writes, then the others read
                measured = _store_features(config, trainer, loader, measured, run.path)
            world.broadcast(None)
        if not loader.features:
            loader.cache = image_cache(config, loader, run.path)
        loop = TrainingLoop(config, run, trainer, loader, measured, steps, cut)
        with catch_interrupts(patient=world.size > 1) as interrupted:
            try:
                loop.run_steps(interrupted)
                model = loop.save()
                if model is not None:
                    _write_report(loop, "finished" if loop.finished else "interrupted", findings)
                    if loop.finished:
                        loop.finish(model)  # the manifest comes last
            except (TrainingError, DataError):
                if world.is_main_process:
                    _write_report(loop, "failed", findings, curve=False)
                raise
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise ArtifactError(
                    f"the disk that holds {run.path} is full; free some space and continue "
                    "from the last checkpoint with --resume"
                ) from None
    return TrainResult(
        run=run.path,
        step=loop.step,
        finished=loop.finished,
        held_out=loop.recall,
        best=loop.best,
        cut=loop.cut_by_all,
        skipped=loop.skipped(),
        drawn=loop.drawn(),
        findings=findings,
    )


def _write_report(
    loop: TrainingLoop, state: str, findings: Sequence[str], *, curve: bool = True
) -> None:
    """Write ``report.html``, ``skipped.jsonl``, which it links, and the loss curve."""
    run, summary = loop.run, loop.summary(state, findings)
    if curve:
        plot_run(summary.lines, run.path.name).save(run.path / "curve.png")
    run.list_skipped(summary.skipped)
    held_out = loop.held_out.source if loop.held_out else None
    page = run_page(loop.config, summary, loop.loader.source, held_out)
    write_text(run.path / REPORT_FILE, render_run(page))


def _require_shareable(config: LoopConfig, world: World) -> None:
    """Raise ConfigError for a configuration that this number of processes cannot run."""
    if config.batch_size % world.size:
        raise ConfigError(
            f"train.batch_size is {config.batch_size}, expected a multiple of the number of "
            f"processes ({world.size})"
        )
    if config.fsdp and config.compile and world.size > 1:
        raise ConfigError(
            "train.fsdp and train.compile are both set, but compiled towers do not gather their "
            "shards; leave one of them out"
        )


def _store_features(
    config: TrainConfig,
    trainer: Trainer,
    loader: PairLoader,
    held_out: ValidationSet | None,
    run: Path,
) -> ValidationSet | None:
    """Cache the features of locked towers for training steps and evaluations."""
    folder = Path(config.data.feature_dir) if config.data.feature_dir else run / "features"
    network, towers = trainer.network, trainer.towers
    loader.features, captions = locked_features(network, towers, config, loader.source, folder)
    trainer.use_features(captions)
    if held_out is None or held_out.source.streaming:
        return held_out
    # Held-out pairs are neither augmented nor split.
    plain = replace(config, data=replace(config.data, feature_views=1, long_captions="cut"))
    images, captions = locked_features(network, towers, plain, held_out.source, folder)
    return replace(held_out, images=images, captions=captions)


def _with_precision(
    config: TrainConfig, out: Path, towers: Towers, world: World, resume: bool
) -> TrainConfig:
    """Resolve ``auto``; a resumed run keeps its precision."""
    precision = config.train.precision
    if resume and precision == "auto" and (out / CONFIG_FILE).is_file():
        precision = load_config(out / CONFIG_FILE).train.precision
    resolved = ""
    if world.is_main_process:
        pairs = config.train.micro_batch_size or config.train.batch_size // world.size
        resolved = resolve_precision(precision, towers, pairs, world.device)
    resolved = world.broadcast(resolved)
    return replace(config, train=replace(config.train, precision=resolved))


def _steps_in_all(config: LoopConfig, loader: PairLoader) -> int:
    """Total steps of the run; 0 if only the clock ends it."""
    per_epoch = loader.batches_per_epoch
    if config.steps:
        return config.steps
    if per_epoch is None and not config.minutes:
        raise ConfigError("the length of a stream is unknown; set train.steps or train.minutes")
    return config.epochs * per_epoch if per_epoch else 0
