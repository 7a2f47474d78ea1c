"""Time and memory of the loss against open_clip's ClipLoss, in turn, on the same vectors.

python scripts/bench_loss.py --pairs 8192 --dim 512 --rounds 5
python scripts/bench_loss.py --pairs 65536 --only clipkit --rounds 1

On a GPU, which is taken if there is one, memory is what torch has allocated at most.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import wait_for
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses() -> dict[str, Loss]:
    """The two losses, by name."""
    from open_clip.loss import ClipLoss

    from clipkit.training.loss import info_nce

    return {"clipkit": info_nce, "open_clip": ClipLoss()}


def vectors(pairs: int, dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit vectors of images and captions, and a scale, all wanting gradients."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(pairs, dim, generator=generator).to(device), dim=1).requires_grad_()
        for _ in range(2)
    )
    return images, texts, torch.tensor(30.0, device=device, requires_grad=True)


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    for tensor in inputs:
        tensor.grad = None
    wait_for(inputs[0].device.type)
    start = time.perf_counter()
    loss(*inputs).backward()
    wait_for(inputs[0].device.type)
    return time.perf_counter() - start


def _peak(name: str, pairs: int, dim: int, device: str, send: Any) -> None:
    chosen = losses()[name]
    step(chosen, vectors(64, dim, device))  # what any first call allocates is not the loss's
    inputs = vectors(pairs, dim, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _peak_memory(device)
    step(chosen, inputs)
    send.send(_peak_memory(device) - before)


def _peak_memory(device: str) -> float:
    """MiB this process held at most (Linux; ru_maxrss would count its parent's peak too)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def extra_memory(name: str, pairs: int, dim: int, device: str) -> float:
    """MiB that one pass takes beyond its inputs, in a process of its own; gradients included."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(name, pairs, dim, device, send))
    process.start()
    found: float = receive.recv()
    process.join()
    return found


def main() -> None:
    """Run and print a line per loss, and the ratios."""
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
    inputs, chosen = vectors(options.pairs, options.dim, options.device), losses()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    if options.rounds > 1:
        for name in names:
            step(chosen[name], inputs)
    for _ in range(options.rounds):
        for name in names:
            seconds[name].append(step(chosen[name], inputs))
    del inputs
    size = options.pairs, options.dim, options.device
    memory = {name: extra_memory(name, *size) for name in names}
    where = "a GPU" if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.pairs} pairs of {options.dim} dimensions, {where}")
    for name in names:
        times = seconds[name]
        print(
            f"{name:10} {statistics.median(times):7.3f} s "
            f"({min(times):.3f}–{max(times):.3f})  {memory[name]:7.0f} MiB beyond the inputs"
        )
    if len(names) == 2:
        ratios = [a / b for a, b in zip(seconds["clipkit"], seconds["open_clip"], strict=True)]
        print(
            f"ratio      time {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}), memory "
            f"{memory['clipkit'] / memory['open_clip']:.3f}"
        )


if __name__ == "__main__":
    main()
