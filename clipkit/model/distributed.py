"""Many processes on one run: who they are, and what they tell each other."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train one model together; alone, nothing is exchanged.

    Attributes:
        device: where this process computes.
        rank: its number.
        size: how many there are.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def shares(self, count: int) -> list[int]:
        """How many items each process holds, this one ``count``."""
        if self.size == 1:
            return [count]
        counts = torch.empty(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(counts, torch.tensor([count]))
        return counts.tolist()

    def gather(self, part: Tensor, shares: list[int]) -> Tensor:
        """Everyone's rows one after the other: [n, …] to [N, …], without a graph."""
        if self.size == 1:
            return part
        most = max(shares)
        padded = part.new_zeros((most, *part.shape[1:]))
        padded[: len(part)] = part.detach()
        all_padded = part.new_empty((self.size * most, *part.shape[1:]))
        dist.all_gather_into_tensor(all_padded, padded)
        parts = torch.split(all_padded, most)
        return torch.cat([one[:count] for one, count in zip(parts, shares, strict=True)])

    def scatter_sum(self, whole: Tensor, shares: list[int]) -> Tensor:
        """Everyone's [N, …] summed, of which each process gets its own rows: the way back."""
        if self.size == 1:
            return whole
        most = max(shares)
        padded = whole.new_zeros((self.size, most, *whole.shape[1:]))
        for rank, rows in enumerate(torch.split(whole, shares)):
            padded[rank, : len(rows)] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
        return own[: shares[self.rank]]

    def add(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor summed, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def log_add(self, tensor: Tensor) -> Tensor:
        """The logarithm of everyone's exponentials summed, entry by entry."""
        if self.size == 1:
            return tensor
        highest = tensor.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return self.add((tensor - highest).exp_()).log_() + highest


ALONE = World()
"""A process that shares its run with no other."""
