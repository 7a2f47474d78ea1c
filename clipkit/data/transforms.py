"""Part of a picture, turned and resized: exactly with Pillow, and faster.

From a picture to what an image tower takes: open_clip's own transform, and a faster one.

Random changes to training images, each drawn from the generator it is handed.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipkit.config import AugmentConfig
from clipkit.data.images import Decode, Reduction, largest_reduction

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels."""

# How much larger than the result a picture is before it is turned. Of 1 to 2, this came nearest to
# `resample_exactly` on 40 photos of 224 pixels: 2.6 of 255 levels off at 32 pixels, 1.9 at 64 and
# 1.7 at 112, where 1 is off by 3.8, 2.8 and 1.9.
_SPARE = 1.25


def resample_exactly(picture: Pixels, degrees: float, box: Box, size: tuple[int, int]) -> Pixels:
    """Turn a picture, then crop it between pixels and resize it in one step, with Pillow.

    Args:
        picture: uint8 [h, w, 3].
        degrees: to turn it by about its centre, against the clock; the corners take the colour of
            its first pixel.
        box: the part of it, once turned.
        size: height and width of the result.

    Returns:
        uint8 [height, width, 3].
    """
    image = Image.fromarray(picture)
    if degrees:
        fill = image.getpixel((0, 0))
        image = image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)
    # One step reads each source pixel once.
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box))


def resample(picture: Pixels, degrees: float, box: Box, size: tuple[int, int]) -> Pixels:
    """The same with edges at whole pixels, in a fraction of the time.

    Args and result are those of ``resample_exactly``. Upright pictures go through torch's kernel
    for bytes, which uses the vector units that Pillow's does not: given the same edges, photos
    differ by 0.02 to 0.07 of 255 levels on average. Others are turned, cropped and resized in one
    bilinear pass, which differs by 1.4 to 2.6; a shift of 1/4 pixel makes 1.7 to 3.9.
    """
    if degrees:
        return _turned(picture, degrees, box, size)
    left, upper = int(box[0] + 0.5), int(box[1] + 0.5)
    right, lower = max(int(box[2] + 0.5), left + 1), max(int(box[3] + 0.5), upper + 1)
    return resize(picture[upper:lower, left:right], size)


def resize(picture: Pixels, size: tuple[int, int], interpolation: str = "bicubic") -> Pixels:
    """A whole picture, uint8 [h, w, 3], in another size by torch's kernel for bytes.

    Args:
        picture: what is resized.
        size: height and width of the result.
        interpolation: ``"bicubic"`` or ``"bilinear"``; both reach as far as the step is wide.
    """
    # Copied here, by one thread: torch would set all its threads to copying what is not dense.
    channels_last = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
    found = F.interpolate(channels_last, size, mode=interpolation, antialias=True)
    pixels: Pixels = found[0].permute(1, 2, 0).numpy()
    return pixels


def _turned(picture: Pixels, degrees: float, box: Box, size: tuple[int, int]) -> Pixels:
    height, width = picture.shape[:2]
    left, upper, right, lower = box
    fill = tuple(picture[0, 0].tolist())
    # From a pixel of the result to its place in the crop, …
    step_x, step_y = (right - left) / size[1], (lower - upper) / size[0]
    # … from there about the centre to that in the picture, as Pillow's `rotate` does …
    cos, sin = math.cos(-math.radians(degrees)), math.sin(-math.radians(degrees))
    x, y = left - width / 2, upper - height / 2
    start_x, start_y = cos * x + sin * y + width / 2, cos * y - sin * x + height / 2
    # … which is made smaller beforehand where a bilinear pass would leave pixels out.
    shrink = min(1.0, _SPARE * max(1 / step_x, 1 / step_y))
    if shrink < 1:
        small = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        picture = resize(picture, small)
    kx, ky = picture.shape[1] / width, picture.shape[0] / height
    along = (cos * step_x * kx, sin * step_y * kx, start_x * kx)
    down = (-sin * step_x * ky, cos * step_y * ky, start_y * ky)
    image = Image.fromarray(picture).transform(
        size[::-1], Image.Transform.AFFINE, along + down, Image.Resampling.BILINEAR, fillcolor=fill
    )
    return np.asarray(image)


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
    # A transform that is not open_clip's may return float32 [height, width, 3].
    dtype = torch.uint8 if pixels[0].dtype == np.uint8 else torch.float32
    batch = torch.empty(shape, dtype=dtype, pin_memory=pinned)
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


