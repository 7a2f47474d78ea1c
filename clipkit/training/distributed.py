"""The processes that train one model, and their collective operations."""

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

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""Timeout for a process that evaluates or saves. A dead process is noticed at once."""

ERROR_GRACE_SECONDS = 10.0
"""How long the others wait so that one process can report its error: torchrun kills all processes
as soon as the first exits."""


@dataclass(frozen=True)
class World:
    """The processes that train one model. All operations are local if there is only one.

    Attributes:
        device: device of this process.
        rank: number of this process.
        size: number of processes.
        leaving: cleanup before the process group is destroyed, unless an error ends it.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1
    leaving: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes files and reports progress."""
        return self.rank == 0

    def all_gather_object(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of ranks. Values must be JSON-serialisable."""
        if self.size == 1:
            return [value]
        # Not pickle, which can execute code on loading.
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        shares = self.shares(len(text))
        texts = torch.split(self.gather(text, shares), shares)
        return [json.loads(bytes(text.tolist())) for text in texts]

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in all processes; the others' values are ignored."""
        return self.all_gather_object(value if self.is_main_process else None)[0]

    def shares(self, count: int) -> list[int]:
        """How many items each process holds, this one ``count``."""
        if self.size == 1:
            return [count]
        counts = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([count]))  # on the CPU, to avoid waiting for a GPU
        return [int(one) for one in counts]

    def gather(self, part: Tensor, shares: list[int]) -> Tensor:
        """Concatenate everyone's rows: [n, …] to [N, …], without gradients."""
        if self.size == 1:
            return part
        padded = part.new_zeros((max(shares), *part.shape[1:]))
        padded[: len(part)] = part.detach()
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        return torch.cat([one[:count] for one, count in zip(parts, shares, strict=True)])

    def scatter_sum(self, whole: Tensor, shares: list[int]) -> Tensor:
        """Sum everyone's [N, …]; each process gets its own rows. The adjoint of ``gather``."""
        if self.size == 1:
            return whole
        padded = whole.new_zeros((self.size, max(shares), *whole.shape[1:]))
        for rank, rows in enumerate(torch.split(whole, shares)):
            padded[rank, : len(rows)] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter(own, list(padded))
        return own[: shares[self.rank]]

    def add(self, tensor: Tensor) -> Tensor:
        """Sum everyone's tensor, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_logsumexp(self, tensor: Tensor) -> Tensor:
        """Elementwise logsumexp over the processes."""
        if self.size == 1:
            return tensor
        highest = tensor.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return self.add((tensor - highest).exp_()).log_() + highest


ALONE = World()
"""A single process."""


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes that torchrun started, if any, until the block ends.

    They communicate through gloo on CPUs and NCCL on GPUs, with one GPU per process. Only the first
    error is reported, by the process that raises it; the others exit with ``SystemExit``.

    Raises:
        ConfigError: there are more processes than GPUs on this machine.
        TrainingError: the processes cannot connect to each other, or one of them has ended.
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
        dist.init_process_group(
            backend, timeout=COLLECTIVE_TIMEOUT, world_size=size, rank=rank, store=store
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the {size} processes of this run cannot connect ({_first_line(error)}); "
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
            time.sleep(ERROR_GRACE_SECONDS)
            raise SystemExit(1) from None
        if lost:
            raise TrainingError(
                f"another process of this run ended ({_first_line(error)}); resume from the last "
                "checkpoint with --resume and any number of processes"
            ) from None
        raise
    finally:
        dist.destroy_process_group()


def _own_gpu() -> torch.device:
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"this machine has {count} GPUs, but {number + 1} or more processes; start torchrun "
            f"with --nproc-per-node {count}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _is_lost(error: Exception) -> bool:
    """Whether an error means that another process cannot be reached."""
    # gloo raises plain RuntimeErrors that begin with a location in its source.
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed" in text)
    )


def _is_first_to_end(store: Any) -> bool:
    """Count this process as ended with an error; returns whether it is the first."""
    try:
        return bool(store.add("clipkit/ended", 1) == 1)
    except RuntimeError:  # the process that hosts the store is gone
        return True


def _first_line(error: Exception) -> str:
    """The first sentence of an error, without the location in the source."""
    line = str(error).partition("\n")[0].rpartition("] ")[2] if str(error).startswith("[/") else ""
    return (line or str(error).partition("\n")[0]).partition(". ")[0]
