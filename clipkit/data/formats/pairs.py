"""Images and pairs from Python objects: PIL images, arrays, or a map-style torch Dataset."""

import io
import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.data.captions import clean_captions
from clipkit.data.images import Skipped
from clipkit.data.source import Notes, RowDict, Source, in_memory, to_batches

_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}


def open_pairs(pairs: Iterable[Any]) -> Source:
    """Read ``(image, caption)`` pairs, or images without captions, into memory, once.

    An image is a PIL image, a uint8 array ``[height, width, 3]``, a torch tensor
    ``[3, height, width]`` of uint8 or of floats from 0 to 1 (torchvision's ``ToTensor``), or a
    path; a caption is a string or a list of strings. Images other than paths are stored as PNG,
    which loses nothing. The keys are the positions of the items.

    Raises:
        TypeError: an item is neither a pair nor an image, or an image or caption has the wrong
            type.
    """
    skipped: list[Skipped] = []
    notes = Notes()
    digest = blake2b(digest_size=16)

    def rows() -> Iterator[RowDict]:
        for number, item in enumerate(pairs):
            pair = (item, []) if is_image(item) else item
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"item {number} is a {type(item).__name__}, expected an (image, caption) pair "
                    "or an image"
                )
            key, image = f"{number:08}", stored_image(pair[0], number)
            captions = clean_captions(_captions(pair[1], number), key, skipped, notes)
            digest.update(repr((image, captions)).encode("utf-8", "surrogatepass"))
            yield {"key": key, "image": image, "captions": captions, "label": None}

    batches = list(to_batches(rows(), 256))
    prints = digest.hexdigest()
    table = in_memory(batches, skipped)
    return Source("pairs", "pairs", table, None, prints, skipped, notes)


def is_image(item: Any) -> bool:
    """Whether an object is one image in memory: a PIL image, an array or a torch tensor."""
    return isinstance(item, Image.Image | np.ndarray) or hasattr(item, "detach")


def stored_image(image: Any, number: int) -> dict[str, Any]:
    """An image as rows store it, its bytes or its path; ``number`` is for messages."""
    if isinstance(image, str | os.PathLike):
        return {"bytes": None, "path": str(Path(image).absolute())}
    if hasattr(image, "detach"):  # a torch tensor, recognised without importing torch
        image = _from_tensor(image.detach().cpu().numpy(), number)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(
                f"image {number} is an array of {image.dtype} {list(image.shape)}, expected uint8 "
                "[height, width, 3]"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image {number} is a {type(image).__name__}, expected a PIL image, a uint8 array or a "
            "path"
        )
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return {"bytes": stream.getvalue(), "path": None}


def _from_tensor(pixels: np.ndarray[Any, Any], number: int) -> np.ndarray[Any, Any]:
    """A tensor [3, height, width] as uint8 [height, width, 3]."""
    floats = pixels.dtype.kind == "f"
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not (floats or pixels.dtype == np.uint8):
        raise TypeError(
            f"image {number} is a tensor of {pixels.dtype} {list(pixels.shape)}, expected uint8 or "
            "floats from 0 to 1, [3, height, width]"
        )
    if floats:
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise TypeError(
                f"image {number} is a tensor with values from {pixels.min():.3g} to "
                f"{pixels.max():.3g}, expected 0 to 1; leave out the normalisation"
            )
        pixels = (255 * pixels).round().astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _captions(captions: Any, number: int) -> list[str]:
    texts = [captions] if isinstance(captions, str) else captions
    if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        return list(texts)
    raise TypeError(
        f"caption {number} is a {type(captions).__name__}, expected a string or a list of strings"
    )
