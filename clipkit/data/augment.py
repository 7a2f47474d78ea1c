"""Random changes to training images, each drawn from the generator it is handed."""

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.config import AugmentConfig
from clipkit.data.images import Decode, Reduction, largest_reduction
from clipkit.data.resample import Box, Pixels, resample, resample_exactly

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
