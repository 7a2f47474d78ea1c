"""Images of one set that are byte for byte in another: what training must not have seen.

Find images that are the same, or nearly: resized, recompressed, slightly cropped.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.open_source import Source

MOST = 200_000
"""Training images looked at; of more, so many drawn at random."""


@dataclass(frozen=True)
class Shared:
    """Held-out images that training has, too.

    Attributes:
        keys: of a held-out image and of its copy in training.
        held_out: how many images are held out.
        looked_at: how many training images were compared, of how many.
        training: how many training images there are.
    """

    keys: list[tuple[str, str]]
    held_out: int
    looked_at: int
    training: int


def shared_images(
    training: Source, held_out: Source, seed: int = 0, most: int = MOST
) -> Shared | None:
    """Find held-out images whose bytes are those of a training image.

    Only training images of the same size in bytes are read: 100,000 files took 6 s. Copies that
    were resized or stored anew are for ``check_data`` to find, which decodes every image.

    Args:
        training: what is trained on.
        held_out: what is measured on.
        seed: of the sample.
        most: training images looked at.

    Returns:
        what they share; None where one of them is a stream, which would have to be read whole.
    """
    if training.streaming or held_out.streaming:
        return None
    wanted: dict[int, dict[bytes, list[str]]] = {}
    for size, number in _sizes(held_out, range(len(held_out.rows))):
        row = held_out.rows[number]
        content = _content(row["image"])
        if content is not None:
            wanted.setdefault(size, {}).setdefault(content, []).append(row["key"])
    count = len(training.rows)
    looked_at: Iterable[int] = range(count)
    if count > most:
        looked_at = np.sort(np.random.default_rng(seed).permutation(count)[:most]).tolist()
    found: dict[str, str] = {}
    for size, number in _sizes(training, looked_at):
        if size in wanted:
            row = training.rows[number]
            content = _content(row["image"])
            for key in wanted[size].get(content, ()) if content is not None else ():
                found.setdefault(key, row["key"])
    return Shared(list(found.items()), len(held_out.rows), min(count, most), count)


def _sizes(source: Source, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Size in bytes and number of images, as stored; those with nothing there are left out."""
    import pyarrow.compute as pc

    stored, paths = source.rows.data.column("image").flatten()
    lengths = pc.fill_null(pc.binary_length(stored), -1).to_numpy()
    # A selection of rows keeps the whole table and the numbers of those selected.
    chosen = source.rows._indices
    places = None if chosen is None else chosen.column(0).to_numpy()
    for number in numbers:
        place = number if places is None else int(places[number])
        size = int(lengths[place])
        if size < 0:
            try:
                size = os.stat(paths[place].as_py()).st_size
            except (OSError, TypeError):  # no file, or neither bytes nor a path
                continue
        if size:
            yield size, number


def _content(image: dict[str, Any]) -> bytes | None:
    """A hash of an image's bytes; None where they cannot be read."""
    data = image["bytes"]
    try:
        data = Path(image["path"]).read_bytes() if data is None else data
    except (OSError, TypeError):
        return None
    return blake2b(data, digest_size=16).digest()


# Measured on 1,000 Flickr8k photos. A photo and its copy at half the size differ in at most 3 of 64
# bits, their thumbnails by 0.7; shrunk by a quarter and recompressed to JPEG quality 30,
# 99.9 % are within both limits; cropped by 2 % at each edge, about 85 %. Of the half million pairs
# of different photos none is within either. Drawings on white do share bits: both must agree.
NEAR_BITS = 7
NEAR_COLOURS = 5.0
"""Most mean difference of two thumbnails, in steps of 0 to 255."""

_HASH, _THUMB = 8, 8 * 8 * 3
LOOK = _HASH + _THUMB
_ROWS, _PAIRS = 256, 100_000  # compared at a time, which bounds the memory
_DCT = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)


def content_hash(image: Image.Image) -> bytes:
    """16 bytes that are equal for images of the same pixels, whatever files they came from."""
    shape = f"{image.mode} {image.size}".encode()
    return blake2b(image.tobytes(), digest_size=16, key=shape).digest()


def look(image: Image.Image) -> NDArray[np.uint8]:
    """What an RGB image looks like from afar, uint8 [200]: 64 bits, then an 8×8 thumbnail.

    The bits are a perceptual hash (Zauner 2010, §3.2.1): of the 8×8 lowest frequencies of the
    grey image at 32×32 pixels, which lie above their median.
    """
    # A box filter costs half as much, but misses a fifth of the copies of small drawings.
    small = np.asarray(
        image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=3), np.float32
    )
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    frequencies = (_DCT @ grey @ _DCT.T).ravel()
    bits = np.packbits(frequencies > np.median(frequencies[1:]))
    thumb = small.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return np.concatenate([bits, thumb.ravel()])


def near_groups(looks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """A group number for each image, equal for those that look nearly the same.

    Two images are near when their bits differ in at most 7 and their thumbnails by at most 5 on
    average; groups are what chains of near ones join. Hashes that differ in 7 of 64 bits agree in
    one of their 8 bytes (the pigeonhole principle), so only images that share a byte are compared.

    Args:
        looks: uint8 [n, 200].
    """
    distinct, inverse = np.unique(looks, axis=0, return_inverse=True)
    groups = np.arange(len(distinct))
    signs = np.unpackbits(distinct[:, :_HASH], axis=1).astype(np.float32) * 2 - 1
    for byte in distinct[:, :_HASH].T:
        order = np.argsort(byte, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(byte[order])) + 1):
            _join(groups, bucket, signs, distinct[:, _HASH:])
    return groups[inverse.ravel()]


def _join(
    groups: NDArray[np.int64],
    bucket: NDArray[np.int64],
    signs: NDArray[np.float32],
    thumbs: NDArray[np.uint8],
) -> None:
    """Join the groups of near images within a bucket, in place."""
    for start in range(0, len(bucket), _ROWS):
        rest = bucket[start:]
        # The inner product of ±1 vectors is 64 less twice the bits that differ.
        close = signs[rest[:_ROWS]] @ signs[rest].T >= 64 - 2 * NEAR_BITS
        close &= groups[rest[:_ROWS], None] != groups[rest]
        pairs = rest[np.argwhere(np.triu(close, 1))]
        for i in range(0, len(pairs), _PAIRS):
            one, other = pairs[i : i + _PAIRS].T
            apart = groups[one] != groups[other]
            one, other = one[apart], other[apart]
            difference = np.abs(thumbs[one].astype(np.int16) - thumbs[other]).mean(axis=1)
            for a, b in zip(
                *(side[difference <= NEAR_COLOURS] for side in (one, other)), strict=True
            ):
                low, high = sorted((groups[a], groups[b]))
                if low != high:
                    groups[groups == high] = low
