"""Collect the statistics and problems of a source in one pass, without storing images."""

import io
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.captions import caption_warning
from clipkit.data.duplicates import LOOK, content_hash, look
from clipkit.data.images import Skipped
from clipkit.data.rows import Row, StoredImage
from clipkit.data.source import Source
from clipkit.data.workers import map_ordered, worker_count
from clipkit.errors import ImageError
from clipkit.progress import progress_bar

TINY = 16  # pixels; a model sees such an image enlarged at least 14 times
EXAMPLES = 5


@dataclass(frozen=True)
class Spread:
    """Minimum, median, 95th percentile and maximum of some numbers."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> "Spread":
        """The spread of at least one number."""
        return cls(*np.percentile(values, [0, 50, 95, 100], method="nearest").astype(int).tolist())

    def __str__(self) -> str:
        return f"{self.min} to {self.max}, median {self.median}, 95 % up to {self.p95}"


@dataclass
class Problem:
    """Items with the same problem, grouped by reason without its numbers, with a few examples."""

    reason: str
    count: int = 0
    examples: list[Skipped] = field(default_factory=list)

    def add(self, item: Skipped) -> None:
        """Count one item."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(item)


@dataclass(frozen=True)
class _Seen:
    """The properties of one row's image."""

    width: int
    height: int
    form: str
    size: int
    content: bytes
    look: bytes


@dataclass
class Survey:
    """The result of one pass over a source.

    Attributes:
        rows: number of rows, readable or not.
        size: total size of the readable images as stored, in bytes.
        keys, contents, looks: key, content hash and appearance of each readable image, in order.
        widths, heights: size of each readable image, in pixels.
        forms: number of images by format and mode, like ``JPEG RGB``.
        labels: number of images by label.
        per_image: number of images by number of captions.
        problems: problems by kind.
    """

    rows: int = 0
    size: int = 0
    keys: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    widths: "array[int]" = field(default_factory=lambda: array("L"))
    heights: "array[int]" = field(default_factory=lambda: array("L"))
    forms: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    per_image: Counter[int] = field(default_factory=Counter)
    problems: dict[str, Problem] = field(default_factory=dict)
    _looks: bytearray = field(default_factory=bytearray)

    @property
    def looks(self) -> NDArray[np.uint8]:
        """The appearance of each readable image (see ``look``), uint8 [n, 456]."""
        return np.frombuffer(bytes(self._looks), np.uint8).reshape(-1, LOOK)

    def add_problem(self, key: str, reason: str, detail: str = "") -> None:
        """Record a problem with an item; only the examples show ``detail``, after the reason."""
        kind = re.sub(r"(?<![\w-])\d[\d.,]*\b", "…", reason)
        self.problems.setdefault(kind, Problem(kind)).add(
            Skipped(key, f"{reason}: {detail}" if detail else reason)
        )

    def add_image(self, key: str, seen: _Seen) -> None:
        """Record a readable image."""
        self.keys.append(key)
        self.contents.append(seen.content)
        self._looks += seen.look
        self.widths.append(seen.width)
        self.heights.append(seen.height)
        self.forms[seen.form] += 1
        self.size += seen.size
        if min(seen.width, seen.height) < TINY:
            self.add_problem(key, f"is tiny ({seen.width} x {seen.height} pixels)")


def survey(source: Source, on_caption: Callable[[str], None]) -> Survey:
    """Read every image and caption of a source once.

    It takes about 560 bytes of memory per image.

    Args:
        source: the data.
        on_caption: called with each caption, in order.
    """
    found = Survey()
    keys: set[str] = set()
    missing: dict[str, Problem] = {"has no caption": Problem(""), "has no label": Problem("")}
    workers = worker_count("auto")
    results = map_ordered(_examine, source.rows, workers=workers, ahead=4 * workers)
    for row, seen in progress_bar(results, desc="checking", total=source.count, unit=" images"):
        key = row.key
        found.rows += 1
        if key in keys:
            found.add_problem(key, "has the same key as an earlier item")
        keys.add(key)
        if isinstance(seen, _Seen):
            found.add_image(key, seen)
        else:
            found.add_problem(key, seen)
        found.per_image[len(row.captions)] += 1
        for caption in row.captions:
            on_caption(caption)
            if warning := caption_warning(caption, key):
                found.add_problem(key, warning, repr(caption[:100]))
        if not row.captions:
            missing["has no caption"].add(Skipped(key, "has no caption"))
        if row.label is None:
            missing["has no label"].add(Skipped(key, "has no label"))
        else:
            found.labels[row.label] += 1
    for item in source.skipped:
        found.add_problem(item.key, item.reason)
    # If no image at all has a caption (or label), this source has none, and none is missing.
    for reason, problem in missing.items():
        if 0 < problem.count < found.rows:
            found.problems[reason] = Problem(reason, problem.count, problem.examples)
    return found


def _examine(row: Row) -> tuple[Row, _Seen | str]:
    """The row without its image, and the image's properties or the reason it cannot be read."""
    stored, row = row.image, replace(row, image=StoredImage())
    try:
        image = stored.read()
    except ImageError as error:
        return row, str(error)
    file = stored.file
    with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as header:
        form = f"{header.format} {header.mode}"
        # On white, all white drawings would be the same image.
        whole = header.convert("RGBA") if header.has_transparency_data else image
    size = file.stat().st_size if isinstance(file, Path) else len(file)
    return row, _Seen(*image.size, form, size, content_hash(whole), look(image).tobytes())
