"""What is doubtful about a training run before it starts, each in a sentence for a person."""

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
"""Peak learning rates by optimiser, from fine-tuning to the largest that are in use."""
LONG_WARMUP = 0.5
"""Share of a run from which on a warm-up leaves little of it."""
MUCH_CUT = 0.01
"""Share of captions cut from which on it is worth a setting."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it starts.

    Attributes:
        pairs: images to train on; None for a stream.
        steps: of the whole run; 0 where only the clock ends it.
        captions: different captions to train on; None for a stream.
        cut: what 77 tokens cut of them; nothing is known of a stream.
        shared: what is held out and trained on; None where that was not looked at.
    """

    pairs: int | None
    steps: int
    captions: int | None
    cut: TruncationReport
    shared: Shared | None


def gather(
    config: TrainConfig,
    training: Source,
    held_out: Source | None,
    steps: int,
    cut: TruncationReport,
) -> Facts:
    """Look at what a run is about to be trained on."""
    if training.streaming:
        return Facts(None, steps, None, cut, None)
    distinct = {
        hash(text)
        for batch in training.rows.select_columns("captions").iter(batch_size=1000)
        for captions in batch["captions"]
        for text in captions
    }
    shared = shared_images(training, held_out, config.train.seed) if held_out else None
    return Facts(len(training.rows), steps, len(distinct), cut, shared)


def examine(config: TrainConfig, facts: Facts) -> list[str]:
    """What is doubtful: what was found, why it matters, and which field to turn."""
    return [*_schedule(config, facts), *_batch(config, facts), *_data(config, facts)]


def _schedule(config: TrainConfig, facts: Facts) -> Iterator[str]:
    optim = config.optim
    low, high = SANE_RATES.get(optim.name, (0.0, float("inf")))
    if not low <= optim.lr <= high:
        what = "nothing is learned in any time" if optim.lr < low else "training blows up"
        yield (
            f"optim.lr is {optim.lr:g}, and with {optim.name} rates between {low:g} and {high:g} "
            f"are in use: {'below' if optim.lr < low else 'above'} them {what}; set optim.lr"
        )
    if optim.warmup >= LONG_WARMUP:
        steps = f" ({round(optim.warmup * facts.steps)} of {facts.steps} steps)"
        yield (
            f"the warm-up takes {optim.warmup:.0%} of the run{steps if facts.steps else ''}, so "
            "that it ends about when the learning rate has come up; lower optim.warmup, a share "
            "of the run, or train longer (train.epochs)"
        )
    if facts.steps == 1 and not learning_rate(1.0, optim):
        yield (
            "the run is one step, the last one, for which the schedule gives a learning rate of "
            "0, so that nothing is learned; raise train.epochs, or lower train.batch_size"
        )


def _batch(config: TrainConfig, facts: Facts) -> Iterator[str]:
    size = config.train.batch_size
    if facts.pairs is not None and facts.pairs < size:
        yield (
            f"train.batch_size is {size}, and there are {facts.pairs} pairs to train on: every "
            "step takes all of them, so that an epoch is one step; lower train.batch_size, or "
            "raise train.epochs"
        )
    elif facts.captions == 1:
        yield (
            f"all captions of the {facts.pairs} images are the same, so that nothing tells them "
            "apart and nothing can be learned; write captions that do"
        )
    elif facts.captions is not None and facts.captions < size:
        yield (
            f"there are {facts.captions} different captions among {facts.pairs} images, fewer than "
            f"train.batch_size ({size}): pairs with equal captions are no negatives of each other "
            "(train.duplicates), so that a larger batch adds none; lower train.batch_size, or "
            "write captions that say more"
        )


def _data(config: TrainConfig, facts: Facts) -> Iterator[str]:
    shared, cut = facts.shared, facts.cut
    plain = replace(AugmentConfig(), token_dropout=config.augment.token_dropout)
    locked = "image" in config.model.lock
    if locked and config.data.feature_views == 1 and config.augment != plain:
        yield (
            "[augment] says how pictures are changed, and those of the locked image tower are "
            "encoded once, as evaluation sees them; store several changed views with "
            "data.feature_views, or leave [augment] out"
        )
    if shared and shared.keys:
        held, twin = shared.keys[0]
        extent = (
            "" if shared.looked_at == shared.training else f" (a sample of {shared.looked_at:,})"
        )
        yield (
            f"{len(shared.keys)} of {shared.held_out} held-out images are byte for byte among the "
            f"{shared.training:,} images to train on{extent}, for example {held} = {twin}: recall "
            "on them says how well they are remembered; take them out of data.train or of "
            "data.val, and look for copies stored anew with clipkit data check --against"
        )
    if cut.share >= MUCH_CUT and config.data.long_captions == "cut":
        yield (
            f"{cut.share:.1%} of the captions ({cut.cut:,} of {cut.seen:,}) are longer than "
            f"{CONTEXT} tokens and are cut, {cut.lost_tokens:,} tokens in all: what they say last "
            'is never learned; data.long_captions = "split" reads all of it, in parts'
        )
