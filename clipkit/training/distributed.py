"""Many processes on one run: who they are, and what they tell each other."""

import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from clipkit.errors import ClipkitError, ConfigError, TrainingError

PATIENCE = timedelta(hours=6)
"""How long a process waits for one that is measuring or saving. A dead one is noticed at once."""

TIME_TO_TELL = 10.0
"""Seconds that others leave the process with the error: torchrun ends all when the first leaves."""


@dataclass(frozen=True)
class World:
    """The processes that train one model together; alone, nothing is exchanged.

    Attributes:
        device: where this process computes.
        rank: its number.
        size: how many there are.
        leaving: what is to be done before they part, unless an error parts them.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1
    leaving: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and is_main_process."""
        return self.rank == 0

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each process has to tell, in the order of ranks: values that JSON can hold."""
        if self.size == 1:
            return [value]
        # JSON and not pickle, which would run what another process sends.
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        shares = self.shares(len(text))
        texts = torch.split(self.gather(text, shares), shares)
        return [json.loads(bytes(text.tolist())) for text in texts]

    def broadcast(self, value: Any) -> Any:
        """What the first process has to tell, for all; what the others hand in does not count."""
        return self.all_gather_object(value if self.is_main_process else None)[0]

    def shares(self, count: int) -> list[int]:
        """How many items each process holds, this one ``count``."""
        if self.size == 1:
            return [count]
        counts = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([count]))  # on the CPU, so that no GPU is waited for
        return [int(one) for one in counts]

    def gather(self, part: Tensor, shares: list[int]) -> Tensor:
        """Everyone's rows one after the other: [n, …] to [N, …], without a graph."""
        if self.size == 1:
            return part
        padded = part.new_zeros((max(shares), *part.shape[1:]))
        padded[: len(part)] = part.detach()
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        return torch.cat([one[:count] for one, count in zip(parts, shares, strict=True)])

    def scatter_sum(self, whole: Tensor, shares: list[int]) -> Tensor:
        """Everyone's [N, …] summed, of which each process gets its own rows: the way back."""
        if self.size == 1:
            return whole
        padded = whole.new_zeros((self.size, max(shares), *whole.shape[1:]))
        for rank, rows in enumerate(torch.split(whole, shares)):
            padded[rank, : len(rows)] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter(own, list(padded))
        return own[: shares[self.rank]]

    def add(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor summed, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_logsumexp(self, tensor: Tensor) -> Tensor:
        """The logarithm of everyone's exponentials summed, entry by entry."""
        if self.size == 1:
            return tensor
        highest = tensor.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return self.add((tensor - highest).exp_()).log_() + highest


ALONE = World()
"""A process that shares its run with no other."""


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes that torchrun has started, or stay alone, until the block ends.

    They talk through gloo on CPUs and NCCL on GPUs, one GPU to a process. Of errors only the first
    is told, by the process that meets it: the others leave with ``SystemExit``.

    Raises:
        ConfigError: there are more processes than GPUs on this machine.
        TrainingError: the processes cannot find each other, or one of them has ended.
    """
    cuda = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_available():
        yield World(torch.device("cuda" if cuda else "cpu"))
        return
    device = _own_gpu() if cuda else torch.device("cpu")
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, world_size=size, rank=rank, store=store)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the {size} processes of this run cannot find each other ({_first_line(error)}); "
            "start them with torchrun"
        ) from None
    world = World(device, rank, size)
    try:
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore")
            yield world
        world.leaving.close()
    except Exception as error:
        lost = _is_lost(error)
        if not _is_first_to_end(store) and (lost or isinstance(error, ClipkitError)):
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(TIME_TO_TELL)
            raise SystemExit(1) from None
        if lost:
            raise TrainingError(
                f"another process of this run ended ({_first_line(error)}); go on from the last "
                "checkpoint with --resume, with any number of processes"
            ) from None
        raise
    finally:
        dist.destroy_process_group()


def _own_gpu() -> torch.device:
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"this machine has {count} GPUs, but process {number + 1} was started on it; start "
            f"torchrun with --nproc-per-node {count}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _is_lost(error: Exception) -> bool:
    """Whether an error says that another process cannot be reached."""
    # gloo raises plain RuntimeErrors, which begin with the place in its source.
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed" in text)
    )


def _is_first_to_end(store: Any) -> bool:
    """Count this process among those that ended with an error; whether none did before."""
    try:
        return bool(store.add("clipkit/ended", 1) == 1)
    except RuntimeError:  # whoever kept the store is gone
        return True


def _first_line(error: Exception) -> str:
    """What an error says, without the place in the source and without advice."""
    line = str(error).partition("\n")[0].rpartition("] ")[2] if str(error).startswith("[/") else ""
    return (line or str(error).partition("\n")[0]).partition(". ")[0]
