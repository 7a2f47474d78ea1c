"""Photos of 2 and 12 megapixels for the benchmarks, upscaled from small ones.

Grain is added so that a pixel takes about as many bits as in a JPEG from a camera. Without it,
decoding would take half the time. The upscaled photos are no sharper than the originals.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = {"224": 224, "2MP": 1414, "12MP": 3464}
GRAIN = 5  # standard deviation of the grain, of 255 levels
QUALITY = 90


def originals(source: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """Keys and JPEGs of the first photos of a Parquet file."""
    import pyarrow.parquet as pq

    table = pq.read_table(source, columns=["key", "image"]).slice(0, count)
    for row in table.to_pylist():
        yield row["key"], row["image"]["bytes"]


def enlarged(photo: bytes, side: int, seed: int = 0) -> bytes:
    """A photo as a JPEG of ``side`` × ``side`` pixels; unchanged if it has that size already."""
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    if side == image.width == image.height:
        return photo
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    generator = np.random.default_rng(seed)
    # Tile one patch of grain: generating a full image of it would take a second.
    patch = generator.normal(0, GRAIN, (512, 512, 1)).astype(np.float32)
    tiles = -(-side // 512)
    grain = np.tile(patch, (tiles, tiles, 1))[:side, :side]
    pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def write_photos(source: Path, folder: Path, size: str, count: int) -> Path:
    """Write JPEG files of one of ``SIDES``, unless they exist, and return their folder."""
    target = folder / f"{size}-{count}"
    target.mkdir(parents=True, exist_ok=True)
    for number, (_, photo) in enumerate(originals(source, count)):
        file = target / f"{number:05}.jpg"
        if not file.exists():
            file.write_bytes(enlarged(photo, SIDES[size], seed=number))
    return target
