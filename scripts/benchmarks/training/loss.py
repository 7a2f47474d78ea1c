"""Time and memory of the loss: clipkit and open_clip's ClipLoss on the same vectors.

    python -m scripts.benchmarks.training.loss --pairs 8192 --dim 512 --rounds 5
    python -m scripts.benchmarks.training.loss --pairs 65536 --only clipkit --rounds 1

Uses a GPU if there is one. Memory is then the peak that torch has allocated.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.benchmarks.common.memory import peak_memory
from scripts.benchmarks.common.timing import alternate, ratios, spread

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses() -> dict[str, Loss]:
    """The two losses, by name."""
    from open_clip.loss import ClipLoss

    from clipkit.training.loss import info_nce

    return {"clipkit": info_nce, "open_clip": ClipLoss()}


def vectors(pairs: int, dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit vectors of images and captions, and a logit scale, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(pairs, dim, generator=generator).to(device), dim=1).requires_grad_()
        for _ in range(2)
    )
    return images, texts, torch.tensor(30.0, device=device, requires_grad=True)


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """One forward and backward pass."""
    for tensor in inputs:
        tensor.grad = None
    loss(*inputs).backward()


def _peak(name: str, pairs: int, dim: int, device: str, send: Any) -> None:
    loss = losses()[name]
    step(loss, vectors(64, dim, device))  # exclude what any first call allocates
    inputs = vectors(pairs, dim, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _peak_memory(device)
    step(loss, inputs)
    send.send(_peak_memory(device) - before)


def _peak_memory(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_memory()


def extra_memory(name: str, pairs: int, dim: int, device: str) -> float:
    """MiB of one pass beyond its inputs, gradients included, measured in a separate process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(name, pairs, dim, device, send))
    process.start()
    found: float = receive.recv()
    process.join()
    return found


def main() -> None:
    """Print a line for each loss, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["clipkit", "open_clip"])
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    options = parser.parse_args()
    names = [options.only] if options.only else ["clipkit", "open_clip"]
    inputs, by_name = vectors(options.pairs, options.dim, options.device), losses()
    runs = {name: partial(step, by_name[name], inputs) for name in names}
    warmup = int(options.rounds > 1)
    seconds = alternate(runs, options.rounds, options.device, warmup)
    del inputs, runs
    size = options.pairs, options.dim, options.device
    memory = {name: extra_memory(name, *size) for name in names}
    where = "a GPU" if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.pairs} pairs of {options.dim} dimensions, {where}")
    for name in names:
        took = spread(seconds[name], 3)
        print(f"{name:10} {took:>22} s  {memory[name]:7.0f} MiB beyond the inputs")
    if len(names) == 2:
        time_ratio = spread(ratios(seconds["clipkit"], seconds["open_clip"]))
        memory_ratio = memory["clipkit"] / memory["open_clip"]
        print(f"clipkit / open_clip: time {time_ratio}, memory {memory_ratio:.3f}")


if __name__ == "__main__":
    main()
