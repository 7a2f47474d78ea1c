"""What several benchmarks share: runs in turn, commands, FLOPs of the towers, peaks of products."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Times = dict[str, list[float]]
SIZES = {
    "cpu": ((3200, 768, 3072), (3200, 3072, 768), (2048, 2048, 2048)),
    "cuda": ((8192, 8192, 8192), (16384, 4096, 4096), (65536, 768, 3072)),
}
"""Rows, inputs and outputs of the products that are timed: those in a ViT-B, and large ones."""


def run_command(command: Sequence[str], extra: Mapping[str, str] | None = None) -> tuple[str, str]:
    """What a command printed, and that with what it said on stderr; one that fails ends this run.

    Args:
        command: its words.
        extra: environment variables beside this process's own.
    """
    environment = {**os.environ, **(extra or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout, done.stdout + done.stderr


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> Times:
    """Seconds of each run, round by round, after one that does not count."""
    times: Times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def wait_for(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


@torch.inference_mode()
def matrix_peaks(rounds: int, device: str = "cpu") -> dict[str, float]:
    """FLOP a second of the fastest of some products, by precision; fp32 is without TF32.

    Of random numbers: on a GPU those of ones run faster than any training does.
    """
    peaks = {"fp32": 0.0, "bf16": 0.0}
    for rows, width, out in SIZES[device]:
        runs = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, out))
            runs[name] = lambda x=x, weight=weight: F.linear(x, weight)
        for name, seconds in in_turn(runs, 3 * rounds, device).items():
            peaks[name] = max(peaks[name], 2 * rows * width * out / min(seconds))
    if device == "cuda":
        torch.cuda.empty_cache()  # for the runs that follow in processes of their own
    ratio = peaks["bf16"] / peaks["fp32"]
    print(
        f"fastest matrix products: {peaks['fp32'] / 1e12:.2f} TFLOP/s in fp32, "
        f"{peaks['bf16'] / 1e12:.2f} in bf16, {ratio:.2f} times as many"
    )
    return peaks


def share_of_peak(rate: float, peaks: Mapping[str, float], precision: str) -> str:
    """A rate in FLOP a second beside the peak."""
    return f"{rate / peaks[precision]:.0%} of the peak in {precision}"


def image_flops(clip: Any) -> int:
    """Of one picture through an image tower of open_clip, forward: 2 for a product and its sum."""
    size = clip.visual.image_size  # of a ResNet a single number
    height, width = (size, size) if isinstance(size, int) else size
    return counted_flops(lambda: clip.encode_image(torch.zeros(1, 3, height, width)))


def counted_flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in a run with gradients, attention's among them."""
    # Of torch's kernels for attention it counts those of a GPU alone, and plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def text_flops(clip: Any, length: int) -> int:
    """Of one caption of so many tokens through CLIP's text tower without padding, likewise.

    Every matrix of a block meets every token, in attention every token every other; the
    projection meets the end token alone.
    """
    text = getattr(clip, "text", clip)
    blocks, projection = text.transformer.resblocks, text.text_projection
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    width = text.positional_embedding.shape[1]
    projected = projection.weight if isinstance(projection, torch.nn.Linear) else projection
    attention = 4 * len(blocks) * width * length**2
    return int(2 * weights * length + attention + 2 * projected.numel())


def training_flops(clip: Any, lengths: Sequence[int]) -> float:
    """Of one pair in a training step: what is useful, so the same whoever does it.

    Both towers forward, and twice that backward, with captions of these lengths in the mean.
    Padding, what GradCache encodes again and other such work do not count, and who skips what
    others compute is not charged for it.
    """
    texts = statistics.mean(text_flops(clip, length) for length in lengths)
    return 3 * (image_flops(clip) + texts)
