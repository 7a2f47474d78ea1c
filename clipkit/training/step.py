"""One optimization step on one batch: padding, forward and backward pass, clipping, update.

``Trainer`` holds the model, the optimizer and the recovery state that a checkpoint saves. A
non-finite step is skipped here; ``recovery`` rolls back to a checkpoint.
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
from clipkit.training.loss import chance_loss, info_nce, pair_groups
from clipkit.training.optim import MAX_LOGIT_SCALE, build_optimizer, learning_rate
from clipkit.training.sync_batchnorm import share_statistics

BUCKET = 1 << 24
"""Numbers per all-reduce of gradients: 64 MB in float32."""


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum the gradients over all processes, each of which has those of its own pairs.

    DistributedDataParallel would overlap this with the backward pass, but it expects a single
    backward pass through all parameters. Here the scale gets its gradient from the loss and the
    towers get theirs in micro-batches, so only the last one could overlap. Each gradient is sent
    once per step, whatever the number of micro-batches.

    Args:
        parameters: of the network. FSDP has already averaged the gradients of shards.
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
    """Clip the gradient to a norm of at most ``limit``; returns its norm before, float []."""
    trained = [p for p in parameters if p.grad is not None]
    # Torch cannot take the norm of sharded and whole gradients together.
    kinds = [p for p in trained if is_shard(p)], [p for p in trained if not is_shard(p)]
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    norm = whole(norms[0]) if len(norms) == 1 else get_total_norm([whole(n) for n in norms])
    for kind in kinds:
        clip_grads_with_norm_(kind, limit, norm)
    return norm


def drop_tokens(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Drop each token of each caption with the same probability and close the gaps.

    Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods for Text
    Classification", section 4 ("word dropout").

    Args:
        tokens: int64 [n, 77]; start and end tokens are never dropped.
        share: the probability, in [0, 1].
        generator: random number generator.

    Returns:
        int64 [n, 77].
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    ends = tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
    drawn = torch.rand(tokens.shape, generator=generator).to(tokens.device) < share
    kept = ~(drawn & (places > 0) & (places < ends)) & (places <= ends)
    order = (~kept).int().argsort(dim=1, stable=True)
    return tokens.gather(1, order) * (places < kept.sum(dim=1, keepdim=True))


def pad_batch(
    batch: PairBatch, config: LoopConfig, world: World, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Images and tokens of a batch, with padding pairs at the end for missing micro-batches.

    Processes have fewer pairs than others if images cannot be read, yet they must take part in
    collective operations equally often. The loss ignores padding pairs, and so does batch
    normalisation, except on GPUs.

    Args:
        batch: n pairs, this process's part.
        config: intended batch and micro-batch size.
        world: the processes; a single process needs no padding.
        image_size: height and width, for a batch without images.

    Returns:
        images [m, …] and tokens, int64 [m, 77], with m ≥ n.
    """
    images, tokens = batch.images, batch.tokens
    per_process = config.batch_size // world.size
    size = config.micro_batch_size or per_process
    all_but_last = -(-per_process // size) - 1
    missing = all_but_last * size + 1 - len(tokens)
    if world.size == 1 or missing <= 0:
        return images, tokens
    # An empty batch of images has no size; cached features keep their shape even if empty.
    shape = (3, *image_size) if images.ndim == 4 and not len(images) else images.shape[1:]
    padding = torch.from_numpy(tokenize([""] * missing))
    images = torch.cat([images.reshape(-1, *shape), images.new_zeros((missing, *shape))])
    return images, torch.cat([tokens, padding])


MAX_MICRO_BATCHES = 65_536
"""Random seeds reserved for the micro-batches of a step."""


@dataclass
class RecoveryState:
    """Counts of non-finite steps and rollbacks, saved with each checkpoint.

    Attributes:
        skipped_steps: steps skipped because their loss or gradient was not finite.
        consecutive_skipped: how many of the last steps were skipped in a row.
        last_finite_step: number of the last step that was not skipped.
        rollbacks: how often the run was rolled back.
        lr_factor: factor on the learning rate, lowered by each rollback.
    """

    skipped_steps: int = 0
    consecutive_skipped: int = 0
    last_finite_step: int = 0
    rollbacks: int = 0
    lr_factor: float = 1.0

    def record(self, step: int, finite: bool) -> None:
        """Count step number ``step``."""
        if finite:
            self.consecutive_skipped, self.last_finite_step = 0, step
        else:
            self.consecutive_skipped += 1
            self.skipped_steps += 1


class BatchNormSnapshot:
    """The running statistics of batch normalisation, which a skipped step must not change."""

    def __init__(self, network: nn.Module) -> None:
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._live: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._saved = [buffer.clone() for buffer in self._live]

    def save(self) -> None:
        """Copy the present statistics."""
        if self._live:
            torch._foreach_copy_(self._saved, self._live)

    def restore(self) -> None:
        """Reset the statistics to the saved ones."""
        if self._live:
            torch._foreach_copy_(self._live, self._saved)


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: of the batch.
        grad_norm: norm of the whole gradient before clipping. If it or the loss is not finite, the
            step was skipped.
        lr: learning rate before the per-layer factors.
    """

    loss: float
    grad_norm: float
    lr: float


class Trainer:
    """A dual encoder with its optimizer, on one of the processes that train it.

    Args:
        towers: the model to train, in place.
        config: of the run, resolved.
        world: device and processes.
    """

    def __init__(self, towers: Towers, config: TrainConfig, world: World) -> None:
        self.config, self.towers, self.world, self.device = config, towers, world, world.device
        if config.train.grad_checkpointing:
            checkpoint_gradients(towers.clip)
        if config.train.compile:
            require_compiler(self.device)
        self.sharded = config.train.fsdp and world.size > 1
        # Checkpoints are saved from a whole copy on the main process.
        self._whole = deepcopy(towers) if self.sharded and world.is_main_process else towers
        self.network = DualEncoder(
            towers.clip, config.train.precision, towers.locked, compiled=config.train.compile
        )
        if is_convolutional(towers.clip):
            self.network.to(memory_format=torch.channels_last)
        share_statistics(self.network, world)
        if self.sharded:
            shard(self.network, world)
        self.network.to(self.device)  # shards are already there, block by block
        self.optimizer = build_optimizer(towers.clip, config.optim)
        self.captions: CaptionFeatures | None = None
        self.recovery = RecoveryState()
        self._batch_norm = BatchNormSnapshot(self.network)
        mean, std = (torch.tensor(towers.preprocess[key]) for key in ("mean", "std"))
        self._mean = (255 * mean)[:, None, None].to(self.device)
        self._std = (255 * std)[:, None, None].to(self.device)

    def use_features(self, captions: CaptionFeatures | None) -> None:
        """Use cached features in place of running locked towers.

        Args:
            captions: features of a locked text tower. Those of images come with each batch.
        """
        self.captions = captions
        self.network.given_features = frozenset(self.network.locked)

    def take_step(self, batch: PairBatch, step: int, progress: float) -> StepReport:
        """Update the weights on one batch, or skip it if its loss or gradient is not finite.

        Args:
            batch: this process's part of the batch.
            step: number of the step from 0; seeds dropout.
            progress: fraction of the run completed after it, in [0, 1]; sets the learning rate.
        """
        rate = self.recovery.lr_factor * learning_rate(progress, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.network.train()
        self._batch_norm.save()
        images, tokens = pad_batch(batch, self.config.train, self.world, self.towers.image_size)
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.train.micro_batch_size or len(tokens)
        # Each step has its own seed, so a resumed run draws the same numbers.
        seed = (self.config.train.seed * 1_000_003 + step) * MAX_MICRO_BATCHES % 2**62
        seed += self.world.rank * (MAX_MICRO_BATCHES // self.world.size)
        texts = self._text_inputs(tokens, seed)
        micro_batches = list(zip(torch.split(images, size), torch.split(texts, size), strict=True))
        loss_of = self._loss(batch)
        loss = backward(self.network, micro_batches, self.normalized, loss_of, seed, len(batch))
        sum_gradients(self.network.parameters(), self.world)
        limit = self.config.optim.clip_norm or math.inf
        norm = clip_gradients(self.network.parameters(), limit)
        # One transfer, because each one waits for the GPU.
        loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            self.optimizer.step()
            self.towers.clip.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        else:
            self._batch_norm.restore()
        self.recovery.record(step + 1, finite)
        return StepReport(loss_value, norm_value, rate)

    def _text_inputs(self, tokens: Tensor, seed: int) -> Tensor:
        """Inputs of the text tower: tokens, int64 [n, 77], or cached features, float [n, dim]."""
        if self.captions:
            return send(self.captions.of(tokens), self.device)
        share = self.config.augment.token_dropout
        return drop_tokens(tokens, share, torch.Generator().manual_seed(seed)) if share else tokens

    def _loss(self, batch: PairBatch) -> Loss:
        """The loss of a batch as a function of its vectors and the scale."""
        n = len(batch)  # padding pairs at the end are ignored

        def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
            return info_nce(
                images[:n],
                texts[:n],
                scale,
                groups=pair_groups(batch.keys, batch.tokens),  # computed while the GPU encodes
                weights=batch.weights,
                duplicates=self.config.train.duplicates,
                world=self.world,
            )

        return loss

    def chance_loss(self, batch: PairBatch) -> float:
        """The loss of a uniform predictor on a batch. Collective: all processes must call it."""
        return chance_loss(
            pair_groups(batch.keys, batch.tokens),
            weights=batch.weights,
            duplicates=self.config.train.duplicates,
            world=self.world,
        )

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] in [0, 255] to float32, normalised for the image tower.

        Cached features are returned as they are.
        """
        if "image" in self.network.given_features:
            return send(images, self.device)
        # Images arrive channels-last, which is faster for convolutions and patch embeddings.
        images = send(images, self.device).to(torch.float32, memory_format=torch.channels_last)
        return images.sub_(self._mean).div_(self._std)

    def state(self) -> dict[str, Any]:
        """Optimizer and recovery state, without the weights. Collective."""
        optimizer = whole_state(self.optimizer.state_dict())
        return {"optimizer": optimizer, "recovery": asdict(self.recovery)}

    def is_finite(self) -> bool:
        """Whether all weights are finite. Collective."""
        local = (own_part(parameter) for parameter in self.network.parameters())
        found = torch.stack([tensor.isfinite().all() for tensor in local]).all()
        return all(self.world.all_gather_object(bool(found)))

    def whole_towers(self) -> Towers:
        """The towers with their present weights, complete on the main process. Collective."""
        if self.sharded:
            weights = whole_state(self.towers.clip.state_dict())
            if self.world.is_main_process:
                self._whole.clip.load_state_dict(weights)
        return self._whole

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Load weights and state of a checkpoint; returns its whole training state.

        Raises:
            ArtifactError: it is damaged, or belongs to another model.
        """
        state = load_training_state(checkpoint)
        try:
            load_weights(self.towers.clip, load_file(checkpoint / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise damaged(checkpoint / WEIGHTS, error) from None
        try:
            load_optimizer(self.optimizer, state["optimizer"])
            self.recovery = RecoveryState(**state["recovery"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise damaged(checkpoint / STATE, error) from None
        return state

    def restart(self) -> dict[str, Any]:
        """Reset weights and optimizer to the start of the run; returns an empty state."""
        config = self.config
        towers = build_towers(config.model, config.optim.temperature, config.train.seed)
        load_weights(self.towers.clip, towers.clip.state_dict())
        self.optimizer = build_optimizer(self.towers.clip, config.optim)
        return {}
