"""The data of a training run: training pairs, validation set and caches.

Opens the pairs, counts truncated captions, and configures the loader and the image cache. The
validation set is encoded with the present model, from cached features if a tower is locked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.config import DataConfig, TrainConfig
from clipkit.data.feature_cache import Features
from clipkit.data.image_cache import ImageCache, open_cache
from clipkit.data.loader import PairLoader, Share
from clipkit.data.open_source import open_source, split_data
from clipkit.data.rows import Row
from clipkit.data.sampler import (
    class_numbers,
    require_labels,
    split_held_out,
)
from clipkit.data.source import Source, chunks, mix, no_captions
from clipkit.data.transforms import augmentation, reduction
from clipkit.data.workers import worker_count
from clipkit.errors import DataError, ImageError
from clipkit.models.embed_source import EncodedPairs, encode_pairs
from clipkit.models.encoder import Encoder, Vectors
from clipkit.models.tokenizer import TruncationReport, split_caption, tokenize
from clipkit.training.distributed import World
from clipkit.training.frozen_towers import CaptionFeatures

MOST_PARTS = 16
"""More DATA without weights are opened as one source, if they are of one kind."""


def open_training_data(
    config: DataConfig, seed: int, source: Source | None = None
) -> tuple[Source, Source | None]:
    """Open the training pairs and the validation set, which may be None.

    Args:
        config: the ``[data]`` configuration.
        seed: selects the validation images if ``data.val`` is empty.
        source: training pairs, instead of ``data.train``.

    Raises:
        ConfigError: there is not one weight for each source.
        DataError: there are fewer than two training pairs.
    """
    streaming = {"auto": None, "yes": True, "no": False}[config.streaming]
    open_data = partial(
        open_source,
        image=config.image_column or None,
        caption=config.caption_column or None,
        image_root=config.image_root or None,
        encoding=config.encoding or None,
    )
    label = config.label_column or None
    given = (config.train,) if isinstance(config.train, str) else config.train
    specs = [part for spec in given for part in split_data(spec)]
    opened: list[Source] = []
    if source:
        opened = [part.source for part in source.parts] if config.weights else []
        opened = opened or [source]
    else:
        # Each stream in a mixture holds files open and rows in memory: many are read as one source.
        apart = len(specs) <= MOST_PARTS or config.weights
        opened = [
            open_data(one, label=label, streaming=streaming)
            for one in (specs if apart else [specs])
        ]
    training = opened[0] if len(opened) == 1 and not config.weights else mix(opened, config.weights)
    validation: Source | None
    if config.val:
        validation = open_data(config.val)
    else:
        training, validation = split_held_out(training, config.val_fraction, seed)
    if training.count is not None and training.count < 2:
        raise DataError(
            f"{training.spec} leaves {'one pair' if training.count else 'no pair'} to train on, "
            "expected at least 2; add pairs, or lower data.val_fraction"
        )
    return training, validation


def require_captions(source: Source) -> None:
    """Raise DataError if a table has no captions."""
    if not any(row.captions for row in source.rows.texts()):
        raise no_captions(source)


def count_truncated_captions(source: Source, config: DataConfig, cut: TruncationReport) -> None:
    """Count the captions of a table that are truncated at 77 tokens.

    The captions of a stream are counted during training.

    Args:
        source: a table of pairs.
        config: the ``[data]`` configuration, with the policy for long captions.
        cut: counts the truncated captions.

    Raises:
        DataError: there are no captions.
        CaptionError: a caption is too long and ``long_captions`` is ``"error"``.
    """
    found = False
    for rows in chunks(source.rows.texts(), 1000):
        texts = [text for row in rows for text in row.captions]
        found = found or bool(texts)
        if config.long_captions == "split":
            texts = [part for text in texts for part in split_caption(text)]
        tokenize(texts, policy=_policy(config), report=cut)
    if not found:
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
    """The loader of training batches, augmented and tokenized.

    Args:
        config: of the run.
        source: training pairs.
        image_size: height and width of the images, in pixels.
        cut: counts the truncated captions of a stream.
        world: the processes that share each batch.

    Raises:
        ConfigError: balancing is set for a stream, or for a mixture with weights.
        DataError: the configuration needs labels, and the source has none.
    """
    require_labels(source, config.data.caption_weights)
    # The captions of a table have been counted by count_truncated_captions.
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
        count_tokens=count_tokens if config.train.bucket_by_length else None,
        weights=config.data.caption_weights,
        pinned=world.device.type == "cuda",
        share=Share(world.rank, world.size, world.all_gather_object),
    )


def count_tokens(captions: Sequence[str]) -> NDArray[np.int64]:
    """The length of each caption in tokens, at most 77, int64 [n]."""
    # The end token has the largest id.
    lengths: NDArray[np.int64] = tokenize(captions, report=TruncationReport()).argmax(axis=1) + 1
    return lengths


def image_cache(config: TrainConfig, loader: PairLoader, folder: Path) -> ImageCache | None:
    """Open the cache of decoded images, as ``data.image_cache`` says; None: no cache.

    Args:
        config: of the run. ``"auto"`` does not cache images that the run reads only once.
        loader: training batches; the images of a stream are not cached.
        folder: of the run.
    """
    per_epoch, loop = loader.batches_per_epoch, config.train
    if per_epoch is None:
        return None
    once = loop.steps <= per_epoch if loop.steps else loop.epochs == 1
    setting = "no" if once and config.data.image_cache == "auto" else config.data.image_cache
    return open_cache(setting, folder)


def changed_data_warning(state: dict[str, Any], source: Source) -> str:
    """A warning if a resumed run has other training data than before; empty if not.

    Args:
        state: training state, with the fingerprint of its data; empty for a new run.
        source: present training pairs.
    """
    if state.get("source", source.fingerprint) == source.fingerprint:
        return ""
    return (
        f"{source.spec} has changed since the run started (names, sizes or times of its files "
        "differ), and training continues with the present files; restore the old files, or start "
        "a new run"
    )


FEATURE_ROWS = 4096
"""Images per block of cached features read into memory."""


@dataclass(frozen=True)
class ValidationSet:
    """The validation set, with cached features of locked towers.

    Attributes:
        source: validation pairs.
        workers: decoding threads.
        images: cached features of the images; None: the whole image tower runs.
        captions: cached features of the captions; None: the whole text tower runs.
    """

    source: Source
    workers: int
    images: Features | None = None
    captions: CaptionFeatures | None = None

    def encode(self, encoder: Encoder) -> EncodedPairs:
        """Encode the pairs with the present model; raises the errors of ``encode_pairs``."""
        return encode_pairs(
            encoder,
            self.source,
            workers=self.workers,
            progress=False,
            known=_image_encoder(encoder, self.images) if self.images else None,
            known_captions=_caption_encoder(encoder, self.captions) if self.captions else None,
        )


def _image_encoder(encoder: Encoder, features: Features) -> Callable[[Row], Vectors]:
    """A function from a row to its image vector, computed from cached features."""
    views = features.values[:, 0]  # validation images have a single view
    parts = (
        np.array(views[start : start + FEATURE_ROWS])
        for start in range(0, len(views), FEATURE_ROWS)
    )
    vectors = np.concatenate(
        [_encode_features(encoder, "image", torch.from_numpy(x)) for x in parts]
    )

    def encode(row: Row) -> Vectors:
        key = row.key
        if key in features.skipped:
            raise ImageError(features.skipped[key])
        number = features.rows[key]
        return vectors[number : number + 1]

    return encode


def _caption_encoder(
    encoder: Encoder, features: CaptionFeatures
) -> Callable[[Sequence[str], TruncationReport], Vectors]:
    """A function from captions to their vectors, computed from cached features."""

    def encode(texts: Sequence[str], report: TruncationReport) -> Vectors:
        tokens = torch.from_numpy(tokenize(texts, report=report))
        return _encode_features(encoder, "text", features.of(tokens))

    return encode


@torch.inference_mode()
def _encode_features(encoder: Encoder, tower: str, features: Tensor) -> Vectors:
    network = encoder.network.eval()
    vectors: Vectors = network.encode_features(tower, features.to(encoder.device)).cpu().numpy()
    return vectors
