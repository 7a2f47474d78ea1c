"""Pairs put together into a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.data.images import Skipped
from clipkit.data.preprocess import as_batch


@dataclass(frozen=True)
class PairBatch:
    """What the training loop eats.

    Attributes:
        images: uint8 [n, 3, height, width]; or stored features of them, float32 [n, …].
        tokens: int64 [n, 77].
        keys: of the images.
        weights: of the pairs in the loss, float32 [n]; None where all weigh the same.
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Pair:
    """One of them: a picture, uint8 [height, width, 3], or its features, and one caption."""

    key: str
    image: NDArray[Any]
    caption: str
    weight: float


@dataclass(frozen=True)
class Gathered:
    """Rows of a batch whose captions are still to be read.

    Attributes:
        images: as of ``PairBatch``.
        captions, keys, weights: of the same pairs.
        bad: rows that are missing.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    weights: list[float]
    bad: list[Skipped]

    @classmethod
    def of(
        cls, rows: Sequence[Pair | Skipped], nothing: NDArray[Any], *, pinned: bool
    ) -> "Gathered":
        """Put rows together.

        Args:
            rows: of a batch.
            nothing: what has the form of an image, for a batch without any.
            pinned: pictures into memory that a CUDA device can fetch by itself.
        """
        pairs = [row for row in rows if isinstance(row, Pair)]
        arrays = [pair.image for pair in pairs] or [nothing]
        if nothing.dtype == np.uint8:
            images = as_batch(arrays, pinned=pinned)
        else:
            images = torch.from_numpy(np.stack(arrays))
        return cls(
            images[: len(pairs)],
            [pair.caption for pair in pairs],
            [pair.key for pair in pairs],
            [pair.weight for pair in pairs],
            [row for row in rows if isinstance(row, Skipped)],
        )

    def read(
        self, tokenize: Callable[[Sequence[str]], NDArray[np.int64]], *, weighted: bool
    ) -> PairBatch:
        """The batch, with weights if they are to count."""
        tokens = torch.from_numpy(tokenize(self.captions))
        weights = torch.tensor(self.weights) if weighted else None
        return PairBatch(self.images, tokens, self.keys, weights)
