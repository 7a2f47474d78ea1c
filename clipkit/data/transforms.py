"""Image preprocessing and training augmentation, each in an exact and a fast version.

"exact" resizes with Pillow and equals open_clip's transform bit for bit. "fast" decodes JPEGs at a
reduced size and resizes with torch's uint8 kernel. Augmentation takes its random numbers from the
generator that the caller passes.
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

SPARE = 2
"""Minimum size of a fast-decoded image, relative to the size it is resized to.

Measured on photos of 2 and 12 megapixels: with factor 1, the cosine similarity to the exact vectors
is 0.996 and 0.998, at 6.5 and 27 ms per photo. With factor 2 it is 0.9995, at 7.9 and 32 ms. Exact
decoding takes 23 and 115 ms.
"""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's conversion to grey

# Size of an image before rotation, relative to the result. Of the factors from 1 to 2, this one
# came nearest to `resample_exactly` on 40 photos of 224 pixels: the mean error is 2.6 of 255 levels
# at 32 pixels, 1.9 at 64 and 1.7 at 112. With factor 1 it is 3.8, 2.8 and 1.9.
_ROTATION_OVERSAMPLING = 1.25


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of an image tower, with the fields of open_clip's ``preprocess_cfg``.

    Attributes:
        size: height and width, in pixels.
        mean: mean of the red, green and blue channels, on a scale from 0 to 1.
        std: standard deviation of these channels.
        interpolation: ``"bilinear"``; any other value means bicubic.
        resize_mode: ``"shortest"`` resizes the shorter side and crops the centre, ``"longest"``
            resizes the longer side and pads, ``"squash"`` resizes both sides.
        fill_color: padding colour, 0 to 255.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``preprocess_cfg``; a single number applies to both sides or all channels."""
        height, width = np.broadcast_to(config["size"], 2).tolist()
        mean, std = (tuple(np.broadcast_to(config[name], 3).tolist()) for name in ("mean", "std"))
        rest = {name: config[name] for name in ("interpolation", "resize_mode", "fill_color")}
        return cls((height, width), mean, std, **rest)

    def __call__(self, image: Image.Image) -> Tensor:
        """Preprocess an image to float32 [3, height, width], exactly as open_clip does."""
        return self.normalise(as_batch([self.pixels(image)]))[0].contiguous()

    def reduction(self, decode: Decode) -> Reduction | None:
        """The factor by which an image may be reduced on reading; None if it is read in full.

        Args:
            decode: "fast" reads at the smallest size that is still ``SPARE`` times the target.
        """
        if decode == "exact":
            return None

        def factor(width: int, height: int) -> int:
            new_height, new_width = self._resized(width, height)
            return largest_reduction(min(width / new_width, height / new_height) / SPARE)

        return factor

    def pixels(self, image: Image.Image, decode: Decode = "exact") -> Pixels:
        """Resize an image, then crop or pad it, to uint8 [height, width, 3].

        Args:
            image: in any mode; "fast" expects an RGB image from ``read_image``.
            decode: "exact" resizes with Pillow, as open_clip does; "fast" uses the kernel of
                ``resample``, which takes a fraction of the time and differs by rounding.
        """
        size = self._resized(*image.size)
        if decode == "exact":
            # Drop the alpha channel only after resizing, which weights colours by it.
            resized = _pixels(image.resize(size[::-1], _FILTERS[self._filter]))
        else:
            resized = _pixels(image)
            if resized.shape[:2] != size:
                resized = resize(resized, size, self._filter)
        return _cropped(_padded(resized, self.size, self.fill_color), self.size)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Standardise uint8 [..., 3, height, width] to float32 with ``mean`` and ``std``.

        The operations and their order are open_clip's, so that results on a CPU are identical.
        """
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return pixels.float().div_(255).sub_(mean).div_(std)

    @property
    def _filter(self) -> str:
        # open_clip ignores the filter if it crops to a size that is not square.
        if self.resize_mode == "shortest" and self.size[0] != self.size[1]:
            return "bicubic"
        return "bilinear" if self.interpolation == "bilinear" else "bicubic"

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of an image before it is cropped or padded."""
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            short = self.size[0]  # torchvision truncates here; open_clip rounds below
            long = int(short * max(width, height) / min(width, height))
            return (short, long) if height <= width else (long, short)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        # At least 1: open_clip fails on very elongated images.
        return max(1, round(height / ratio)), max(1, round(width / ratio))


def as_batch(pixels: Sequence[Pixels], *, pinned: bool = False) -> Tensor:
    """Stack images of one size, uint8 [height, width, 3], to uint8 [n, 3, height, width].

    Args:
        pixels: at least one.
        pinned: allocate pinned memory, for asynchronous copies to a CUDA device.
    """
    shape = (len(pixels), *pixels[0].shape)
    # A custom transform may return float32 [height, width, 3].
    dtype = torch.uint8 if pixels[0].dtype == np.uint8 else torch.float32
    batch = torch.empty(shape, dtype=dtype, pin_memory=pinned)
    np.stack(pixels, out=batch.numpy())
    # A view: memory stays channels-last, which is faster for convolutions.
    return batch.permute(0, 3, 1, 2)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _padded(pixels: Pixels, size: tuple[int, int], colour: int) -> Pixels:
    """Pad the sides that are shorter than ``size``, with the image in the centre."""
    height, width = pixels.shape[:2]
    down, right = max(0, size[0] - height), max(0, size[1] - width)
    if not down and not right:
        return pixels
    padded = np.full((height + down, width + right, 3), colour, np.uint8)
    upper, left = down // 2, right // 2
    padded[upper : upper + height, left : left + width] = pixels
    return padded


