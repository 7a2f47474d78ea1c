"""A toy that can be computed in the head: colours as pictures, colour words as captions."""

import re
import tarfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from clipkit.artifacts import ModelRef

if TYPE_CHECKING:
    import torch

    from clipkit.data.transforms import Preprocess

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
GREY = 0.5


class ColourEncoder:
    """Image vector: mean colour minus grey. Caption vector: mean of its colour words minus grey.

    `encoded` counts the images that went through.
    """

    def __init__(self, name: str = "colours") -> None:
        self.model = ModelRef(name=name, weights="toy", fingerprint=f"{name}-fingerprint", dim=3)
        self.dim = 3
        self.encoded = 0

    @property
    def preprocess(self) -> "Preprocess":
        from clipkit.data.transforms import Preprocess

        return Preprocess((4, 4), mean=(0, 0, 0), std=(1, 1, 1), resize_mode="squash")

    @property
    def device(self) -> "torch.device":
        import torch

        return torch.device("cpu")

    def encode_images(
        self, images: "Image.Image | Sequence[Image.Image] | torch.Tensor", batch_size: int = 64
    ) -> np.ndarray:
        import torch

        if isinstance(images, Image.Image):
            return self.encode_images([images], batch_size)[0]
        if not isinstance(images, torch.Tensor):
            images = torch.stack([self.preprocess(image) for image in images])
        if images.dtype == torch.uint8:
            images = self.preprocess.normalise(images)
        self.encoded += len(images)
        return _unit(images.numpy().mean(axis=(2, 3)) - GREY)

    def encode_text(self, captions: str | Sequence[str]) -> np.ndarray:
        if isinstance(captions, str):
            return self.encode_text([captions])[0]
        means = [
            np.mean([np.array(COLOURS[word]) / 255 for word in _colour_words(caption)], axis=0)
            for caption in captions
        ]
        return _unit(np.array(means).reshape(-1, 3) - GREY)


def _colour_words(caption: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", caption.lower()) if word in COLOURS]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def square(colour: str, shade: int = 0, size: int = 8) -> Image.Image:
    """A square of a colour, its red channel moved towards grey by `shade` of 255."""
    red, green, blue = COLOURS[colour]
    return Image.new("RGB", (size, size), (abs(red - shade), green, blue))


def png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def soft(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture as smooth as a photo, with an edge across it, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    pixels[:, : width // 3] //= 2
    return pixels


def write_squares(folder: Path, per_colour: int = 2) -> list[str]:
    """Write colour/colour-N.png below `folder`; returns the keys, sorted."""
    keys = []
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True, exist_ok=True)
        for number in range(per_colour):
            key = f"{colour}/{colour}-{number}.png"
            square(colour, shade=10 * number).save(folder / key)
            keys.append(key)
    return sorted(keys)


def unit_rows(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Random float32 [count, dim] of unit rows."""
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def records(count: int, start: int = 0) -> list[dict]:
    """Records with keys item-00000.png and so on."""
    return [
        {
            "key": f"item-{number:05d}.png",
            "size": 100 + number,
            "mtime_ns": 7 * number,
            "captions": [f"caption {number}"] * (number % 3),
            "label": None if number % 2 else f"label {number}",
            "content_hash": f"{number:032x}",
        }
        for number in range(start, start + count)
    ]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar of files, each with its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
