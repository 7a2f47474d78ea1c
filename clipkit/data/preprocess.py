"""From a picture to what an image tower takes: open_clip's own transform, and a faster one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.images import Decode, Reduction, largest_reduction
from clipkit.data.resample import Pixels, resize

SPARE = 2
"""How many times as large as needed a picture is read at least.

Read as small as needed, photos of 2 megapixels came to vectors of cosine 0.996 with the exact ones,
and of 12 to 0.998; read twice as large, to 0.9995, in 7.9 ms where they took 6.5, and in 32 where
they took 27. Exactly they take 23 ms and 115.
"""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocess:
    """What an image tower wants of a picture, in the terms of open_clip's ``preprocess_cfg``.

    Attributes:
        size: height and width, in pixels.
        mean: of the channels red, green and blue, where white is 1.
        std: their standard deviation.
        interpolation: ``"bilinear"``, or bicubic for anything else.
        resize_mode: ``"shortest"`` side to the size and the middle cut out, ``"longest"`` and the
            rest filled, or ``"squash"`` both.
        fill_color: of what is filled, 0 to 255.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """As a ``preprocess_cfg`` says, whose numbers may stand for two sides or three channels."""
        height, width = np.broadcast_to(config["size"], 2).tolist()
        mean, std = (tuple(np.broadcast_to(config[name], 3).tolist()) for name in ("mean", "std"))
        rest = {name: config[name] for name in ("interpolation", "resize_mode", "fill_color")}
        return cls((height, width), mean, std, **rest)

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture to float32 [3, height, width], equal to what open_clip's transform makes."""
        return self.normalise(as_batch([self.pixels(image)]))[0].contiguous()

    def reduction(self, decode: Decode) -> Reduction | None:
        """How much smaller a picture may be read; None: not at all.

        Args:
            decode: "fast" reads pictures at the smallest size that leaves ``SPARE`` for resizing.
        """
        if decode == "exact":
            return None

        def factor(width: int, height: int) -> int:
            new_height, new_width = self._resized(width, height)
            return largest_reduction(min(width / new_width, height / new_height) / SPARE)

        return factor

    def pixels(self, image: Image.Image, decode: Decode = "exact") -> Pixels:
        """A picture resized and cropped or filled up, uint8 [height, width, 3].

        Args:
            image: of any mode; "fast" was made for what ``read_image`` returns.
            decode: "exact" resizes with Pillow, as open_clip does; "fast" with the kernel of
                ``resample``, which takes a fraction of the time and differs by rounding.
        """
        size = self._resized(*image.size)
        if decode == "exact":
            # An alpha channel weighs the colours, so it is dropped after resizing only.
            resized = _pixels(image.resize(size[::-1], _FILTERS[self._filter]))
        else:
            resized = _pixels(image)
            if resized.shape[:2] != size:
                resized = resize(resized, size, self._filter)
        return _cropped(_filled(resized, self.size, self.fill_color), self.size)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 [..., 3, height, width], to float32 in units of the model's deviation.

        The steps are those of open_clip in its order: on a CPU not a bit differs.
        """
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return pixels.float().div_(255).sub_(mean).div_(std)

    @property
    def _filter(self) -> str:
        # open_clip hands its filter to the resizing of squares and of whole pictures alone.
        if self.resize_mode == "shortest" and self.size[0] != self.size[1]:
            return "bicubic"
        return "bilinear" if self.interpolation == "bilinear" else "bicubic"

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of a picture before it is cropped or filled."""
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            short = self.size[0]  # here torchvision cuts fractions off, below open_clip rounds
            long = int(short * max(width, height) / min(width, height))
            return (short, long) if height <= width else (long, short)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        # At least 1, where open_clip refuses a picture that is very long.
        return max(1, round(height / ratio)), max(1, round(width / ratio))


def as_batch(pixels: Sequence[Pixels], *, pinned: bool = False) -> Tensor:
    """Pictures of one size, uint8 [height, width, 3], as one batch, uint8 [n, 3, height, width].

    Args:
        pixels: at least one.
        pinned: in memory that a CUDA device can fetch by itself.
    """
    shape = (len(pixels), *pixels[0].shape)
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    np.stack(pixels, out=batch.numpy())
    # A view: channels stay last in memory, as convolutions like them.
    return batch.permute(0, 3, 1, 2)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _filled(pixels: Pixels, size: tuple[int, int], colour: int) -> Pixels:
    """In the middle of a larger picture, where a side is shorter than ``size``."""
    height, width = pixels.shape[:2]
    down, right = max(0, size[0] - height), max(0, size[1] - width)
    if not down and not right:
        return pixels
    filled = np.full((height + down, width + right, 3), colour, np.uint8)
    upper, left = down // 2, right // 2
    filled[upper : upper + height, left : left + width] = pixels
    return filled


def _cropped(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle of a picture; of an odd rest half a pixel is rounded to even."""
    upper, left = (round((have - want) / 2) for have, want in zip(pixels.shape, size, strict=False))
    return pixels[upper : upper + size[0], left : left + size[1]]
