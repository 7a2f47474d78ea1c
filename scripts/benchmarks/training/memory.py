"""Peak memory of one training step as the batch grows, with and without the gradient cache.

python -m scripts.benchmarks.training.memory --chunk 32 --batches 64 128 256 512 1024
python -m scripts.benchmarks.training.memory --model ViT-S-32 --chunk 32 --batches 64 256 1024
"""

import argparse
import multiprocessing
from typing import Any

from scripts.benchmarks.common.memory import peak_memory, reset_peak_memory, resident_memory

SMALL = {
    "embed_dim": 256,
    "vision": {"image_size": 112, "layers": 6, "width": 192, "patch_size": 16},
    "text": {"width": 192, "heads": 3, "layers": 6},
}
"""Small towers by default: 6 blocks of width 192 each, images of 112 pixels."""


def _peak(model: str, batch: int, chunk: int, send: Any) -> None:
    """Send the MiB of one step beyond network and optimiser, and those of its batch."""
    from clipkit.config import parse_config
    from clipkit.training.build import build_towers
    from clipkit.training.distributed import World
    from clipkit.training.step import Trainer

    content = {"name": model} if model else SMALL
    train = {"batch_size": batch, "micro_batch_size": chunk, "precision": "fp32"}
    config = parse_config({"model": content, "train": train})
    towers = build_towers(config.model, config.optim.temperature, config.train.seed)
    trainer = Trainer(towers, config, World())
    # Exclude what the first step allocates for good, such as the moments of the optimiser.
    trainer.take_step(_pairs(2, towers.image_size), 0, 0.5)
    pairs = _pairs(batch, towers.image_size)
    before = resident_memory()
    reset_peak_memory()
    trainer.take_step(pairs, 1, 0.5)
    send.send((peak_memory() - before, (pairs.images.nbytes + pairs.tokens.nbytes) / 2**20))


def _pairs(n: int, size: tuple[int, int]) -> Any:
    """Random images, and captions of 8 to 23 tokens."""
    import torch

    from clipkit.data.loader import PairBatch

    images = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
    tokens = torch.randint(1, 40_000, (n, 77))
    ends = 7 + torch.arange(n) % 16
    tokens[torch.arange(n), ends] = 49_407
    tokens[torch.arange(77) > ends[:, None]] = 0
    return PairBatch(images, tokens, [str(number) for number in range(n)])


def peak(model: str, batch: int, chunk: int) -> tuple[float, float]:
    """MiB of one step and of its batch, measured in a separate process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(model, batch, chunk, send))
    process.start()
    send.close()  # if the process dies, recv() fails instead of waiting for ever
    found: tuple[float, float] = receive.recv()
    process.join()
    return found


def main() -> None:
    """Print a line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="open_clip model; default: small towers")
    parser.add_argument("--chunk", type=int, default=32, help="pairs encoded at once")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument(
        "--most-whole", type=int, default=256, help="largest batch without gradient cache"
    )
    options = parser.parse_args()
    print("MiB in addition to network, gradients, optimiser and the batch itself")
    print(f"{'batch':>6} {'its images':>13} {'whole':>8} {f'chunks of {options.chunk}':>14}")
    for batch in options.batches:
        chunked, images = peak(options.model, batch, options.chunk)
        whole = "–"
        if batch <= options.most_whole:
            whole = f"{peak(options.model, batch, 0)[0]:.0f}"
        print(f"{batch:6} {images:13.0f} {whole:>8} {chunked:14.0f}", flush=True)


if __name__ == "__main__":
    main()
