"""What an index is asked to tune and to calibrate it: vectors of captions, and of nonsense.

Captions that stand for what people ask: those of the images themselves, or generic ones.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipkit.artifacts import MANIFEST, ArtifactWriter, read_manifest, write_json
from clipkit.errors import ArtifactError
from clipkit.index.calibration import Calibration, calibrate
from clipkit.index.exact import Floats, Integers
from clipkit.index.vector_index import VectorIndex
from clipkit.store.shards import write_file

MOST = 1000
"""Captions that are asked at most, spread over all images that have any."""
FEWEST = 50
"""Images with captions below which generic ones are asked."""
NONSENSE = 200
"""Questions without meaning, which nothing fits."""
_SYLLABLES = [
    "ba",
    "ke",
    "lo",
    "mi",
    "tu",
    "ra",
    "ze",
    "no",
    "shi",
    "pla",
    "gru",
    "vex",
    "qua",
    "fro",
    "zy",
    "dwi",
    "olp",
    "urk",
    "snee",
    "thab",
]

if TYPE_CHECKING:
    from clipkit.index.tuning import Measured


@dataclass(frozen=True)
class Queries:
    """Captions to ask an index with.

    Attributes:
        captions: the texts.
        rows: for each the row of the image it was written for; empty for generic ones.
    """

    captions: list[str]
    rows: list[int]

    @property
    def source(self) -> str:
        """Where they come from, for a manifest."""
        return "captions of the images" if self.rows else "generic captions"


def choose_queries(tables: Iterable[Any], most: int = MOST) -> Queries:
    """One caption each of some images, drawn with a fixed seed; generic ones where few have any.

    Args:
        tables: the records in row order, tables with a column ``captions`` of lists of strings.
        most: how many at most.
    """
    random = np.random.default_rng(0)
    # A reservoir (Vitter 1985, algorithm R): each of the images is as likely to be drawn.
    drawn: list[tuple[int, str]] = []
    row = seen = 0
    for table in tables:
        for captions in table["captions"].to_pylist():
            told = [caption for caption in captions or () if caption.strip()]
            if told:
                place = seen if seen < most else int(random.integers(seen + 1))
                if place < most:
                    pick = (row, told[int(random.integers(len(told)))])
                    drawn[place : place + 1] = [pick]
                seen += 1
            row += 1
    if len(drawn) < FEWEST:
        return Queries(generic_captions(), [])
    drawn.sort()
    return Queries([caption for _, caption in drawn], [place for place, _ in drawn])


def generic_captions() -> list[str]:
    """Captions of what photos often show, in words of every day."""
    text = files("clipkit.index").joinpath("captions.txt").read_text(encoding="utf-8")
    return text.splitlines()


@cache
def nonsense() -> list[str]:
    """Strings of words that mean nothing, drawn with a fixed seed: what nothing should match."""
    random = np.random.default_rng(0)
    return [
        " ".join(
            "".join(random.choice(_SYLLABLES, random.integers(2, 5)))
            for _ in range(random.integers(1, 6))
        )
        for _ in range(NONSENSE)
    ]


Encode = Callable[[Sequence[str]], Floats]
"""Captions to unit vectors float32 [m, dim], by the model of the index."""
FILE = "questions.npy"
"""Vectors of captions beside an index, with which it can be measured again without its model."""


@dataclass(frozen=True)
class Questions:
    """Questions as vectors.

    Attributes:
        captions: float32 [m, dim].
        rows: int64 [m], for each the row of its image; empty for generic captions.
        nonsense: float32 [g, dim], what nothing should match.
        source: where the captions come from.
    """

    captions: Floats
    rows: Integers
    nonsense: Floats
    source: str


def make_questions(tables: Iterable[pa.Table], encode: Encode) -> Questions:
    """Questions for an index with these records, in row order."""
    chosen, without = choose_queries(tables), nonsense()
    vectors = encode([*chosen.captions, *without])
    rows = np.array(chosen.rows, np.int64)
    count = len(chosen.captions)
    return Questions(vectors[:count], rows, vectors[count:], chosen.source)


def keep_questions(folder: Path, captions: Floats) -> None:
    """Keep vectors of captions, float32 [m, dim], beside an index; in one step.

    They do not depend on what the index holds, so that any state of it may have any of them.
    """
    write_file(folder / FILE, lambda stream: np.save(stream, captions))


def kept_questions(folder: Path, dim: int) -> Floats | None:
    """What ``keep_questions`` kept; None where nothing was.

    Raises:
        ArtifactError: it is damaged.
    """
    file = folder / FILE
    try:
        captions: Floats = np.load(file, allow_pickle=False)
        if captions.dtype != np.float32 or captions.ndim != 2 or captions.shape[1] != dim:
            raise ValueError(f"{captions.dtype} {list(captions.shape)}, expected [m, {dim}]")
        if not len(captions) or not np.isfinite(captions).all():
            raise ValueError("no finite numbers")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}); `clipkit index calibrate {folder}` makes it anew"
        ) from None
    return captions


def write_calibration(
    path: str | Path, questions: Questions, measured: "Measured | None" = None
) -> Calibration:
    """Make an index's scores readable: its calibration is written into its manifest, in one step.

    Args:
        path: the index, of at least one image.
        questions: captions of its own images, or generic ones.
        measured: what all of them find, to be recorded, and they kept; None: leave what is.

    Raises:
        ArtifactError: no index, damaged, without vectors, or another process is writing it.
    """
    path = Path(path)
    with ArtifactWriter(path, "index", replace=True):
        index = VectorIndex.open(path)
        found = calibrate(
            questions.captions,
            questions.rows,
            questions.nonsense,
            lambda: (vectors for vectors, _ in index.shards()),
            questions.source,
        )
        manifest = read_manifest(path, "index")
        manifest.detail["calibration"] = found.to_dict()
        if measured is not None:
            keep_questions(path, questions.captions)
            manifest.detail["measured"] = measured.to_dict()
        write_json(path / MANIFEST, manifest.to_dict())
    return found
