"""Pictures through an image tower in batches as large as its device takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from clipkit.data.preprocess import as_batch
from clipkit.data.resample import Pixels
from clipkit.errors import ModelError
from clipkit.progress import tell

if TYPE_CHECKING:
    from clipkit.model.encoder import Encoder, Vectors

BatchSize = int | Literal["auto"]

_ON_CPU = 64
_MOST = 1024  # beyond, a card of today is busy in any case, and more pictures would wait in memory
_TRIAL = 16  # pictures by which a card's need is measured
_SHARE = 0.7  # of the free memory, for the allocator loses some between its blocks


class Batcher:
    """Encodes pictures, in smaller batches from the time on that the device's memory is full.

    Attributes:
        size: pictures encoded at once.

    Args:
        encoder: the model.
        size: to begin with; ``"auto"`` is 64 on a CPU, and on a CUDA device the power of two up to
            1,024 for which its free memory suffices, by what a small batch needs.
    """

    def __init__(self, encoder: "Encoder", size: BatchSize) -> None:
        self.encoder = encoder
        self._cuda = encoder.device.type == "cuda"
        self.size = self._fitting() if size == "auto" else size

    def encode(self, pictures: Sequence[Pixels]) -> "Vectors":
        """Encode pictures.

        Args:
            pictures: uint8 [height, width, 3] each, as ``preprocess.pixels`` makes them.

        Returns:
            float32 [n, dim], rows of unit length.

        Raises:
            ModelError: the memory does not suffice for a single one.
        """
        vectors: list[Vectors] = []
        start = 0
        while start < len(pictures):
            part = pictures[start : start + self.size]
            try:
                vectors.append(self._encode(part))
            except torch.OutOfMemoryError as error:
                reason = error
            else:
                start += len(part)
                continue
            # Only now: within the handler, the failed batch is still held by the traceback.
            self._halve(len(part), reason)
        return np.concatenate(vectors)

    def _encode(self, pictures: Sequence[Pixels]) -> "Vectors":
        batch = as_batch(pictures, pinned=self._cuda)
        return self.encoder.encode_images(batch, batch_size=len(batch))

    def _halve(self, tried: int, reason: Exception) -> None:
        if tried == 1:
            found = str(reason).split("\n")[0][:150]
            raise ModelError(
                f"a single image does not fit into the memory of {self.encoder.device} ({found}); "
                "free some, or use another device"
            ) from None
        self.size = tried // 2
        if self._cuda:
            torch.cuda.empty_cache()
        tell(f"out of memory: going on with batches of {self.size} images")

    def _fitting(self) -> int:
        if not self._cuda:
            return _ON_CPU
        device = self.encoder.device
        blank = np.zeros((*self.encoder.preprocess.size, 3), np.uint8)
        self._encode([blank])  # what is set up once, at the first batch, is no picture's need
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._encode([blank] * _TRIAL)
        need = (torch.cuda.max_memory_allocated(device) - before) / _TRIAL
        return largest_batch(torch.cuda.mem_get_info(device)[0], need)


def largest_batch(free: int, need: float) -> int:
    """The power of two, 1 to 1,024, of pictures that need so many bytes each of the free ones."""
    fitting = int(min(_SHARE * free / max(need, 1.0), _MOST))
    return 1 << max(fitting, 1).bit_length() - 1
