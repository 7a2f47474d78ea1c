"""Encode images and store their vectors: ``clipkit embed IMAGES --out STORE``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from clipkit.arguments import require_choice, require_encoder
from clipkit.artifacts import ModelRef, is_complete, partial_path
from clipkit.data.images import Decode
from clipkit.data.open_source import Data, Source, open_source
from clipkit.data.workers import worker_count
from clipkit.errors import DataError
from clipkit.models.embed_source import encoded_batches
from clipkit.store.embedding_store import EmbeddingStore, Owner, decode_of
from clipkit.store.incremental import IncrementalPass, KnownRows

if TYPE_CHECKING:
    from clipkit.models.encoder import BatchSize, Encoder


DEFAULT_DECODE: Decode = "exact"
"""Decoder of a new store.

On the 1,000 photos of the Flickr8k dev set, at 224 pixels, "fast" changes recall@1, 5 and 10 by at
most 0.1 points in both directions. With photos enlarged to 2 megapixels, text→image recall changes
by -0.22, +0.02 and +0.28, image→text recall by -0.10, +0.50 and +0.10: one of six by more than 0.3.
"""


def embed(
    images: Data,
    out: str | Path,
    encoder: "Encoder | None" = None,
    *,
    decode: Decode | None = None,
    batch_size: "BatchSize" = "auto",
    workers: int | str = "auto",
    skip_limit: float = 0.5,
) -> EmbeddingStore:
    """Encode every image of a source into a store, except images that are already stored.

    Decoding threads, the encoder and a writing thread run concurrently.

    An interrupted run continues where it stopped. An existing store of the same model is updated:
    images with the same key, size and modification time keep their vectors, and so do images with
    the same content under another name. New and changed images are encoded; deleted images are
    removed.

    Args:
        images: anything that ``open_source`` accepts, or an open source. Metadata are stored if
            the source was opened with them.
        out: directory of the store.
        encoder: the model; None loads the model of the store at ``out``, or the default model.
        decode: "exact" decodes images as open_clip does, "fast" at a reduced size; None uses the
            decoder of the store at ``out``, or "exact" for a new store.
        batch_size: images per batch; ``"auto"`` chooses it for the device.
        workers: decoding threads; ``"auto"`` is one per core.
        skip_limit: maximum fraction of unreadable images. The default is generous because a bad
            image does not affect others, and all are listed.

    Raises:
        DataError: the source cannot be opened or has no images.
        SkipLimitError: more than ``skip_limit`` of the images, or all of them, are unreadable.
        ModelMismatchError: the store at ``out``, complete or partial, uses another model.
        ModelError: the device does not have enough memory for one image.
        ArtifactError: ``out`` exists and is not a store, the store uses another decoder, or the
            disk is full.
    """
    require_encoder(encoder)
    if decode is not None:
        require_choice("decode", decode, Decode)
    source = images if isinstance(images, Source) else open_source(images, metadata=True)
    encoder = encoder or default_encoder(Path(out))
    decode = decode or cast(Decode | None, decode_of(Path(out))) or DEFAULT_DECODE
    with EmbeddingStore.create(out, encoder.model, decode=decode, replace=True) as writer:
        stored = KnownRows.of_store(writer.path, writer.owner)
        work = IncrementalPass(source, writer, [stored], skip_limit=skip_limit)
        work.run(
            partial(
                encoded_batches,
                encoder,
                batch_size=batch_size,
                workers=worker_count(workers),
                decode=decode,
            )
        )
        if not work.seen:
            raise DataError(f"{source.spec} holds no images; name a folder or table of images")
        return writer.finish(source.origin)


def stored_model(store: Path) -> ModelRef | None:
    """The model of the store at a path, finished or half-written; None if there is no store.

    Raises:
        ArtifactError: something else is there.
    """
    owner = Owner.read(partial_path(store))
    if owner is not None:
        return owner.model
    return EmbeddingStore.open(store).model if is_complete(store) else None


def default_encoder(store: Path) -> "Encoder":
    """The encoder of the store at a path, complete or partial, or the default model."""
    from clipkit.models.loading import load_model, load_model_ref

    model = stored_model(store)
    return load_model() if model is None else load_model_ref(model, f"the store {store}")
