"""Search images by text, by image, or by both: ``clipkit search INDEX "a red bicycle"``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clipkit.artifacts import write_text
from clipkit.display.html import document
from clipkit.index.hits import Hits
from clipkit.index.vector_index import MINUS_WEIGHT, ImageQuery, Query, VectorIndex

if TYPE_CHECKING:
    from clipkit.models.encoder import Encoder


def search(
    index: str | Path | VectorIndex,
    query: Query | Sequence[Query] | None = None,
    k: int = 10,
    *,
    where: str | None = None,
    image: ImageQuery | None = None,
    like: str | Sequence[str] = (),
    minus: str | Sequence[str] = (),
    minus_weight: float = MINUS_WEIGHT,
    image_weight: float = 1.0,
    distinct: bool = False,
    encoder: "Encoder | None" = None,
) -> Any:
    """Search an index once; ``open_index(index).search(...)`` is faster for several searches.

    Args:
        index: an open index, or its directory.
        query: text, image or vector, or a list of these, as of ``VectorIndex.search``.
        k: how many hits.
        where: a condition that all hits fulfil.
        image: an image, or its path, that is added to the query.
        like: keys of the index that are added to the query.
        minus: texts that are subtracted from the query.
        minus_weight: weight of each text in ``minus``.
        image_weight: weight of ``image``.
        distinct: leave out near-duplicates of better hits.
        encoder: the index's model; None loads it.

    Returns:
        ``Hits`` of one query; a list of ``Hits`` for several.

    Raises:
        ArtifactError: ``index`` is not an index.
        ModelMismatchError: ``encoder`` is another model than the index's.
        ClipkitError: as of ``VectorIndex.search``.
    """
    if not isinstance(index, VectorIndex):
        index = VectorIndex.open(index)
    if encoder is not None:
        index = index.with_encoder(encoder)
    return index.search(
        cast(Any, query),
        k,
        where=where,
        image=image,
        like=like,
        minus=minus,
        minus_weight=minus_weight,
        image_weight=image_weight,
        distinct=distinct,
    )


def write_page(found: Sequence[Hits], file: Path) -> None:
    """Write the hits of one or several searches as an HTML file with thumbnails."""
    body = "".join(hits._repr_html_() for hits in found)
    lead = f"{len(found)} {'search' if len(found) == 1 else 'searches'}"
    write_text(file, document("Search results", lead, body, "Made by clipkit search."))
