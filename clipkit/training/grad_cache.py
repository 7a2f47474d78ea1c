"""GradCache: the exact gradient of a batch that does not fit in memory.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
section 3. The micro-batches are encoded without a graph. The loss of the whole batch gives the
gradient of each vector. Then each micro-batch is encoded again, and the gradients of its vectors
are backpropagated through the towers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.sync_batchnorm import count_rows

MicroBatch = tuple[Tensor, Tensor]
"""Images, uint8 [m, 3, height, width], and tokens, int64 [m, 77]."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps image and caption vectors, float [n, dim] each, and the scale, float [], to the loss."""


def backward(
    network: DualEncoder,
    micro_batches: Sequence[MicroBatch],
    prepare: Callable[[Tensor], Tensor],
    loss_of: Loss,
    seed: int,
    pairs: int | None = None,
) -> Tensor:
    """Compute the loss of a batch and add its gradient to that of the parameters.

    A single micro-batch takes a plain forward and backward pass. Several need the memory of one and
    a second forward pass. Batch normalisation sees one micro-batch at a time.

    Args:
        network: the towers.
        micro_batches: the parts of the batch.
        prepare: converts the images of a micro-batch to inputs of the image tower.
        loss_of: the loss, for example ``info_nce``.
        seed: micro-batch i draws its dropout from ``seed + i``, the same in both passes.
        pairs: number of pairs in the batch; the rows after them are padding. None: no padding.

    Returns:
        the loss, float32 [], without a graph.
    """

    def encode(number: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed + number)
        images, tokens = micro_batches[number]
        if pairs is not None:
            count_rows(network, max(0, pairs - number * len(micro_batches[0][1])))
        encoded: tuple[Tensor, Tensor, Tensor] = network(prepare(images), tokens)
        return encoded

    if len(micro_batches) == 1:
        images, texts, scale = encode(0)
        loss = loss_of(images, texts, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with torch.no_grad(), _frozen_statistics(network):
        parts = [encode(number)[:2] for number in range(len(micro_batches))]
    images, texts = (torch.cat(part).requires_grad_() for part in zip(*parts, strict=True))
    loss = loss_of(images, texts, network.scale)
    loss.backward()  # type: ignore[no-untyped-call]
    sizes = [len(part) for part, _ in parts]
    cached = [torch.split(cast(Tensor, vectors.grad), sizes) for vectors in (images, texts)]
    for number, gradients in enumerate(zip(*cached, strict=True)):
        towers = zip(encode(number)[:2], gradients, strict=True)
        # The vectors of a locked tower do not require gradients.
        trained = [(vectors, gradient) for vectors, gradient in towers if vectors.requires_grad]
        torch.autograd.backward([v for v, _ in trained], [gradient for _, gradient in trained])
    return loss.detach()


@contextmanager
def _frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Freeze running statistics in the first pass, or each micro-batch would count twice."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # Restored in place: SyncBatchNorm needs num_batches_tracked, so it cannot be None meanwhile.
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    momenta, saved_counts = [norm.momentum for norm in norms], [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, saved in zip(counts, saved_counts, strict=True):
            count.copy_(saved)
