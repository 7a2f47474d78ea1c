"""FLOPs of the towers, and the peak rate of matrix products they are compared with."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.common.timing import alternate

SIZES = {
    "cpu": ((3200, 768, 3072), (3200, 3072, 768), (2048, 2048, 2048)),
    "cuda": ((8192, 8192, 8192), (16384, 4096, 4096), (65536, 768, 3072)),
}
"""Rows, inputs and outputs of the timed products: shapes from a ViT-B, and large ones."""


@torch.inference_mode()
def matrix_peaks(rounds: int, device: str = "cpu") -> dict[str, float]:
    """FLOP/s of the fastest matrix product for each precision. fp32 excludes TF32.

    The inputs are random: on a GPU, products of ones run faster than any real training step.
    """
    peaks = {"fp32": 0.0, "bf16": 0.0}
    for rows, width, out in SIZES[device]:
        runs = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, out))
            runs[name] = lambda x=x, weight=weight: F.linear(x, weight)
        for name, seconds in alternate(runs, 3 * rounds, device).items():
            peaks[name] = max(peaks[name], 2 * rows * width * out / min(seconds))
    if device == "cuda":
        torch.cuda.empty_cache()  # leave the memory to the processes that run next
    ratio = peaks["bf16"] / peaks["fp32"]
    print(
        f"fastest matrix products: {peaks['fp32'] / 1e12:.2f} TFLOP/s in fp32, "
        f"{peaks['bf16'] / 1e12:.2f} TFLOP/s in bf16 (ratio {ratio:.2f})"
    )
    return peaks


def share_of_peak(rate: float, peaks: Mapping[str, float], precision: str) -> str:
    """A rate in FLOP/s as a percentage of the peak."""
    return f"{rate / peaks[precision]:.0%} of the peak in {precision}"


def image_flops(clip: Any) -> int:
    """FLOPs of one image in the forward pass of open_clip's image tower; a multiply-add is 2."""
    size = clip.visual.image_size  # a single number for a ResNet
    height, width = (size, size) if isinstance(size, int) else size
    return counted_flops(lambda: clip.encode_image(torch.zeros(1, 3, height, width)))


def counted_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and convolutions in a run with gradients, attention included."""
    # torch's FLOP counter knows the attention kernels of a GPU and plain products, nothing else.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def text_flops(clip: Any, length: int) -> int:
    """FLOPs of one caption of ``length`` tokens in the forward pass of the text tower, no padding.

    Every weight matrix of a block applies to every token, attention relates all pairs of tokens,
    and the projection applies to the end token only.
    """
    text = getattr(clip, "text", clip)
    blocks, projection = text.transformer.resblocks, text.text_projection
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    width = text.positional_embedding.shape[1]
    projected = projection.weight if isinstance(projection, torch.nn.Linear) else projection
    attention = 4 * len(blocks) * width * length**2
    return int(2 * weights * length + attention + 2 * projected.numel())


def training_flops(clip: Any, lengths: Sequence[int]) -> float:
    """Useful FLOPs of one pair in a training step, the same for every implementation.

    Both towers forward, and twice that backward, for the mean over captions of these lengths.
    Extra work such as padding or GradCache's second forward pass does not count, and skipping
    unneeded work does not lower the figure.
    """
    texts = statistics.mean(text_flops(clip, length) for length in lengths)
    return 3 * (image_flops(clip) + texts)
