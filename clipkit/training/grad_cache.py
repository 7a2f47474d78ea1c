"""Batches larger than memory: the exact gradient of a batch that is encoded in chunks.

GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", section 3): encode every chunk without a graph, take the loss and its gradient with respect
to the vectors, then encode each chunk again and hand its vectors' gradient back through it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.sync_batchnorm import count_rows

Chunk = tuple[Tensor, Tensor]
"""Images, uint8 [m, 3, height, width], and tokens, int64 [m, 77]."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Image vectors and caption vectors, float [n, dim] each, and the scale, float [], to the loss."""


def backward(
    network: DualEncoder,
    chunks: Sequence[Chunk],
    prepare: Callable[[Tensor], Tensor],
    loss_of: Loss,
    seed: int,
    counted: int | None = None,
) -> Tensor:
    """Loss of a whole batch, its gradient added to the parameters' own.

    With one chunk this is a plain forward and backward pass; with several, memory is that of one
    chunk, at the price of a second forward pass. Batch normalisation sees a chunk at a time.

    Args:
        network: the towers.
        chunks: the batch in parts.
        prepare: images to what the image tower expects; called chunk by chunk.
        loss_of: image vectors, caption vectors and scale to the loss, such as ``info_nce``.
        seed: chunk number c draws its dropout from ``seed + c``, the same in both passes.
        counted: how many of the rows of all chunks are pairs, the rest being blank; None: all.

    Returns:
        the loss, float32 [], without a graph.
    """

    def encode(number: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed + number)
        images, tokens = chunks[number]
        if counted is not None:
            count_rows(network, max(0, counted - number * len(chunks[0][1])))
        encoded: tuple[Tensor, Tensor, Tensor] = network(prepare(images), tokens)
        return encoded

    if len(chunks) == 1:
        images, texts, scale = encode(0)
        loss = loss_of(images, texts, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with torch.no_grad(), _statistics_at_rest(network):
        parts = [encode(number)[:2] for number in range(len(chunks))]
    images, texts = (torch.cat(part).requires_grad_() for part in zip(*parts, strict=True))
    loss = loss_of(images, texts, network.scale)
    loss.backward()  # type: ignore[no-untyped-call]
    sizes = [len(part) for part, _ in parts]
    wanted_of = [torch.split(cast(Tensor, vectors.grad), sizes) for vectors in (images, texts)]
    for number, wanted in enumerate(zip(*wanted_of, strict=True)):
        pairs = zip(encode(number)[:2], wanted, strict=True)
        # The vectors of a locked tower take no gradient.
        trained = [(vectors, gradient) for vectors, gradient in pairs if vectors.requires_grad]
        torch.autograd.backward([v for v, _ in trained], [gradient for _, gradient in trained])
    return loss.detach()


@contextmanager
def _statistics_at_rest(network: nn.Module) -> Iterator[None]:
    """Keep running statistics still in the first of two passes, or each chunk would count twice."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # The count by its tensor: batch normalisation across GPUs cannot do without it.
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [norm.momentum for norm in norms], [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before[0], strict=True):
            norm.momentum = momentum
        for count, counted in zip(counts, before[1], strict=True):
            count.copy_(counted)
