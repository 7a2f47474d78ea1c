"""Random changes to training images, each drawn from the generator it is handed."""

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.config import AugmentConfig

Pixels = NDArray[np.uint8]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of Pillow's own grey


def augmentation(
    config: AugmentConfig, size: tuple[int, int]
) -> Callable[[Image.Image, random.Random], Pixels]:
    """A function from an RGB image and a generator to uint8 [height, width, 3].

    Args:
        config: what to change, and how much.
        size: height and width of the result, in pixels.
    """

    def augment(image: Image.Image, generator: random.Random) -> Pixels:
        if config.rotate:
            image = _rotated(image, generator.uniform(-config.rotate, config.rotate))
        box = crop_box(image.size, config.crop_scale, config.crop_ratio, generator)
        # Crop and resize in one step, which reads each source pixel once.
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
        if config.flip and generator.random() < config.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if config.color_jitter:
            image = _jittered(image, config.color_jitter, generator)
        if config.grayscale and generator.random() < config.grayscale:
            image = image.convert("L").convert("RGB")
        return np.array(image, np.uint8)

    return augment


def crop_box(
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: random.Random,
) -> tuple[float, float, float, float]:
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


def _rotated(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate about the centre; the corners take the colour of the image's own first pixel."""
    fill = image.getpixel((0, 0))
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


def _jittered(image: Image.Image, strength: float, generator: random.Random) -> Image.Image:
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
    return image.convert("RGB", tuple(rows))
