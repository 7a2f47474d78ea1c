"""One optimisation step on one batch, and the state that the next one starts from.

Gradients across processes: summed, measured, clipped.

Captions with random tokens left out, so that a text tower cannot learn them by heart.

Blank pairs, for a process whose share of a batch is smaller than that of others.
"""

import math
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clipkit.config import LoopConfig, TrainConfig
from clipkit.data.loader import PairBatch
from clipkit.models.checkpoint import STATE, WEIGHTS, Towers, damaged, load_training_state
from clipkit.models.dual_encoder import DualEncoder, is_convolutional
from clipkit.models.tokenizer import tokenize
from clipkit.models.transformer import send
from clipkit.training.build import build_towers, checkpoint_gradients, require_compiler
from clipkit.training.distributed import World
from clipkit.training.frozen_towers import CaptionFeatures
from clipkit.training.fsdp import (
    is_shard,
    load_optimizer,
    load_weights,
    own_part,
    shard,
    whole,
    whole_state,
)
from clipkit.training.grad_cache import Loss, backward
from clipkit.training.loss import guessing_loss, info_nce, pair_groups
from clipkit.training.optim import MAX_LOGIT_SCALE, build_optimizer, learning_rate
from clipkit.training.recovery import Health, Statistics
from clipkit.training.sync_batchnorm import share_statistics

BUCKET = 1 << 24
"""Numbers sent at once: 64 MB in float32."""


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum the gradients of all processes, which each hold those of their own pairs.

    Not DistributedDataParallel, which overlaps this with the backward pass: it plans for one
    backward pass through all parameters, but here the scale gets its gradient from the loss and the
    towers theirs in chunks, so it could do so in the last chunk only. A step sends each gradient
    once, however many chunks it has.

    Args:
        parameters: those of the network; of shards the sum is taken already, as a mean.
        world: the processes.
    """
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for local in filter(is_shard, gradients):
        local.mul_(world.size)
    for bucket in _buckets([g for g in gradients if not is_shard(g)]):
        summed = world.add(torch.cat([gradient.flatten() for gradient in bucket]))
        parts = torch.split(summed, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the whole gradient down to a norm of at most ``limit``; its norm before, float []."""
    held = [p for p in parameters if p.grad is not None]
    # Torch measures shards and whole gradients, but not both at once.
    kinds = [p for p in held if is_shard(p)], [p for p in held if not is_shard(p)]
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    norm = whole(norms[0]) if len(norms) == 1 else get_total_norm([whole(n) for n in norms])
    for kind in kinds:
        clip_grads_with_norm_(kind, limit, norm)
    return norm


def drop_tokens(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Leave each token of each caption out with the same probability; what stays moves up.

    Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods for Text
    Classification", section 4 ("word dropout").

    Args:
        tokens: int64 [n, 77]; start and end tokens always stay.
        share: the probability, in [0, 1].
        generator: the source of randomness.

    Returns:
        int64 [n, 77].
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    ends = tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
    drawn = torch.rand(tokens.shape, generator=generator).to(tokens.device) < share
    kept = ~(drawn & (places > 0) & (places < ends)) & (places <= ends)
    order = (~kept).int().argsort(dim=1, stable=True)
    return tokens.gather(1, order) * (places < kept.sum(dim=1, keepdim=True))


def fill_up(
    batch: PairBatch, config: LoopConfig, world: World, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Images and tokens of a batch, with blank pairs at the end where a chunk would be missing.

    Shares differ where rows are bad, yet what processes do together they must do equally often.
    The loss is not to see the blanks; nor does batch normalisation count them, but on GPUs.

    Args:
        batch: n pairs, the share of this process.
        config: how large batches and chunks are meant to be.
        world: the processes; nothing is ever missing to one that is alone.
        image_size: height and width, where there is no image to tell.

    Returns:
        images [m, …] and tokens, int64 [m, 77], m ≥ n.
    """
    images, tokens = batch.images, batch.tokens
    share = config.batch_size // world.size
    chunk = config.micro_batch_size or share
    full_chunks = -(-share // chunk) - 1
    missing = full_chunks * chunk + 1 - len(tokens)
    if world.size == 1 or missing <= 0:
        return images, tokens
    # Pictures of no pair have no size; what else stands for images has the right form.
    shape = (3, *image_size) if images.ndim == 4 and not len(images) else images.shape[1:]
    blank = torch.from_numpy(tokenize([""] * missing))
    images = torch.cat([images.reshape(-1, *shape), images.new_zeros((missing, *shape))])
    return images, torch.cat([tokens, blank])


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
        self.sharded = config.train.fsdp and world.size > 1
        # What a checkpoint is made of: on the first process the whole of what is dealt out.
        self._whole = deepcopy(towers) if self.sharded and world.is_main_process else towers
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
        size = self.config.train.micro_batch_size or len(tokens)
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
        share = self.config.augment.token_dropout
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
        return all(self.world.all_gather_object(bool(found)))

    def whole_towers(self) -> Towers:
        """The towers with their present weights, on the first process. All processes must ask."""
        if self.sharded:
            weights = whole_state(self.towers.clip.state_dict())
            if self.world.is_main_process:
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