def _cropped(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Crop the centre; an offset of half a pixel is rounded to even, as in torchvision."""
    upper, left = (round((have - want) / 2) for have, want in zip(pixels.shape, size, strict=False))
    return pixels[upper : upper + size[0], left : left + size[1]]


def augmentation(
    config: AugmentConfig, size: tuple[int, int], decode: Decode
) -> Callable[[Pixels, random.Random], Pixels]:
    """A function from RGB pixels, uint8 [h, w, 3], and a generator to uint8 [height, width, 3].

    Args:
        config: the augmentations and their strengths.
        size: height and width of the result, in pixels.
        decode: "exact" crops at subpixel positions with Pillow; "fast" crops at whole pixels.
    """
    resampled = resample if decode == "fast" else resample_exactly

    def augment(pixels: NDArray[np.uint8], generator: random.Random) -> Pixels:
        height, width = pixels.shape[:2]
        degrees = generator.uniform(-config.rotate, config.rotate) if config.rotate else 0.0
        box = crop_box((width, height), config.crop_scale, config.crop_ratio, generator)
        pixels = resampled(pixels, degrees, box, size)
        if config.flip and generator.random() < config.flip:
            pixels = pixels[:, ::-1]
        if config.color_jitter:
            pixels = _jittered(pixels, config.color_jitter, generator)
        if config.grayscale and generator.random() < config.grayscale:
            pixels = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
        return pixels

    return augment


def reduction(config: AugmentConfig, size: tuple[int, int], decode: Decode) -> Reduction | None:
    """The factor by which images may be reduced on reading; None if they are read in full.

    Even the smallest possible crop is still at least as large as ``size``. The factor does not
    depend on random numbers, so an image is decoded to the same pixels in every epoch.

    Args:
        config: the crop's limits.
        size: height and width that crops are resized to, in pixels.
        decode: "exact" reads every image in full.
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
    """A random crop: left, upper, right and lower edge, in pixels.

    The fraction of the area is uniform in ``scale``, and the logarithm of the aspect ratio is
    uniform between the logarithms of ``ratio`` (Szegedy et al. 2015, section 6). A crop that would
    exceed the image is clipped to it.

    Args:
        image_size: width and height.
        scale: smallest and largest fraction of the area.
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


def resample_exactly(pixels: Pixels, degrees: float, box: Box, size: tuple[int, int]) -> Pixels:
    """Rotate an image, then crop it at subpixel positions and resize it in one step, with Pillow.

    Args:
        pixels: uint8 [h, w, 3].
        degrees: counterclockwise rotation about the centre; the corners take the colour of the
            first pixel.
        box: the crop, in coordinates of the rotated image.
        size: height and width of the result.

    Returns:
        uint8 [height, width, 3].
    """
    image = Image.fromarray(pixels)
    if degrees:
        fill = image.getpixel((0, 0))
        image = image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)
    # In one step, which reads each source pixel once.
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box))


def resample(pixels: Pixels, degrees: float, box: Box, size: tuple[int, int]) -> Pixels:
    """Do the same as ``resample_exactly`` in a fraction of the time, cropping at whole pixels.

    Arguments and result are those of ``resample_exactly``. Without a rotation, torch's uint8 kernel
    resizes, which is vectorised, unlike Pillow's. With the same edges, photos differ by 0.02 to
    0.07 of 255 levels on average. With a rotation, one bilinear pass rotates, crops and resizes;
    photos differ by 1.4 to 2.6 levels. For comparison, a shift by 1/4 pixel causes 1.7 to 3.9.
    """
    if degrees:
        return _rotated(pixels, degrees, box, size)
    left, upper = int(box[0] + 0.5), int(box[1] + 0.5)
    right, lower = max(int(box[2] + 0.5), left + 1), max(int(box[3] + 0.5), upper + 1)
    return resize(pixels[upper:lower, left:right], size)


def resize(pixels: Pixels, size: tuple[int, int], interpolation: str = "bicubic") -> Pixels:
    """Resize an image, uint8 [h, w, 3], with torch's uint8 kernel and antialiasing.

    Args:
        pixels: uint8 [h, w, 3].
        size: height and width of the result.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
    """
    # Copy here, in one thread: torch would use all its threads to copy a non-contiguous array.
    channels_last = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    found = F.interpolate(channels_last, size, mode=interpolation, antialias=True)
    resized: Pixels = found[0].permute(1, 2, 0).numpy()
    return resized


def _rotated(pixels: Pixels, degrees: float, box: Box, size: tuple[int, int]) -> Pixels:
    height, width = pixels.shape[:2]
    left, upper, right, lower = box
    fill = tuple(pixels[0, 0].tolist())
    # Map a pixel of the result to a position in the crop, …
    step_x, step_y = (right - left) / size[1], (lower - upper) / size[0]
    # … and rotate that about the centre of the image, as Pillow's `rotate` does.
    cos, sin = math.cos(-math.radians(degrees)), math.sin(-math.radians(degrees))
    x, y = left - width / 2, upper - height / 2
    start_x, start_y = cos * x + sin * y + width / 2, cos * y - sin * x + height / 2
    # Shrink the image first if a bilinear pass would skip source pixels.
    shrink = min(1.0, _ROTATION_OVERSAMPLING * max(1 / step_x, 1 / step_y))
    if shrink < 1:
        small = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        pixels = resize(pixels, small)
    kx, ky = pixels.shape[1] / width, pixels.shape[0] / height
    along = (cos * step_x * kx, sin * step_y * kx, start_x * kx)
    down = (-sin * step_x * ky, cos * step_y * ky, start_y * ky)
    image = Image.fromarray(pixels).transform(
        size[::-1], Image.Transform.AFFINE, along + down, Image.Resampling.BILINEAR, fillcolor=fill
    )
    return np.asarray(image)
