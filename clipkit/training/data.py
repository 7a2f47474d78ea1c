"""What a training run reads: its pairs, those held out, and what 77 tokens cut of the captions.

The pairs that a run is measured on, and what its locked towers have made of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clipkit.config import DataConfig, TrainConfig
from clipkit.data.feature_cache import Features
from clipkit.data.image_cache import ImageCache, open_cache
from clipkit.data.loader import PairLoader, Share
from clipkit.data.open_source import Row, Source, no_captions, open_source
from clipkit.data.sampler import (
    CaptionLengths,
    class_numbers,
    first_turn,
    require_labels,
    split_held_out,
)
from clipkit.data.source import usable
from clipkit.data.transforms import augmentation, reduction
from clipkit.data.workers import worker_count
from clipkit.errors import ConfigError, DataError, ImageError
from clipkit.models.embed_source import EncodedPairs, encode_pairs
from clipkit.models.encoder import Encoder, Vectors
from clipkit.models.tokenizer import TruncationReport, split_caption, tokenize
from clipkit.training.distributed import World
from clipkit.training.frozen_towers import CaptionFeatures


def open_training_data(
    config: DataConfig, seed: int, source: Source | None = None
) -> tuple[Source, Source | None]:
    """Open the training pairs and the held-out pairs (None for no held-out set).

    Args:
        config: where they come from.
        seed: selects the held-out images if ``data.val`` is empty.
        source: training pairs, instead of ``data.train``.

    Raises:
        DataError: fewer than two pairs are left to train on.
    """
    image, caption = config.image_column or None, config.caption_column or None
    streaming = {"auto": None, "yes": True, "no": False}[config.streaming]
    label = config.label_column or None
    training = source or open_source(
        config.train, image=image, caption=caption, label=label, streaming=streaming
    )
    held_out: Source | None
    if config.val:
        held_out = open_source(config.val, image=image, caption=caption)
    else:
        training, held_out = split_held_out(training, config.val_fraction, seed)
    if not training.streaming and len(training.rows) < 2:
        raise DataError(
            f"{config.train} leaves {'one pair' if training.rows else 'no pair'} to train on, "
            "expected at least 2; add pairs, or lower data.val_fraction"
        )
    return training, held_out


def count_truncated_captions(source: Source, config: DataConfig, cut: TruncationReport) -> None:
    """Count beforehand what 77 tokens will cut; a stream's captions are counted as they come.

    Args:
        source: a table of pairs.
        config: what happens to captions that are too long.
        cut: counts them.

    Raises:
        DataError: there are no captions.
        CaptionError: one does not fit, where ``long_captions`` is ``"error"``.
    """
    some = False
    for batch in source.rows.select_columns("captions").iter(batch_size=1000):
        texts = [text for captions in batch["captions"] for text in captions]
        some = some or bool(texts)
        if config.long_captions == "split":
            texts = [part for text in texts for part in split_caption(text)]
        tokenize(texts, policy=_policy(config), report=cut)
    if not some:
        raise no_captions(source)


def require_captions(source: Source) -> None:
    """Raise DataError for a table without a single caption."""
    batches = source.rows.select_columns("captions").iter(batch_size=1000)
    if not any(any(batch["captions"]) for batch in batches):
        raise no_captions(source)


def _policy(config: DataConfig) -> Literal["cut", "error"]:
    return "error" if config.long_captions == "error" else "cut"


def pair_loader(
    config: TrainConfig,
    source: Source,
    image_size: tuple[int, int],
    cut: TruncationReport,
    world: World,
) -> PairLoader:
    """Batches of training pairs, augmented and tokenized.

    Args:
        config: of the run.
        source: its training pairs.
        image_size: height and width of the images, in pixels.
        cut: counts the captions that are too long, for a stream.
        world: the processes that share each batch.

    Raises:
        ConfigError: a stream is to be balanced, or read in batches of like length.
        DataError: labels are wanted that are not there.
    """
    require_labels(source, config.data.caption_weights)
    # A table's captions were counted before; a stream's are known only now.
    report = cut if source.streaming else TruncationReport()
    return PairLoader(
        source,
        preprocess=augmentation(config.augment, image_size, config.data.decode),
        tokenize=lambda texts: tokenize(texts, policy=_policy(config.data), report=report),
        split=split_caption if config.data.long_captions == "split" else None,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        workers=worker_count(config.data.workers),
        skip_limit=config.data.max_skipped_fraction,
        reduction=reduction(config.augment, image_size, config.data.decode),
        classes=class_numbers(source) if config.data.balance == "label" else None,
        lengths=caption_lengths(source, config.train.seed)
        if config.train.bucket_by_length
        else None,
        weights=config.data.caption_weights,
        pinned=world.device.type == "cuda",
        share=Share(world.rank, world.size, world.all_gather_object),
    )


def caption_lengths(source: Source, seed: int) -> CaptionLengths:
    """How many tokens, at most 77, each caption of a table has; one to be split counts whole.

    Raises:
        ConfigError: the source streams.
    """
    if source.streaming:
        raise ConfigError(
            f"train.bucket_by_length sorts captions, but {source.spec} streams; set "
            'data.streaming = "no", or train.bucket_by_length = false'
        )
    tokens, counts, turns = [np.empty(0, np.int64)], [], []
    for part in source.rows.select_columns(["key", "captions"]).iter(batch_size=1000):
        texts = [usable(captions) for captions in part["captions"]]
        counts += [len(captions) for captions in texts]
        turns += [
            first_turn(seed, key) % max(len(c), 1)
            for key, c in zip(part["key"], texts, strict=True)
        ]
        read = tokenize(list(chain.from_iterable(texts)), report=TruncationReport())
        tokens.append(read.argmax(axis=1) + 1)  # the end token has the largest id
    count = np.array(counts, np.int64)
    first = np.cumsum(count) - count
    return CaptionLengths(np.concatenate(tokens), first, count, np.array(turns, np.int64))


def other_data(state: dict[str, Any], source: Source) -> str:
    """What a person should hear of a run that goes on with other pairs; empty if they are the same.

    Args:
        state: of the training so far, with the fingerprint of its pairs.
        source: the pairs from now on.
    """
    if state.get("source", source.fingerprint) == source.fingerprint:
        return ""
    return (
        f"{source.spec} is not what the run was trained on so far (names, sizes or times of its "
        "files differ), and from here on it reads what is there now; put the old data back for "
        "the run that was begun, or start a new one"
    )


def image_cache(config: TrainConfig, loader: PairLoader, folder: Path) -> ImageCache | None:
    """Where a run keeps decoded pictures, as ``data.image_cache`` says; None: nowhere.

    Args:
        config: of the run.
        loader: its training pairs; pictures of a stream are not kept.
        folder: of the run.
    """
    per_epoch, loop = loader.batches_per_epoch, config.train
    if per_epoch is None:
        return None
    once = loop.steps <= per_epoch if loop.steps else loop.epochs == 1
    setting = "no" if once and config.data.image_cache == "auto" else config.data.image_cache
    return open_cache(setting, folder)


ROWS = 4096
"""Images whose features are read at a time."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs. Where a locked tower's features are stored, only what is above them is run.

    Attributes:
        source: where the pairs come from.
        workers: decoding threads.
        images: stored features of the images; None: the whole image tower is run.
        captions: stored features of the captions; None: the whole text tower is run.
    """

    source: Source
    workers: int
    images: Features | None = None
    captions: CaptionFeatures | None = None

    def encode(self, encoder: Encoder) -> EncodedPairs:
        """The pairs as vectors of the model as it is; raises what ``encode_pairs`` raises."""
        return encode_pairs(
            encoder,
            self.source,
            workers=self.workers,
            progress=False,
            known=_images(encoder, self.images) if self.images else None,
            known_captions=_captions(encoder, self.captions) if self.captions else None,
        )


def _images(encoder: Encoder, features: Features) -> Callable[[Row], Vectors]:
    views = features.values[:, 0]
    parts = (np.array(views[start : start + ROWS]) for start in range(0, len(views), ROWS))
    vectors = np.concatenate([_vectors(encoder, "image", torch.from_numpy(x)) for x in parts])

    def known(row: Row) -> Vectors:
        key = row["key"]
        if key in features.skipped:
            raise ImageError(features.skipped[key])
        row_number = features.rows[key]
        return vectors[row_number : row_number + 1]

    return known


def _captions(
    encoder: Encoder, features: CaptionFeatures
) -> Callable[[Sequence[str], TruncationReport], Vectors]:
    def known(texts: Sequence[str], report: TruncationReport) -> Vectors:
        tokens = torch.from_numpy(tokenize(texts, report=report))
        return _vectors(encoder, "text", features.of(tokens))

    return known


@torch.inference_mode()
def _vectors(encoder: Encoder, tower: str, features: Tensor) -> Vectors:
    network = encoder.network.eval()
    vectors: Vectors = network.encode_features(tower, features.to(encoder.device)).cpu().numpy()
    return vectors
