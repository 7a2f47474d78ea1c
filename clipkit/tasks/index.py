"""Make images searchable: ``clipkit index build STORE|IMAGES --out INDEX``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.data.images import Decode
from clipkit.errors import ArtifactError, ModelError
from clipkit.manifest import ArtifactWriter, is_complete, partial_path, read_manifest
from clipkit.store.auto import build_tuned
from clipkit.store.embeddings import EmbeddingStore
from clipkit.store.questions import make_questions, write_calibration
from clipkit.store.shards import shard_numbers
from clipkit.store.spec import new_index
from clipkit.store.tune import AUTO, Wish
from clipkit.store.vector_index import VectorIndex

if TYPE_CHECKING:
    from clipkit.manifest import ModelRef
    from clipkit.model.encoder import Encoder
    from clipkit.model.query import QueryEncoder

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
    questions = make_questions(tables, load_text(store.model).encode_captions)
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
    from clipkit.data.sources import open_source
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
