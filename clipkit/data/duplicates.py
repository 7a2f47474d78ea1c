"""Find duplicate images: byte-identical files in two sets, and near-duplicates in one.

Byte-identical files are cheap to find and reveal held-out images in the training set. A perceptual
hash also finds resized, recompressed and slightly cropped copies, but needs every image decoded.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.rows import StoredImage, Table
from clipkit.data.source import Source
from clipkit.errors import ImageError

MOST = 200_000
"""Maximum number of training images to compare; larger sets are sampled at random."""

# Measured on 1,000 Flickr8k photos. A photo and its copy at half the size differ in at most 3 of 64
# bits, and their thumbnails by 0.7. Of copies shrunk by a quarter and recompressed to JPEG quality
# 30, 99.9 % are within both limits; of copies cropped by 2 % at each edge, about 85 %. None of the
# half million pairs of different photos is within either limit. Drawings on white often share
# bits, so both limits must be met.
NEAR_BITS = 7
NEAR_COLOURS = 5.0
"""Maximum mean difference of two thumbnails, on a scale from 0 to 255."""
# Small drawings on an empty ground meet both limits whatever they show: 148 of 150 icons with
# random letters did. What they show decides the correlation of their deviations from the mean: at
# most 0.92 for nine in ten pairs of different icons, at least 0.95 for 99 of 100 copies of an icon
# (half the size, recompressed, or cropped by 2 %), and at least 0.96 for copies of photos.
NEAR_CORRELATION = 0.95
FLAT = 2.0
"""Standard deviation of a thumbnail, on a scale from 0 to 255, below which it shows nothing."""

_HASH, _COLOURS, _SIDE = 8, 8 * 8 * 3, 16
_GREYS = _HASH + _COLOURS  # where the grey thumbnail begins
LOOK = _GREYS + _SIDE * _SIDE
_ROWS, _PAIRS = 256, 50_000  # block sizes of the comparison, which bound the memory
_DCT = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)


@dataclass(frozen=True)
class Shared:
    """Held-out images that are also training images.

    Attributes:
        keys: pairs of keys, of a held-out image and its copy in the training set.
        held_out: number of held-out images.
        looked_at: number of training images that were compared.
        training: number of all training images.
    """

    keys: list[tuple[str, str]]
    held_out: int
    looked_at: int
    training: int


def shared_images(
    training: Source, held_out: Source, seed: int = 0, most: int = MOST
) -> Shared | None:
    """Find held-out images that are byte-identical to a training image.

    Reads only training images that have the same size in bytes as a held-out image: 100,000 files
    took 6 s. ``check_data`` also finds resized and re-encoded copies; it decodes every image.

    Args:
        training: the training set.
        held_out: the held-out set.
        seed: seed of the random sample.
        most: maximum number of training images to compare.

    Returns:
        The shared images; None if either source is a stream, which would have to be read in full.
    """
    if training.streaming or held_out.streaming:
        return None
    others, rows = held_out.table, training.table
    wanted: dict[int, dict[bytes, list[str]]] = {}
    for size, number in _sizes(others, range(len(others))):
        content = _content(others.image(number))
        if content is not None:
            wanted.setdefault(size, {}).setdefault(content, []).append(others.text(number).key)
    count = len(rows)
    looked_at: Iterable[int] = range(count)
    if count > most:
        looked_at = np.sort(np.random.default_rng(seed).permutation(count)[:most]).tolist()
    found: dict[str, str] = {}
    for size, number in _sizes(rows, looked_at):
        if size in wanted:
            content = _content(rows.image(number))
            for key in wanted[size].get(content, ()) if content is not None else ():
                found.setdefault(key, rows.text(number).key)
    return Shared(list(found.items()), len(others), min(count, most), count)


def _sizes(rows: Table, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Stored size in bytes and row number of each image; skips missing and empty images."""
    lengths = rows.image_sizes()
    for number in numbers:
        size = int(lengths[number])
        if size < 0:
            try:
                size = os.stat(rows.image(number).file).st_size
            except (OSError, ImageError):
                continue
        if size:
            yield size, number


def _content(image: StoredImage) -> bytes | None:
    """A hash of an image's stored bytes; None if they cannot be read."""
    try:
        file = image.file
        data = file.read_bytes() if isinstance(file, Path) else file
    except (OSError, ImageError):
        return None
    return blake2b(data, digest_size=16).digest()


