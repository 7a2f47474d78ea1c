"""Search images by caption, by image, or by both: ``clipkit search INDEX "a red bicycle"``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import write_text
from clipkit.data.images import Decode, Reduction, read_image
from clipkit.display.html import document
from clipkit.errors import CaptionError, DataError, ImageError, ModelError
from clipkit.index.filters import rows_where
from clipkit.index.hits import MINUS, Hits, combined, vector_of, weighted
from clipkit.index.hits import distinct as distinct_hits
from clipkit.index.roots import roots_of
from clipkit.index.vector_index import Hit, VectorIndex

if TYPE_CHECKING:
    from PIL import Image

    from clipkit.data.transforms import Preprocess
    from clipkit.models.encoder import Encoder
    from clipkit.models.text_encoder_numpy import QueryEncoder


if TYPE_CHECKING:
    Picture: TypeAlias = str | Path | Image.Image


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
        found = self.index.search(np.asarray(vector)[None], k)[0]
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
        image: "Picture | tuple[Picture, float] | None" = None,
        k: int = 10,
        where: str | None = None,
        *,
        minus: Sequence[str] = (),
        like: Sequence[str] = (),
        distinct: bool = False,
    ) -> Hits:
        """The ``k`` items nearest to a caption, an image, or several of these together.

        Queries add up as unit vectors, and the sum is normalised again. Hits of a caption alone
        have a probability where the index is calibrated.

        Args:
            caption: in words.
            image: a picture or its path, or a pair of it and its weight; 1 if left out.
            k: how many.
            where: a condition on the records that all hits fulfil, such as
                ``"year >= 2023 and folder = 'holiday'"``.
            minus: words that are not wanted; each is taken away with the weight ``MINUS``, or
                with its own: ``"people:0.8"``.
            like: keys of the index, which are not among the hits.
            distinct: leave out near-duplicates of better hits.

        Raises:
            CaptionError: a blank caption.
            ImageError: the image cannot be read.
            DataError: nothing is given, a key is not there, it all cancels itself out, or
                ``where`` is no condition on columns of the index.
            ModelError: there is no encoder.
        """
        chosen = None if where is None else rows_where(self.index, where)
        words = [caption or ""]
        vectors = [] if caption is None else self._captions([caption])
        if image is not None:
            picture, weight = image if isinstance(image, tuple) else (image, 1.0)
            vectors.append(np.float32(weight) * self._encode(picture))
            words.append(f"like {picture}" if isinstance(picture, str | Path) else "like a picture")
        vectors += [vector_of(self.index, key) for key in like]
        words += [f"like {key}" for key in like]
        terms = [weighted(text, MINUS) for text in minus]
        if terms:
            unwanted = self._captions([text for text, _ in terms])
            vectors += [
                np.float32(-weight) * vector
                for (_, weight), vector in zip(terms, unwanted, strict=True)
            ]
            words += [f"without {text}" for text, _ in terms]
        if not vectors:
            raise DataError("there is nothing to search for, expected a caption, an image or both")
        vector = combined(vectors)
        found = self._found(vector, k, chosen, set(like), distinct)
        hits = Hits(found, ", ".join(filter(None, words)), roots_of(self.index.manifest))
        # An image scores far above any caption: its scores would all be certainties.
        return self._with_probabilities(hits, vector) if len(words) == 1 else hits

    def _captions(self, captions: list[str]) -> list[NDArray[np.float32]]:
        if not all(caption.strip() for caption in captions):
            raise CaptionError("the caption is empty, expected words to search for")
        return list(self._encoder().encode_text(captions))

    def _found(
        self,
        vector: NDArray[np.float32],
        k: int,
        chosen: NDArray[np.bool_] | None,
        known: set[str],
        apart: bool,
    ) -> list[Hit]:
        """The best hits that are not known, and if wished no near-duplicates of each other."""
        asked = k + len(known)
        while True:
            hits = self.index.search(vector[None], asked, chosen)[0]
            kept = [hit for hit in hits if hit.key not in known]
            kept = distinct_hits(self.index, kept) if apart else kept
            if len(kept) >= k or len(hits) < asked:
                return kept[:k]
            asked *= 2

    def _with_probabilities(self, hits: Hits, vector: NDArray[np.float32]) -> Hits:
        """The hits of a caption with their probabilities, where the index can tell them."""
        calibration = self.index.calibration
        scores = np.array([hit.score for hit in hits], np.float32)
        chances = calibration.probabilities(vector, scores) if calibration else None
        if chances is not None:
            told = zip(hits, chances.tolist(), strict=True)
            hits[:] = [replace(hit, probability=chance) for hit, chance in told]
        return hits

    def _encode(self, image: "Picture") -> NDArray[np.float32]:
        """The vector of an image, float32 [dim], read as those of the index were."""
        from clipkit.data.transforms import as_batch

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


def write_page(found: Sequence[Hits], file: Path) -> None:
    """Write a page of thumbnails of the hits of one or several searches, as one HTML file."""
    body = "".join(hits._repr_html_() for hits in found)
    lead = f"{len(found)} {'search' if len(found) == 1 else 'searches'}"
    write_text(file, document("What was found", lead, body, "Made by clipkit search."))
