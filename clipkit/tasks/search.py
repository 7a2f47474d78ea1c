"""Search images by caption, by image, or by both: ``clipkit search INDEX "a red bicycle"``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from clipkit.data.images import Decode, Reduction, read_image
from clipkit.errors import CaptionError, DataError, ImageError, ModelError
from clipkit.store.hits import Hits
from clipkit.store.query import combined
from clipkit.store.roots import roots_of
from clipkit.store.vector_index import VectorIndex
from clipkit.store.where import rows_where

if TYPE_CHECKING:
    from PIL import Image

    from clipkit.data.preprocess import Preprocess
    from clipkit.model.encoder import Encoder
    from clipkit.model.query import QueryEncoder


class Searcher:
    """Answers queries from an index, best first.

    Args:
        index: what is searched.
        encoder: the model that made it, for captions and images; a ready vector needs none.

    Raises:
        ModelMismatchError: ``encoder`` is another model than the index's.
    """

    def __init__(self, index: VectorIndex, encoder: "Encoder | QueryEncoder | None" = None) -> None:
        if encoder is not None:
            index.model.require(
                encoder.model,
                what=f"the index {index.path}",
                repair="search with its own model, or make it anew with "
                "`clipkit index build IMAGES --out INDEX --model MODEL`",
            )
        self.index, self.encoder = index, encoder

    def by_vector(self, vector: NDArray[np.float32], k: int = 10, query: str = "") -> Hits:
        """The ``k`` items nearest to a vector, float32 [dim]; ``query`` says it in words."""
        return self._nearest(vector, k, query, None)

    def _nearest(
        self, vector: NDArray[np.float32], k: int, query: str, chosen: NDArray[np.bool_] | None
    ) -> Hits:
        found = self.index.search(np.asarray(vector)[None], k, chosen)[0]
        return Hits(found, query, roots_of(self.index.manifest))

    def by_caption(self, caption: str, k: int = 10) -> Hits:
        """The ``k`` items that fit a caption best; raises CaptionError for a blank one."""
        return self.search(caption=caption, k=k)

    def by_image(self, image: "str | Path | Image.Image", k: int = 10) -> Hits:
        """The ``k`` items most like an image; raises ImageError where it cannot be read."""
        return self.search(image=image, k=k)

    def search(
        self,
        caption: str | None = None,
        image: "str | Path | Image.Image | None" = None,
        k: int = 10,
        where: str | None = None,
    ) -> Hits:
        """The ``k`` items nearest to a caption, an image, or both together.

        Two queries add up as unit vectors, and the sum is normalised again. Hits of a caption
        alone have a probability where the index is calibrated. ``where`` is a condition on the
        records that all hits fulfil, such as ``"year >= 2023 and folder = 'holiday'"``.

        Raises:
            CaptionError: a blank caption.
            ImageError: the image cannot be read.
            DataError: neither is given, the two cancel each other out, or ``where`` is no
                condition on columns of the index.
            ModelError: there is no encoder.
        """
        chosen = None if where is None else rows_where(self.index, where)
        vectors = []
        if caption is not None:
            if not caption.strip():
                raise CaptionError("the caption is empty, expected words to search for")
            vectors.append(self._encoder().encode_captions([caption])[0])
        if image is not None:
            vectors.append(self._encode(image))
        if not vectors:
            raise DataError("there is nothing to search for, expected a caption, an image or both")
        like = f"like {image}" if isinstance(image, str | Path) else "like a picture"
        words = [caption or "", like if image is not None else ""]
        vector = combined(vectors)
        hits = self._nearest(vector, k, ", ".join(filter(None, words)), chosen)
        # An image scores far above any caption: its scores would all be certainties.
        return hits if image is not None else self._with_probabilities(hits, vector)

    def _with_probabilities(self, hits: Hits, vector: NDArray[np.float32]) -> Hits:
        """The hits of a caption with their probabilities, where the index can tell them."""
        calibration = self.index.calibration
        scores = np.array([hit.score for hit in hits], np.float32)
        chances = calibration.probabilities(vector, scores) if calibration else None
        if chances is not None:
            told = zip(hits, chances.tolist(), strict=True)
            hits[:] = [replace(hit, probability=chance) for hit, chance in told]
        return hits

    def _encode(self, image: "str | Path | Image.Image") -> NDArray[np.float32]:
        """The vector of an image, float32 [dim], read as those of the index were."""
        from clipkit.data.preprocess import as_batch

        encoder, decode = self._encoder(), cast(Decode, self.index.decode)
        preprocess: Preprocess = encoder.preprocess
        if isinstance(image, str | Path):
            image = _read(image, preprocess.reduction(decode))
        pixels = preprocess.pixels(image, decode)
        vector: NDArray[np.float32] = encoder.encode_images(as_batch([pixels]))[0]
        return vector

    def _encoder(self) -> "Encoder | QueryEncoder":
        if self.encoder is None:
            raise ModelError(
                f"captions and images are encoded by {self.index.model}, which is not loaded; "
                "give Searcher its encoder, or search with a vector"
            )
        return self.encoder


def _read(path: str | Path, reduction: Reduction | None) -> "Image.Image":
    try:
        return read_image(Path(path), reduction)
    except ImageError as error:
        raise ImageError(f"{path} cannot be searched with, it {error}") from None
