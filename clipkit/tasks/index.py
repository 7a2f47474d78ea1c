"""Look after an index: ``clipkit index remove`` and ``clipkit index compact``.

Make images searchable: ``clipkit index build STORE|IMAGES --out INDEX``.

Measure an index with captions: ``clipkit index calibrate``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.artifacts import ArtifactWriter, ModelRef, is_complete, partial_path, read_manifest
from clipkit.data.images import Decode
from clipkit.errors import ArtifactError, ModelError
from clipkit.index.calibration import Calibration
from clipkit.index.faiss_factory import new_index
from clipkit.index.sample_queries import make_questions, write_calibration
from clipkit.index.tuning import AUTO, Measured, Wish, build_tuned, remeasure
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.store.shards import shard_numbers

if TYPE_CHECKING:
    from clipkit.models.encoder import Encoder
    from clipkit.models.text_encoder_numpy import QueryEncoder


def remove_items(index: str | Path, names: Sequence[str]) -> list[str]:
    """Take images out of an index, all of them or none.

    Args:
        index: the index.
        names: keys, or patterns such as ``holiday/*``, in which ``*`` also stands for slashes.

    Returns:
        The keys that were removed, in the index's order.

    Raises:
        ArtifactError: a key is not held, a pattern fits none, or another process is writing.
    """
    with IndexWriter(index) as writer:
        keys = writer.index.keys
        held, chosen = set(keys), set()
        for name in names:
            if name in held or not any(sign in name for sign in "*?["):
                chosen.add(name)
                continue
            fitting = {key for key in keys if fnmatchcase(key, name)}
            if not fitting:
                raise ArtifactError(
                    f"no key of {index} fits the pattern {name!r}, nothing is removed; `clipkit "
                    "search INDEX` shows keys as they are"
                )
            chosen |= fitting
        writer.remove(sorted(chosen))
        writer.commit()
    return [key for key in keys if key in chosen]


def compact_index(index: str | Path) -> VectorIndex:
    """Build an index anew of what it holds: trained on that, in one piece, without removed rows.

    Raises:
        ArtifactError: damaged, another process is writing, or the disk is full.
        SpecError: too few images are left to train its spec on.
    """
    with IndexWriter(index) as writer:
        return writer.commit(compact=True)


if TYPE_CHECKING:
    Captions = Encoder | QueryEncoder


WISH = Wish()


def build_index(
    source: str | Path,
    out: str | Path,
    *,
    spec: str = "Flat",
    wish: Wish = WISH,
    load: "Callable[[], Encoder] | None" = None,
    decode: Decode | None = None,
    load_text: "Callable[[ModelRef], Captions] | None" = None,
) -> VectorIndex:
    """Build an index of a store, or of images, which are embedded into ``OUT.store`` first.

    An index that stands at ``out`` is replaced, in one step when the new one is finished.

    Args:
        source: a store, or whatever ``open_source`` opens.
        out: where the index shall stand.
        spec: FAISS factory string; ``"auto"`` chooses one, and how it is searched, by what captions
            find.
        wish: what ``"auto"`` is to reach.
        load: gives the encoder for images; not called for a store.
        decode: how images are read, as of ``embed``; of no use for a store.
        load_text: gives the encoder of a model's captions; called for ``"auto"``.

    Raises:
        SpecError: the spec is malformed, impossible for these vectors, or too large for the memory.
        ArtifactError: ``out`` is taken by something else, or the source is a damaged store.
        ModelError: images or captions, and nothing to encode them with.
        DataError: images that cannot be opened, or too many bad ones.
    """
    out, path = Path(out), Path(source)
    if _is_ours(path) or partial_path(path).is_dir():
        store = EmbeddingStore.open(path)
    else:
        store = _embed(source, out, spec, load, decode)
    if spec == AUTO and not len(store):
        spec = "Flat"  # there is nothing to choose by
    if spec != AUTO:
        return VectorIndex.build(store, out, spec, replace=True)
    if load_text is None:
        raise ModelError(
            f"the spec {AUTO!r} is chosen by what captions find, and nothing is there to encode "
            f"them; give load_text an encoder of {store.model}, or name a spec such as Flat"
        )
    tables = (table for _, table in store.shards())
    questions = make_questions(tables, load_text(store.model).encode_text)
    build_tuned(store, out, questions, wish, replace=True)
    write_calibration(out, questions)
    return VectorIndex.open(out)


def _is_ours(path: Path) -> bool:
    """Whether a directory is clipkit's: other programs leave a manifest.json beside photos too."""
    try:
        read_manifest(path)
    except ArtifactError:
        return is_complete(path) and bool(shard_numbers(path))
    return True


def _embed(
    source: str | Path,
    out: Path,
    spec: str,
    load: "Callable[[], Encoder] | None",
    decode: Decode | None,
) -> EmbeddingStore:
    # Here, because indexing a store needs neither torch nor datasets.
    from clipkit.data.open_source import open_source
    from clipkit.tasks.embed import embed

    if load is None:
        raise ModelError(
            f"{source} is no clipkit store, and embedding its images takes a model; name one "
            "with --model, or `clipkit embed` them first"
        )
    images = open_source(source, metadata=True)
    encoder = load()
    # What can be refused is refused now, not after hours of encoding.
    if spec != AUTO:
        new_index(spec, encoder.dim, None if images.streaming else len(images.rows))
    with ArtifactWriter(out, "index", replace=True):
        pass
    return embed(images, out.with_name(f"{out.name}.store"), encoder, decode=decode)


@dataclass(frozen=True)
class Calibrated:
    """What captions told of an index.

    Attributes:
        measured: what they find, against exact search.
        calibration: how its scores become probabilities.
    """

    measured: Measured
    calibration: Calibration

    @property
    def source(self) -> str:
        """Where the captions come from."""
        return self.calibration.source

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        told = {name: getattr(self.calibration, name) for name in ("auroc", "error", "captions")}
        return {**self.measured.to_dict(), **told, "source": self.source}


def calibrate_index(
    path: str | Path, load_text: "Callable[[ModelRef, str], Encoder | QueryEncoder]"
) -> Calibrated:
    """Measure what captions find in an index, and write how its scores are to be read into it.

    Args:
        path: the index.
        load_text: gives the encoder of a model's captions; told which model, and of what.

    Raises:
        ArtifactError: no index, damaged, empty, or another process is writing it.
        ModelError: its model is out of reach.
    """
    index = VectorIndex.open(path)
    if not len(index):
        raise ArtifactError(f"{path} is empty, expected images to measure scores of; add some")
    encode = load_text(index.model, f"the index {path}").encode_text
    questions = make_questions((table for _, table in index.shards()), encode)
    measured = remeasure(index, questions.captions)
    return Calibrated(measured, write_calibration(path, questions, measured))
