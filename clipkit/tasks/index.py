"""Make images searchable: ``clipkit index build STORE|IMAGES --out INDEX``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.data.images import Decode
from clipkit.errors import ArtifactError, ModelError
from clipkit.manifest import ArtifactWriter, is_complete, partial_path, read_manifest
from clipkit.store.embeddings import EmbeddingStore
from clipkit.store.shards import shard_numbers
from clipkit.store.spec import new_index
from clipkit.store.vector_index import VectorIndex

if TYPE_CHECKING:
    from clipkit.model.encoder import Encoder


def build_index(
    source: str | Path,
    out: str | Path,
    *,
    spec: str = "Flat",
    load: "Callable[[], Encoder] | None" = None,
    decode: Decode | None = None,
) -> VectorIndex:
    """Build an index of a store, or of images, which are embedded into ``OUT.store`` first.

    An index that stands at ``out`` is replaced, in one step when the new one is finished.

    Args:
        source: a store, or whatever ``open_source`` opens.
        out: where the index shall stand.
        spec: FAISS factory string.
        load: gives the encoder for images; not called for a store.
        decode: how images are read, as of ``embed``; of no use for a store.

    Raises:
        SpecError: the spec is malformed, or impossible for these vectors.
        ArtifactError: ``out`` is taken by something else, or the source is a damaged store.
        ModelError: images, and nothing to encode them with.
        DataError: images that cannot be opened, or too many bad ones.
    """
    out, path = Path(out), Path(source)
    if _is_ours(path) or partial_path(path).is_dir():
        store = EmbeddingStore.open(path)
    else:
        store = _embed(source, out, spec, load, decode)
    return VectorIndex.build(store, out, spec, replace=True)


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
    images = open_source(source)
    encoder = load()
    # What can be refused is refused now, not after hours of encoding.
    new_index(spec, encoder.dim, None if images.streaming else len(images.rows))
    with ArtifactWriter(out, "index", replace=True):
        pass
    return embed(images, out.with_name(f"{out.name}.store"), encoder, decode=decode)
