"""Synchronised batch normalisation: statistics over the batches of all processes."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.models.cpu_kernels import replace_module
from clipkit.training.distributed import World


def share_statistics(network: nn.Module, world: World) -> None:
    """Synchronise batch normalisation over all processes, in place; on GPUs with torch's layers.

    With micro-batches of m pairs in each of N processes, statistics are over N · m pairs, as in one
    process with micro-batches of N · m. The names in a checkpoint do not change.

    Args:
        network: any network.
        world: the processes.
    """
    if world.size == 1:
        return
    if world.device.type == "cuda":
        for name, child in network.named_children():
            setattr(network, name, convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
        return
    for name, module in [*network.named_modules()]:
        if isinstance(module, _BatchNorm):
            replace_module(network, name, SharedNorm(module, world))


def count_rows(network: nn.Module, rows: int) -> None:
    """Set how many rows of the next batch are real pairs; the padding rows after them are ignored.

    Torch's layers, which are used on GPUs, count padding rows too.

    Args:
        network: after ``share_statistics``.
        rows: number of real pairs, at least 0.
    """
    for module in network.modules():
        if isinstance(module, SharedNorm):
            module.rows = rows


class SharedNorm(_BatchNorm):
    """Batch normalisation with statistics over the rows of all processes.

    Args:
        norm: the layer to replace; its weights, running statistics and, for timm's layers,
            activation are reused.
        world: the processes; all must call the layer equally often.

    Attributes:
        rows: number of rows, from the first, that count in the statistics; None counts all.
    """

    rows: int | None

    def __init__(self, norm: _BatchNorm, world: World) -> None:
        tracks = norm.track_running_stats
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, tracks, device="meta"
        )
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.world, self.rows = world, None
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n, channels, …]; in evaluation mode with the running statistics."""
        if not self.training:
            mean, var, batch = self.running_mean, self.running_var, self.running_mean is None
            normed = F.batch_norm(x, mean, var, self.weight, self.bias, batch, 0.0, self.eps)
        else:
            rows = len(x) if self.rows is None else min(self.rows, len(x))
            normed, mean, var, count = _Shared.apply(
                x, self.weight, self.bias, rows, self.eps, self.world
            )
            self._track(mean, var, count)
        result: Tensor = self.act(self.drop(normed))
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics with those of a batch, as torch does."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.running_mean is None or self.running_var is None:
            return
        share = self.momentum
        if share is None:  # a cumulative mean over all batches
            share = 1 / int(self.num_batches_tracked or 1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        unbiased = var * (count / (count - 1).clamp_min_(1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


class _Shared(torch.autograd.Function):
    """Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1, over the rows of all processes.

    Each process computes mean and variance of its own rows. One all-gather combines them (Chan,
    Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", section 2), without the cancellation that sums of squares suffer from. Torch's
    kernels do all work per pixel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: int,
        eps: float,
        world: World,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(x)
        mean, var, count = _joined(wide[:rows], world)
        normed = F.batch_norm(wide, mean, var, weight, bias, eps=eps)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.rows, ctx.eps, ctx.world = rows, eps, world
        ctx.mark_non_differentiable(mean, var, count)
        return normed.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        gain = torch.ones_like(mean) if weight is None else weight
        wide = _wide(x)
        # Treats the statistics as constants; the gradient through them is subtracted below.
        of_x, of_gain, of_bias = torch.ops.aten.native_batch_norm_backward(
            _wide(upstream), wide, gain, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            rise, slope = ctx.world.add(torch.stack([of_bias, of_gain])) / count
            inverse = (var + ctx.eps).rsqrt_()
            # gain · inverse · (rise + slope · normed), with normed = inverse · (x − mean)
            rise, slope = gain * inverse * rise, gain * inverse**2 * slope
            through = (wide[: ctx.rows] - _along(mean, x)).mul_(_along(slope, x))
            of_x[: ctx.rows].sub_(through.add_(_along(rise, x)))
        if weight is None:
            of_gain = of_bias = None
        return of_x.to(x.dtype), of_gain, of_bias, None, None, None


def _joined(x: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over all processes, and the number of values."""
    channels = x.shape[1]
    mean, var = x.new_zeros(2, channels)
    count = x.new_tensor([x.numel() / channels])
    if len(x):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    parts = world.gather(torch.cat([mean, var, count])[None], [1] * world.size)
    means, variances, counts = torch.split(parts, [channels, channels, 1], dim=1)
    shares = counts / counts.sum()
    mean = (shares * means).sum(dim=0)
    var = (shares * (variances + (means - mean) ** 2)).sum(dim=0)
    return mean, var, counts.sum()


def _wide(x: Tensor) -> Tensor:
    """Cast half precision to float32: sums in bf16 would lose small addends."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _along(of_channels: Tensor, x: Tensor) -> Tensor:
    """Reshape [channels] to broadcast with ``x``, [n, channels, …]."""
    return of_channels.view(-1, *[1] * (x.ndim - 2))