_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of Pillow's own grey


def augmentation(
    config: AugmentConfig, size: tuple[int, int], decode: Decode
) -> Callable[[Pixels, random.Random], Pixels]:
    """A function from an RGB picture, uint8 [h, w, 3], and a generator to uint8 [height, width, 3].

    Args:
        config: what to change, and how much.
        size: height and width of the result, in pixels.
        decode: "exact" crops between pixels and resizes with Pillow; "fast" crops at whole pixels.
    """
    resampled = resample if decode == "fast" else resample_exactly

    def augment(picture: NDArray[np.uint8], generator: random.Random) -> Pixels:
        height, width = picture.shape[:2]
        degrees = generator.uniform(-config.rotate, config.rotate) if config.rotate else 0.0
        box = crop_box((width, height), config.crop_scale, config.crop_ratio, generator)
        pixels = resampled(picture, degrees, box, size)
        if config.flip and generator.random() < config.flip:
            pixels = pixels[:, ::-1]
        if config.color_jitter:
            pixels = _jittered(pixels, config.color_jitter, generator)
        if config.grayscale and generator.random() < config.grayscale:
            pixels = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
        return pixels

    return augment


def reduction(config: AugmentConfig, size: tuple[int, int], decode: Decode) -> Reduction | None:
    """How much smaller pictures may be read, so that the least crop is still as large as ``size``.

    It depends on nothing that is drawn, so a picture is the same whenever it is read. None: they
    are read whole.

    Args:
        config: what is cropped.
        size: height and width that crops are resized to, in pixels.
        decode: "exact" reads every picture whole.
    """
    if decode == "exact":
        return None
    share, (narrow, wide) = config.crop_scale[0], config.crop_ratio

    def factor(width: int, height: int) -> int:
        area = width * height * share
        spare_width = min(math.sqrt(area * narrow), width) / size[1]
        spare_height = min(math.sqrt(area / wide), height) / size[0]
        return largest_reduction(min(spare_width, spare_height))

    return factor


def crop_box(
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: random.Random,
) -> Box:
    """A random part of an image: left, upper, right, lower, in pixels.

    Its share of the area is uniform in ``scale``, the logarithm of its ratio of width to height
    uniform in that of ``ratio`` (Szegedy et al. 2015, section 6). A part that would stand out of
    the image is clipped to it.

    Args:
        image_size: width and height.
        scale: smallest and largest share of the area.
        ratio: smallest and largest ratio of width to height.
        generator: the source of randomness.
    """
    width, height = image_size
    area = width * height * generator.uniform(*scale)
    aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
    crop_width = min(math.sqrt(area * aspect), width)
    crop_height = min(math.sqrt(area / aspect), height)
    left = generator.uniform(0, width - crop_width)
    upper = generator.uniform(0, height - crop_height)
    return left, upper, min(left + crop_width, width), min(upper + crop_height, height)


def _jittered(pixels: Pixels, strength: float, generator: random.Random) -> Pixels:
    """Brightness, contrast about middle grey, and saturation, in one pass over the pixels."""
    brightness, contrast, saturation = (
        1 + generator.uniform(-strength, strength) for _ in range(3)
    )
    gain = brightness * contrast
    offset = 128 * (1 - contrast)
    rows = []
    for channel in range(3):
        row = [gain * (1 - saturation) * weight for weight in _LUMA]
        row[channel] += gain * saturation
        rows += [*row, offset]
    return np.asarray(Image.fromarray(pixels).convert("RGB", tuple(rows)))
