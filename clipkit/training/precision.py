"""Choose the arithmetic of the towers by measuring a step of theirs on the machine at hand."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.models.checkpoint import Towers
from clipkit.models.dual_encoder import DualEncoder, is_convolutional
from clipkit.models.inference_precision import Precision
from clipkit.models.tokenizer import CONTEXT, VOCAB

FASTER = 1.05
"""How many times as fast bf16 must be: below that it gains nothing and rounds for nothing."""
SECONDS = 2.0
"""After so long no larger step is measured."""
ROUNDS = 3
"""Steps of each precision that are timed, of which the fastest counts."""
MOST_PAIRS = {"cpu": 32, "cuda": 256}
"""Pairs of the largest step that is measured."""

Pairs = tuple[Tensor, Tensor]
"""Images, float32 [n, 3, height, width], and tokens, int64 [n, 77]."""


def resolve_precision(
    setting: Precision, towers: Towers, pairs: int, device: torch.device
) -> Precision:
    """``"fp32"`` or ``"bf16"`` as asked; for ``"auto"``, whichever takes a step faster.

    Forward and backward passes of the towers themselves are timed on a few random pairs, the two
    precisions in turn, and drawn on in a line to the run's own number: bf16 has a cost of its own,
    that of converting the weights, which many pairs share. Weights, gradients, running statistics
    and random state stay as they were; the towers are left on ``device``, convolutional ones
    channels-last.

    Args:
        setting: what the run asks for.
        towers: what it will train.
        pairs: how many it encodes at once.
        device: where.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp32"
    with _undisturbed(towers.clip, device):
        single, half = _step_seconds(towers, pairs, device)
    return "bf16" if single > FASTER * half else "fp32"


def _step_seconds(towers: Towers, pairs: int, device: torch.device) -> tuple[float, float]:
    """Time of a forward and backward pass of so many pairs in fp32 and in bf16, seconds."""
    layout = torch.channels_last if is_convolutional(towers.clip) else torch.contiguous_format
    networks: list[nn.Module] = [
        DualEncoder(towers.clip, precision).to(device).to(memory_format=layout).train()
        for precision in ("fp32", "bf16")
    ]
    most = min(pairs, MOST_PAIRS[device.type])
    sizes: list[int] = []
    times: list[list[float]] = []
    started, size = time.perf_counter(), 2
    while size not in sizes and (not sizes or time.perf_counter() - started < SECONDS):
        sizes.append(size)
        times.append(_in_turn(networks, _random_pairs(size, towers.image_size, device, layout)))
        size = min(4 * size, most)
    single, half = zip(*times, strict=True)
    return _drawn_on(sizes, single, pairs), _drawn_on(sizes, half, pairs)


def _drawn_on(sizes: Sequence[int], times: Sequence[float], pairs: int) -> float:
    """What so many pairs would take, by the line through the last two measured."""
    if len(sizes) == 1:
        return times[0]
    slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
    return times[-1] + max(slope, 0.0) * (pairs - sizes[-1])


def _in_turn(networks: list[nn.Module], pairs: Pairs) -> list[float]:
    """The least time of each over some rounds, in which they take turns, seconds."""
    times = [[_seconds(network, pairs) for network in networks] for _ in range(ROUNDS)]
    return [min(column) for column in zip(*times, strict=True)]


def _seconds(network: nn.Module, pairs: Pairs) -> float:
    images, tokens = pairs
    start = time.perf_counter()
    of_images, of_texts, _ = network(images, tokens)
    (of_images * of_texts).sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _random_pairs(
    n: int, size: tuple[int, int], device: torch.device, layout: torch.memory_format
) -> Pairs:
    """Noise, and captions of 8 to 23 tokens, which is how long captions of photos are."""
    images = torch.randn(n, 3, *size, device=device).to(memory_format=layout)
    tokens = torch.randint(1, VOCAB - 2, (n, CONTEXT))
    ends = 7 + torch.arange(n) % 16
    tokens[torch.arange(n), ends] = VOCAB - 1
    tokens[torch.arange(CONTEXT) > ends[:, None]] = 0
    return images, tokens.to(device)


@contextmanager
def _undisturbed(clip: Any, device: torch.device) -> Iterator[None]:
    """Put gradients, running statistics, modes and random state back as they were."""
    gradients = [(parameter, parameter.grad) for parameter in clip.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in clip.buffers()]
    modes = [(module, module.training) for module in clip.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode in modes:
            module.training = mode
