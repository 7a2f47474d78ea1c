"""Freeze locked towers, and cache their features so that training need not run them in every step.

Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image Text Tuning".
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipkit.artifacts import ModelRef
from clipkit.config import ModelConfig, TrainConfig
from clipkit.data.feature_cache import Encoded, Features, stored_features
from clipkit.data.rows import Row
from clipkit.data.sampler import stable_hash
from clipkit.data.source import Source, chunks
from clipkit.data.transforms import Preprocess, augmentation
from clipkit.data.workers import map_ordered, worker_count
from clipkit.errors import ConfigError, ImageError
from clipkit.models.checkpoint import Towers, fingerprint
from clipkit.models.dual_encoder import DualEncoder, LockedTower, vector_dim
from clipkit.models.tokenizer import TruncationReport, split_caption, tokenize
from clipkit.progress import progress_bar

BATCH = 64
"""Batch size for encoding images or captions with a locked tower."""


def lock_towers(config: ModelConfig, clip: Any) -> dict[str, LockedTower]:
    """Freeze the pretrained parts of the towers that ``config.lock`` names.

    Args:
        config: names the towers and the origin of their weights.
        clip: the open_clip model.

    Returns:
        The locked towers by name, each with its frozen body and its trainable head.

    Raises:
        ConfigError: a locked tower has random weights, or nothing is left to train.
    """
    if set(config.lock) == {"image", "text"}:
        raise ConfigError("model.lock names both towers, which leaves nothing to train; name one")
    locked = {}
    if "text" in config.lock:
        locked["text"] = LockedTower(_text_tower(config, clip), nn.Identity())
    if "image" in config.lock:
        locked["image"] = _image_tower(config, clip.visual)
    for tower in locked.values():
        tower.body.requires_grad_(False).eval()
    return locked


def _image_tower(config: ModelConfig, visual: Any) -> LockedTower:
    if config.init_from:
        return LockedTower(visual, nn.Identity())
    if not config.image_weights:
        raise _random_weights("image", "model.init_from or model.image_weights")
    if visual.trunk.num_classes:  # its last layer serves as the projection
        raise ConfigError(
            "model.lock cannot part this image tower from its projection; set vision.timm_proj to "
            '"linear" or "mlp"'
        )
    return LockedTower(visual.trunk, visual.head)


def _text_tower(config: ModelConfig, clip: Any) -> nn.Module:
    if not config.init_from:
        raise _random_weights("text", "model.init_from")
    if hasattr(clip, "text"):
        return clip.text  # type: ignore[no-any-return]
    # In open_clip's CLIP, the parts of the text tower are attributes of the model itself.
    tower = nn.Module()
    for name in ("token_embedding", "positional_embedding", "transformer", "ln_final"):
        setattr(tower, name, getattr(clip, name))
    tower.text_projection = clip.text_projection
    return tower


def _random_weights(tower: str, fields: str) -> ConfigError:
    return ConfigError(
        f'model.lock names "{tower}", whose weights would stay random; set {fields}, or leave it '
        "out"
    )


@dataclass(frozen=True)
class CaptionFeatures:
    """Stored features of captions, looked up by their tokens."""

    features: Features

    def of(self, tokens: Tensor) -> Tensor:
        """Features of tokenised captions: int64 [n, 77] to float32 [n, dim]."""
        rows = [self.features.rows[_key(row)] for row in tokens.cpu().numpy()]
        return torch.from_numpy(self.features.values[rows, 0])


def uses_features(config: TrainConfig, source: Source) -> bool:
    """Whether locked towers run once, before training, instead of in every step.

    Raises:
        ConfigError: the features of a stream or of augmented captions would be cached, or a field
            about cached features is set without a locked tower.
    """
    if not config.model.lock and (config.data.feature_dir or config.data.feature_views > 1):
        raise ConfigError(
            "data.feature_dir and data.feature_views need a locked tower, but model.lock is empty; "
            "remove them, or set model.lock"
        )
    if not (config.model.lock and config.data.feature_views):
        return False
    if source.streaming:
        raise ConfigError(
            "features of a locked tower cannot be cached for a stream; set data.feature_views = 0 "
            'to run the tower in every step, or data.streaming = "no"'
        )
    if "text" in config.model.lock and config.augment.token_dropout:
        raise ConfigError(
            "augment.token_dropout changes captions in every step, but a locked text tower encodes "
            "each caption once; remove it, or set data.feature_views = 0"
        )
    return True


def locked_features(
    network: DualEncoder, towers: Towers, config: TrainConfig, source: Source, folder: Path
) -> tuple[Features | None, CaptionFeatures | None]:
    """Encode the images and captions of a source with the locked towers, or open cached features.

    Args:
        network: the network with the locked towers.
        towers: their preprocessing.
        config: the run's views, augmentation, seed, precision and policy for long captions.
        source: the training data, not a stream.
        folder: directory of the cached features.

    Returns:
        The features of the images and of the captions; None for a tower that is not locked.
    """
    made_of = (network, towers, config, source, folder)
    return (
        _image_features(*made_of) if "image" in network.locked else None,
        _caption_features(*made_of) if "text" in network.locked else None,
    )


def _image_features(
    network: DualEncoder, towers: Towers, config: TrainConfig, source: Source, folder: Path
) -> Features:
    """Features of the images of a source, with one or several views each."""
    maker = _ImageMaker(network, towers, config, source)
    views = config.data.feature_views
    facts = {"views": views, "precision": network.precision, "data": source.fingerprint}
    if views > 1:
        facts |= {"augment": asdict(config.augment), "seed": config.train.seed}
        facts["decode"] = config.data.decode
    body = network.locked["image"].body
    model = _reference(config, towers, fingerprint(body, towers.preprocess))
    return stored_features(folder, "image", model, facts, source.table.keys, maker.encode)


def _caption_features(
    network: DualEncoder, towers: Towers, config: TrainConfig, source: Source, folder: Path
) -> CaptionFeatures:
    """Features of the distinct captions of a source."""
    blank = tokenize("")[0]  # used for padding when a process has no pair
    captions = {_key(blank): blank}
    for rows in chunks(source.rows.texts(), 1000):
        texts = [text for row in rows for text in row.captions]
        if config.data.long_captions == "split":
            texts = [part for text in texts for part in split_caption(text)]
        captions |= {_key(tokens): tokens for tokens in tokenize(texts, report=TruncationReport())}
    distinct = list(captions.values())

    def encode(start: int) -> Iterator[Encoded]:
        starts = range(start, len(distinct), BATCH)
        for at in progress_bar(starts, desc="locked text tower"):
            tokens = torch.from_numpy(np.stack(distinct[at : at + BATCH]))
            features = network.features("text", tokens.to(network.scale.device))
            yield features.cpu().numpy()[:, None], {}

    model = _reference(config, towers, fingerprint(network.locked["text"].body, {}))
    facts = {"precision": network.precision}
    return CaptionFeatures(stored_features(folder, "text", model, facts, list(captions), encode))


class _ImageMaker:
    """Encodes the images of a table with the locked image tower, prefetching the next ones."""

    def __init__(
        self, network: DualEncoder, towers: Towers, config: TrainConfig, source: Source
    ) -> None:
        self.network, self.config, self.source = network, config, source
        self.size = towers.image_size
        self.plain = preprocess = Preprocess.of(towers.preprocess)
        self.augment = augmentation(config.augment, self.size, config.data.decode)
        self.mean, self.std = (
            255 * torch.tensor(values)[:, None, None]
            for values in (preprocess.mean, preprocess.std)
        )

    def encode(self, start: int) -> Iterator[Encoded]:
        """Yield the features of the rows from ``start`` on, and the reasons for unreadable rows."""
        views, rows = self.config.data.feature_views, self.source.table
        rest = rows.select(range(start, len(rows)))
        results = map_ordered(
            self._read, rest, workers=worker_count(self.config.data.workers), ahead=2 * BATCH
        )
        with progress_bar(total=len(rest), unit="img", desc="locked image tower") as bar:
            while some := list(islice(results, max(1, BATCH // views))):
                bad = {key: found for key, found in some if isinstance(found, str)}
                # An unreadable row is encoded as zeros, so that row numbers stay the same.
                nothing = torch.zeros(views, 3, *self.size)
                images = [nothing if isinstance(found, str) else found for _, found in some]
                batch = torch.cat(images).to(self.network.scale.device)
                features = self.network.features("image", batch).cpu().numpy()
                yield features.reshape(len(some), views, *features.shape[1:]), bad
                bar.update(len(some))

    def _read(self, row: Row) -> tuple[str, Tensor | str]:
        """A row's key, and its views, float32 [views, 3, height, width], or the reason for none."""
        key = row.key
        try:
            image = row.read_image()
        except ImageError as error:
            return key, str(error)
        views = [self.plain(image)]
        for view in range(1, self.config.data.feature_views):
            generator = random.Random(stable_hash(self.config.train.seed, view, key))
            pixels = torch.tensor(self.augment(np.asarray(image), generator)).permute(2, 0, 1)
            views.append((pixels - self.mean) / self.std)
        return key, torch.stack(views)


def _reference(config: TrainConfig, towers: Towers, body: str) -> ModelRef:
    model = config.model
    name = model.init_from or model.name or str(model.vision.get("timm_model_name", ""))
    return ModelRef(name, model.image_weights, body, vector_dim(towers.clip))


def _key(tokens: NDArray[np.int64]) -> str:
    """A caption's tokens up to the end token, as text."""
    return tokens[: tokens.argmax() + 1].astype("<u2").tobytes().hex()
