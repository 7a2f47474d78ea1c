"""Sample queries: texts, encoded by the index's model, that an index is tuned and calibrated with.

They are captions of the index's own images, or generic captions if few images have any, and random
words that nothing should match.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipkit.errors import ArtifactError
from clipkit.index.exact import Floats, Integers
from clipkit.store.shards import write_file

MOST = 1000
"""Captions drawn at most, spread over all images that have any."""
FEWEST = 50
"""Images with captions below which generic captions are used."""
NONSENSE = 200
"""Queries of random words."""
FILE = "sample_queries.bin"
"""In NumPy's format, but not named .npy like the vectors of images."""
OLD_FILE = "questions.npy"
"""Its name in indexes of older versions."""
_SYLLABLES = [
    *("ba", "ke", "lo", "mi", "tu", "ra", "ze", "no", "shi", "pla"),
    *("gru", "vex", "qua", "fro", "zy", "dwi", "olp", "urk", "snee", "thab"),
]
Encode = Callable[[Sequence[str]], Floats]
"""Texts to unit vectors float32 [m, dim], by the model of the index."""


@dataclass(frozen=True)
class SampleQueries:
    """Sample queries as vectors.

    Attributes:
        texts: the m captions.
        captions: float32 [m, dim], their vectors.
        rows: int64 [m], for each the row of its image; empty for generic captions.
        nonsense: float32 [g, dim], queries that nothing should match.
        source: where the captions come from.
    """

    texts: list[str]
    captions: Floats
    rows: Integers
    nonsense: Floats
    source: str


def encode_sample_queries(tables: Iterable[pa.Table], encode: Encode) -> SampleQueries:
    """Sample queries for an index with these records, in row order."""
    drawn, random_words = draw_captions(tables), nonsense()
    vectors = encode([*drawn.captions, *random_words])
    rows = np.array(drawn.rows, np.int64)
    count = len(drawn.captions)
    return SampleQueries(drawn.captions, vectors[:count], rows, vectors[count:], drawn.source)


@dataclass(frozen=True)
class DrawnCaptions:
    """Captions drawn as sample queries.

    Attributes:
        captions: the texts.
        rows: for each the row of the image it was written for; empty for generic captions.
    """

    captions: list[str]
    rows: list[int]

    @property
    def source(self) -> str:
        """Where they come from, for a manifest."""
        return "captions of the images" if self.rows else "generic captions"


def draw_captions(tables: Iterable[Any], most: int = MOST) -> DrawnCaptions:
    """Draw one caption each of some images, with a fixed seed; generic ones if few have any.

    Args:
        tables: the records in row order, tables with a column ``captions`` of lists of strings.
        most: how many at most.
    """
    random = np.random.default_rng(0)
    # Reservoir sampling (Vitter 1985, algorithm R): each image is equally likely.
    drawn: list[tuple[int, str]] = []
    row = seen = 0
    for table in tables:
        for captions in table["captions"].to_pylist():
            written = [caption for caption in captions or () if caption.strip()]
            if written:
                place = seen if seen < most else int(random.integers(seen + 1))
                if place < most:
                    pick = (row, written[int(random.integers(len(written)))])
                    drawn[place : place + 1] = [pick]
                seen += 1
            row += 1
    if len(drawn) < FEWEST:
        return DrawnCaptions(generic_captions(), [])
    drawn.sort()
    return DrawnCaptions([caption for _, caption in drawn], [place for place, _ in drawn])


def generic_captions() -> list[str]:
    """Captions of common photo subjects."""
    text = files("clipkit.index").joinpath("captions.txt").read_text(encoding="utf-8")
    return text.splitlines()


@cache
def nonsense() -> list[str]:
    """Texts of random words, drawn with a fixed seed."""
    random = np.random.default_rng(0)
    return [
        " ".join(
            "".join(random.choice(_SYLLABLES, random.integers(2, 5)))
            for _ in range(random.integers(1, 6))
        )
        for _ in range(NONSENSE)
    ]


def write_sample_queries(folder: Path, captions: Floats) -> None:
    """Store caption vectors, float32 [m, dim], beside an index, atomically.

    The index can then be measured again without its model. The vectors do not depend on the
    index's content, so that they fit any state of it.
    """
    write_file(folder / FILE, lambda stream: np.save(stream, captions))
    (folder / OLD_FILE).unlink(missing_ok=True)


def read_sample_queries(folder: Path, dim: int) -> Floats | None:
    """The caption vectors stored beside an index, float32 [m, dim]; None if there are none.

    Raises:
        ArtifactError: the file is damaged.
    """
    file = folder / FILE
    try:
        with file.open("rb") as stream:
            captions: Floats = np.load(stream, allow_pickle=False)
        if captions.dtype != np.float32 or captions.ndim != 2 or captions.shape[1] != dim:
            raise ValueError(f"{captions.dtype} {list(captions.shape)}, expected [m, {dim}]")
        if not len(captions) or not np.isfinite(captions).all():
            raise ValueError("not all numbers are finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"cannot read {file} ({error}); `clipkit index calibrate {folder}` writes it again"
        ) from None
    return captions