def content_hash(image: Image.Image) -> bytes:
    """A 16-byte hash of mode, size and pixels, independent of the file format."""
    shape = f"{image.mode} {image.size}".encode()
    return blake2b(image.tobytes(), digest_size=16, key=shape).digest()


def look(image: Image.Image) -> NDArray[np.uint8]:
    """The coarse appearance of an RGB image, uint8 [456].

    A 64-bit hash, an 8×8 thumbnail in colour, and a 16×16 one in grey.

    The hash is perceptual (Zauner 2010, §3.2.1). Its bits say which of the 8×8 lowest frequencies
    of the grey image at 32×32 pixels are above their median.
    """
    # A box filter takes half the time, but misses a fifth of the copies of small drawings.
    small = np.asarray(
        image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=3), np.float32
    )
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    frequencies = (_DCT @ grey @ _DCT.T).ravel()
    bits = np.packbits(frequencies > np.median(frequencies[1:]))
    thumb = small.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    greys = grey.reshape(_SIDE, 2, _SIDE, 2).mean(axis=(1, 3)).round().astype(np.uint8)
    return np.concatenate([bits, thumb.ravel(), greys.ravel()])


def near_groups(looks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Group near-duplicates: a group number for each image, int64 [n].

    Two images are near-duplicates if their hashes differ in at most 7 bits, their colour thumbnails
    by at most 5 on average, and their grey thumbnails correlate to at least 0.95. An image whose
    thumbnail is flat is a near-duplicate of none: its hash is noise. Groups are the connected
    components. Hashes that differ in at most 7 of 64 bits agree in at least one of their 8 bytes,
    so only images that share a byte are compared.

    Args:
        looks: uint8 [n, 456], from ``look``.
    """
    distinct, inverse = np.unique(looks, axis=0, return_inverse=True)
    inverse = inverse.ravel()
    groups = np.arange(len(distinct))
    shown = np.flatnonzero(distinct[:, _GREYS:].std(axis=1) >= FLAT)
    hashes = distinct[shown, :_HASH]
    signs = np.unpackbits(distinct[:, :_HASH], axis=1).astype(np.float32) * 2 - 1
    for byte in hashes.T:
        order = np.argsort(byte, kind="stable")
        for bucket in np.split(shown[order], np.flatnonzero(np.diff(byte[order])) + 1):
            _join(groups, bucket, signs, distinct)
    flat = np.flatnonzero(~np.isin(inverse, shown))
    found: NDArray[np.int64] = groups[inverse]
    found[flat] = len(distinct) + flat
    return found


def _join(
    groups: NDArray[np.int64],
    bucket: NDArray[np.int64],
    signs: NDArray[np.float32],
    looks: NDArray[np.uint8],
) -> None:
    """Merge the groups of near-duplicates within a bucket, in place."""
    for start in range(0, len(bucket), _ROWS):
        rest = bucket[start:]
        # The inner product of ±1 vectors is 64 minus twice the number of different bits.
        close = signs[rest[:_ROWS]] @ signs[rest].T >= 64 - 2 * NEAR_BITS
        close &= groups[rest[:_ROWS], None] != groups[rest]
        pairs = rest[np.argwhere(np.triu(close, 1))]
        for i in range(0, len(pairs), _PAIRS):
            one, other = pairs[i : i + _PAIRS].T
            apart = groups[one] != groups[other]
            one, other = one[apart], other[apart]
            near = _are_near(looks[one], looks[other])
            for a, b in zip(one[near], other[near], strict=True):
                low, high = sorted((groups[a], groups[b]))
                if low != high:
                    groups[groups == high] = low


def _are_near(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether the thumbnails of each pair agree in colour and correlate."""
    colours = slice(_HASH, _GREYS)
    apart = np.abs(one[:, colours].astype(np.int16) - other[:, colours]).mean(axis=1)
    near: NDArray[np.bool_] = apart <= NEAR_COLOURS
    left, right = (side[near, _GREYS:].astype(np.float32) for side in (one, other))
    left, right = (side - side.mean(axis=1, keepdims=True) for side in (left, right))
    products = np.einsum("ij,ij->i", left, right)
    norms = np.sqrt(np.einsum("ij,ij->i", left, left) * np.einsum("ij,ij->i", right, right))
    near[near] = products >= NEAR_CORRELATION * norms
    return near
