"""Blank pairs, for a process whose share of a batch is smaller than that of others."""

import torch
from torch import Tensor

from clipkit.config import LoopConfig
from clipkit.data.collate import PairBatch
from clipkit.model.distributed import World
from clipkit.model.tokenizer import tokenize


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
    chunk = config.chunk_size or share
    full_chunks = -(-share // chunk) - 1
    missing = full_chunks * chunk + 1 - len(tokens)
    if world.size == 1 or missing <= 0:
        return images, tokens
    # Pictures of no pair have no size; what else stands for images has the right form.
    shape = (3, *image_size) if images.ndim == 4 and not len(images) else images.shape[1:]
    blank = torch.from_numpy(tokenize([""] * missing))
    images = torch.cat([images.reshape(-1, *shape), images.new_zeros((missing, *shape))])
    return images, torch.cat([tokens, blank])
