"""What an index is asked to tune and to calibrate it: vectors of captions, and of nonsense."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipkit.data.queries import choose_queries, nonsense
from clipkit.errors import ArtifactError
from clipkit.manifest import MANIFEST, ArtifactWriter, read_manifest, write_json
from clipkit.store.calibration import Calibration, calibrate
from clipkit.store.exact import Floats, Integers
from clipkit.store.shards import write_file
from clipkit.store.tune import Measured
from clipkit.store.vector_index import VectorIndex

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
    path: str | Path, questions: Questions, measured: Measured | None = None
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
