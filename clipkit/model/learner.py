"""One optimisation step on one batch, and the state that the next one starts from."""

import math
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipkit.config import TrainConfig
from clipkit.data.collate import PairBatch
from clipkit.model.blanks import fill_up
from clipkit.model.checkpoint import STATE, WEIGHTS, Towers, damaged, load_training_state
from clipkit.model.chunks import Loss, backward
from clipkit.model.distributed import World
from clipkit.model.drop_tokens import drop_tokens
from clipkit.model.gradients import clip_gradients, sum_gradients
from clipkit.model.groups import pair_groups
from clipkit.model.loss import guessing_loss, info_nce
from clipkit.model.network import DualEncoder, is_convolutional
from clipkit.model.normalisation import share_statistics
from clipkit.model.optim import MAX_LOGIT_SCALE, build_optimizer, learning_rate
from clipkit.model.recovery import Health, Statistics
from clipkit.model.sharding import load_optimizer, load_weights, own_part, shard, whole_state
from clipkit.model.stored import CaptionFeatures
from clipkit.model.tower_options import checkpoint_gradients, require_compiler
from clipkit.model.towers import build_towers
from clipkit.model.transfer import send

MOST_CHUNKS = 65_536
"""Seeds set aside for the chunks of a step."""


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: of the batch.
        grad_norm: norm of the whole gradient before clipping; if it or the loss is not finite, the
            step was left out.
        lr: the learning rate used where nothing scales it down.
    """

    loss: float
    grad_norm: float
    lr: float


class Learner:
    """The network and its optimiser.

    Args:
        towers: what to train.
        config: how.
        world: where, and with which other processes.
    """

    def __init__(self, towers: Towers, config: TrainConfig, world: World) -> None:
        self.config, self.towers, self.world, self.device = config, towers, world, world.device
        if config.train.grad_checkpointing:
            checkpoint_gradients(towers.clip)
        if config.train.compile:
            require_compiler(self.device)
        self.sharded = config.train.shard and world.size > 1
        # What a checkpoint is made of: on the first process the whole of what is dealt out.
        self._whole = deepcopy(towers) if self.sharded and world.is_first else towers
        self.network = DualEncoder(
            towers.clip, config.train.precision, towers.locked, compiled=config.train.compile
        )
        if is_convolutional(towers.clip):
            self.network.to(memory_format=torch.channels_last)
        share_statistics(self.network, world)
        if self.sharded:
            shard(self.network, world)
        self.network.to(self.device)  # the shards are there already, block by block
        self.optimizer = build_optimizer(towers.clip, config.optim)
        self.captions: CaptionFeatures | None = None
        self.health = Health()
        self._statistics = Statistics(self.network)
        mean, std = (torch.tensor(towers.preprocess[key]) for key in ("mean", "std"))
        self._mean = (255 * mean)[:, None, None].to(self.device)
        self._std = (255 * std)[:, None, None].to(self.device)

    def use_features(self, captions: CaptionFeatures | None) -> None:
        """Take stored features in place of what a locked tower would encode.

        Args:
            captions: those of a locked text tower; a batch brings those of images itself.
        """
        self.captions = captions
        self.network.given_features = frozenset(self.network.locked)

    def take_step(self, batch: PairBatch, step: int, progress: float) -> StepReport:
        """Learn from one batch.

        Args:
            batch: its pairs; of several processes each has its share of them.
            step: its number, which seeds dropout.
            progress: share of the run done after it, in [0, 1], which sets the learning rate.
        """
        rate = self.health.rate * learning_rate(progress, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.network.train()
        self._statistics.keep()
        images, tokens = fill_up(batch, self.config.train, self.world, self.towers.image_size)
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.train.chunk_size or len(tokens)
        # Each step draws from a seed of its own, so that a resumed run draws the same.
        seed = (self.config.train.seed * 1_000_003 + step) * MOST_CHUNKS % 2**62
        seed += self.world.rank * (MOST_CHUNKS // self.world.size)
        texts = self._read(tokens, seed)
        chunks = list(zip(torch.split(images, size), torch.split(texts, size), strict=True))
        loss_of = self._loss(batch)
        loss = backward(self.network, chunks, self.normalized, loss_of, seed, len(batch))
        sum_gradients(self.network.parameters(), self.world)
        limit = self.config.optim.clip_norm or math.inf
        norm = clip_gradients(self.network.parameters(), limit)
        # In one piece, for a GPU is waited for.
        loss_found, norm_found = torch.stack([loss.double(), norm.double()]).tolist()
        finite = math.isfinite(loss_found) and math.isfinite(norm_found)
        if finite:
            self.optimizer.step()
            self.towers.clip.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        else:
            self._statistics.put_back()
        self.health.note(step + 1, finite)
        return StepReport(loss_found, norm_found, rate)

    def _read(self, tokens: Tensor, seed: int) -> Tensor:
        """What the text tower reads of captions, int64 [n, 77]; or their stored features."""
        if self.captions:
            return send(self.captions.of(tokens), self.device)
        share = self.config.augment.drop_tokens
        return drop_tokens(tokens, share, torch.Generator().manual_seed(seed)) if share else tokens

    def _loss(self, batch: PairBatch) -> Loss:
        """The loss of a batch, of which only the vectors and the scale are missing."""
        n = len(batch)  # the blank pairs at the end do not count

        def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
            return info_nce(
                images[:n],
                texts[:n],
                scale,
                groups=pair_groups(batch.keys, batch.tokens),  # now, while a GPU encodes
                weights=batch.weights,
                duplicates=self.config.train.duplicates,
                world=self.world,
            )

        return loss

    def guess(self, batch: PairBatch) -> float:
        """The loss of a model that guesses on a batch. All processes must ask."""
        return guessing_loss(
            pair_groups(batch.keys, batch.tokens),
            weights=batch.weights,
            duplicates=self.config.train.duplicates,
            world=self.world,
        )

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] in [0, 255] to float32 as the image tower expects it.

        Stored features are so already.
        """
        if "image" in self.network.given_features:
            return send(images, self.device)
        # Channels stay last in memory, as they come: so convolutions and patch embeddings like it.
        images = send(images, self.device).to(torch.float32, memory_format=torch.channels_last)
        return images.sub_(self._mean).div_(self._std)

    def state(self) -> dict[str, Any]:
        """The optimiser's state and counts; weights are saved beside it. All processes must ask."""
        optimizer = whole_state(self.optimizer.state_dict())
        return {"optimizer": optimizer, "health": asdict(self.health)}

    def is_finite(self) -> bool:
        """Whether all weights are finite. All processes must ask."""
        held = (own_part(parameter) for parameter in self.network.parameters())
        found = torch.stack([tensor.isfinite().all() for tensor in held]).all()
        return all(self.world.exchange(bool(found)))

    def whole_towers(self) -> Towers:
        """The towers with their present weights, on the first process. All processes must ask."""
        if self.sharded:
            weights = whole_state(self.towers.clip.state_dict())
            if self.world.is_first:
                self._whole.clip.load_state_dict(weights)
        return self._whole

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Take over weights and state of a checkpoint; returns its whole training state.

        Raises:
            ArtifactError: it is damaged, or of another model.
        """
        state = load_training_state(checkpoint)
        try:
            load_weights(self.towers.clip, load_file(checkpoint / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise damaged(checkpoint / WEIGHTS, error) from None
        try:
            load_optimizer(self.optimizer, state["optimizer"])
            self.health = Health(**state["health"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise damaged(checkpoint / STATE, error) from None
        return state

    def start_over(self) -> dict[str, Any]:
        """Take over the weights that the run began with; returns an empty training state."""
        config = self.config
        towers = build_towers(config.model, config.optim.temperature, config.train.seed)
        load_weights(self.towers.clip, towers.clip.state_dict())
        self.optimizer = build_optimizer(self.towers.clip, config.optim)
        return {}
