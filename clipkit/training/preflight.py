"""Preflight checks: warnings about a training run's configuration and data before it starts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from clipkit.config import AugmentConfig, TrainConfig
from clipkit.data.duplicates import Shared, shared_images
from clipkit.data.open_source import Source
from clipkit.models.tokenizer import CONTEXT, TruncationReport
from clipkit.training.optim import learning_rate

SANE_RATES = {
    **dict.fromkeys(("adamw", "adam", "nadamw", "radam", "adafactor"), (1e-6, 1e-2)),
    **dict.fromkeys(("sgd", "momentum", "sgdw", "sgdp"), (1e-4, 10.0)),
    "lion": (1e-7, 3e-3),
    "lamb": (1e-5, 5e-2),
    "muon": (1e-5, 0.1),
}
"""Range of usual peak learning rates by optimizer, from fine-tuning to the largest in use."""
LONG_WARMUP = 0.5
"""Fraction of a run above which a warm-up is too long."""
MUCH_CUT = 0.01
"""Fraction of truncated captions that is worth a warning."""


@dataclass(frozen=True)
class Facts:
    """Facts about a run before it starts.

    Attributes:
        pairs: number of training images; None for a stream.
        steps: total steps; 0 if only the clock ends the run.
        captions: number of distinct training captions; None for a stream.
        cut: truncated captions; empty for a stream.
        shared: held-out images that are also trained on; None if not checked.
    """

    pairs: int | None
    steps: int
    captions: int | None
    cut: TruncationReport
    shared: Shared | None


def collect_facts(
    config: TrainConfig,
    training: Source,
    held_out: Source | None,
    steps: int,
    cut: TruncationReport,
) -> Facts:
    """Collect the facts about a run's training data."""
    if training.streaming:
        return Facts(None, steps, None, cut, None)
    distinct = {hash(text) for row in training.rows.texts() for text in row.captions}
    shared = shared_images(training, held_out, config.train.seed) if held_out else None
    return Facts(training.count, steps, len(distinct), cut, shared)


def preflight_warnings(config: TrainConfig, facts: Facts) -> list[str]:
    """Warnings, each with what was found, why it matters and which field to change."""
    return [*_schedule(config, facts), *_batch(config, facts), *_data(config, facts)]


def _schedule(config: TrainConfig, facts: Facts) -> Iterator[str]:
    optim = config.optim
    low, high = SANE_RATES.get(optim.name, (0.0, float("inf")))
    if not low <= optim.lr <= high:
        effect = "the model learns too slowly" if optim.lr < low else "training diverges"
        yield (
            f"optim.lr is {optim.lr:g}, expected {low:g} to {high:g} for {optim.name}: "
            f"{'below' if optim.lr < low else 'above'} this range {effect}; set optim.lr"
        )
    if optim.warmup >= LONG_WARMUP:
        steps = f" ({round(optim.warmup * facts.steps)} of {facts.steps} steps)"
        yield (
            f"the warm-up takes {optim.warmup:.0%} of the run{steps if facts.steps else ''}, so "
            "little of it has the full learning rate; lower optim.warmup, a fraction of the run, "
            "or train longer (train.epochs)"
        )
    if facts.steps == 1 and not learning_rate(1.0, optim):
        yield (
            "the run has a single step, and the schedule ends at a learning rate of 0, so nothing "
            "is learned; raise train.epochs, or lower train.batch_size"
        )


def _batch(config: TrainConfig, facts: Facts) -> Iterator[str]:
    size = config.train.batch_size
    if facts.pairs is not None and facts.pairs < size:
        yield (
            f"train.batch_size is {size}, but there are {facts.pairs} pairs to train on, so an "
            "epoch is one step with all of them; lower train.batch_size, or raise train.epochs"
        )
    elif facts.captions == 1:
        yield (
            f"all captions of the {facts.pairs} images are the same, so nothing can be learned; "
            "write captions that distinguish the images"
        )
    elif facts.captions is not None and facts.captions < size:
        yield (
            f"{facts.pairs} images have {facts.captions} different captions, fewer than "
            f"train.batch_size ({size}). Pairs with equal captions are not each other's negatives "
            "(train.duplicates), so a larger batch adds none; lower train.batch_size, or write "
            "more specific captions"
        )


def _data(config: TrainConfig, facts: Facts) -> Iterator[str]:
    shared, cut = facts.shared, facts.cut
    plain = replace(AugmentConfig(), token_dropout=config.augment.token_dropout)
    locked = "image" in config.model.lock
    if locked and config.data.feature_views == 1 and config.augment != plain:
        yield (
            "[augment] has no effect on a locked image tower, which encodes each image once, "
            "without augmentation; cache several augmented views with data.feature_views, or "
            "remove [augment]"
        )
    if shared and shared.keys:
        held, duplicate = shared.keys[0]
        extent = (
            "" if shared.looked_at == shared.training else f" (a sample of {shared.looked_at:,})"
        )
        yield (
            f"{len(shared.keys)} of {shared.held_out} held-out images are byte-identical to some "
            f"of the {shared.training:,} training images{extent}, e.g. {held} = {duplicate}, "
            "so recall measures memorisation; remove them from data.train or data.val, and find "
            "re-encoded copies with clipkit data check --against"
        )
    if cut.share >= MUCH_CUT and config.data.long_captions == "cut":
        yield (
            f"{cut.share:.1%} of the captions ({cut.cut:,} of {cut.seen:,}) are longer than "
            f"{CONTEXT} tokens and are truncated, by {cut.lost_tokens:,} tokens in all; "
            'data.long_captions = "split" uses all of them, in parts'
        )
