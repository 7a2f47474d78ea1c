"""Draw a map of a collection: ``clipkit map INDEX|STORE``."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.arguments import require_encoder
from clipkit.artifacts import Manifest, read_manifest, write_text
from clipkit.data.labels import EVERYDAY, Label
from clipkit.data.open_source import open_source
from clipkit.display.html import data_uri
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import ArtifactError, DataError, ImageError
from clipkit.index.projection import cluster, name_clusters, project, require_enough
from clipkit.index.roots import file_of, roots_of
from clipkit.index.vector_index import VectorIndex
from clipkit.reports.map import Cluster, MapPage, render_map
from clipkit.reports.plots import plot_map
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.store.shards import Vectors

if TYPE_CHECKING:
    from clipkit.models.encoder import Encoder


MAX_ITEMS = 50_000
"""Default number of items of a map, limited to what a browser renders smoothly."""
MAX_CLUSTERS = 24
MAX_EMBEDDED = 5_000
"""Maximum number of thumbnails embedded in a page, about 4 kB each."""


@dataclass(frozen=True)
class MapSummary:
    """A drawn map; a notebook shows its image.

    Attributes:
        page: the HTML file.
        image: the PNG beside it.
        items: number of items on the map.
        total: number of items in the collection.
        without_image: number of items on the map whose image file is missing.
        clusters: name and size of each, the largest first.
    """

    page: Path
    image: Path
    items: int
    total: int
    without_image: int
    clusters: list[tuple[str, int]]

    def _repr_png_(self) -> bytes:
        return self.image.read_bytes()


def draw_map(
    collection: "str | Path | VectorIndex | EmbeddingStore",
    out: str | Path = "map.html",
    *,
    labels: Sequence[str | Label] = EVERYDAY,
    encoder: "Encoder | None" = None,
    clusters: int = 0,
    max_items: int = MAX_ITEMS,
) -> MapSummary:
    """Draw an interactive map of a store or an index: a t-SNE projection with named clusters.

    Args:
        collection: a store or an index, or its directory.
        out: the HTML file; a PNG of the same name is written beside it.
        labels: candidate names of the clusters, chosen zero-shot; empty: clusters are numbered.
        encoder: the collection's model, which names the clusters; None loads the model that the
            manifest names. Clusters of external vectors are numbered if it is None.
        clusters: number of clusters; 0: about the square root of half the items, at most 24.
        max_items: maximum number of items; a larger collection is sampled randomly.

    Raises:
        ArtifactError: ``collection`` is not a store or an index, or ``out`` is not an HTML file.
        DataError: there are too few items.
        MissingExtraError: the package openTSNE is not installed.
        ModelError: the collection's model cannot be loaded.
        ModelMismatchError: ``encoder`` is another model.
    """
    out = Path(out)
    if out.suffix.lower() != ".html" or out.is_dir():
        raise ArtifactError(f"{out} is not an HTML file name, expected FILE.html")
    opened = _open(collection)
    require_enough(min(len(opened), max_items))
    vectors, records = _sample(opened, max_items)
    points = project(vectors)
    wanted = clusters or min(MAX_CLUSTERS, max(2, round(math.sqrt(len(vectors) / 2))))
    assigned = cluster(vectors, min(wanted, len(vectors)))
    manifest = opened.manifest
    encoder = _encoder(opened, encoder) if labels else None
    names = _names(vectors, assigned, labels, encoder)
    groups = [
        Cluster(name, *_middle(points[assigned == number]), int((assigned == number).sum()))
        for number, name in enumerate(names)
    ]
    keys = records["key"].to_pylist()
    images = _linked(manifest, keys, out)
    if not any(images):
        images = _embedded(manifest, keys)
    page = MapPage(
        title=opened.path.resolve().name,
        lead=_lead(manifest, len(vectors), encoder is not None),
        places=points,
        clusters=assigned,
        names=groups,
        keys=keys,
        captions=[(texts or [""])[0] for texts in records["captions"].to_pylist()],
        images=images,
    )
    image = out.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    named = [(group.name, group.x, group.y) for group in groups]
    plot_map(points, assigned, named, page.title).save(image)
    write_text(out, render_map(page))
    sizes = [(g.name, g.size) for g in groups]
    return MapSummary(out, image, len(vectors), manifest.count, images.count(""), sizes)


def _open(
    collection: "str | Path | VectorIndex | EmbeddingStore",
) -> VectorIndex | EmbeddingStore:
    if not isinstance(collection, str | Path):
        return collection
    kind = read_manifest(Path(collection)).kind
    if kind == "store":
        return EmbeddingStore.open(collection)
    if kind == "index":
        return VectorIndex.open(collection)
    raise ArtifactError(f"{collection} is a {kind}, expected a store or an index")


def _sample(opened: VectorIndex | EmbeddingStore, max_items: int) -> tuple[Vectors, pa.Table]:
    """Vectors and records of at most ``max_items`` random items, in the collection's order."""
    chosen = np.arange(len(opened))
    if len(opened) > max_items:
        chosen = np.sort(np.random.default_rng(0).choice(len(opened), max_items, replace=False))
    vectors = np.empty((len(chosen), opened.dim), np.float32)
    tables, start, filled = [], 0, 0
    for part, table in opened.shards():
        rows = chosen[(chosen >= start) & (chosen < start + len(part))] - start
        vectors[filled : filled + len(rows)] = part[rows]
        tables.append(table.select(["key", "captions"]).take(pa.array(rows)))
        start, filled = start + len(part), filled + len(rows)
    return vectors, pa.concat_tables(tables)


def _encoder(opened: VectorIndex | EmbeddingStore, encoder: "Encoder | None") -> "Encoder | None":
    """The encoder that names the clusters; None for external vectors if none is given."""
    require_encoder(encoder)
    if encoder is None:
        if opened.model.external:
            return None
        if isinstance(opened, VectorIndex):
            return opened.image_encoder
        from clipkit.models.loading import load_model_ref

        return load_model_ref(opened.model, str(opened.path))
    if not opened.model.external:
        opened.model.require(
            encoder.model, what=str(opened.path), repair="name the clusters with its own model"
        )
    return encoder


def _names(
    vectors: Vectors,
    assigned: NDArray[np.int64],
    labels: Sequence[str | Label],
    encoder: "Encoder | None",
) -> list[str]:
    if encoder is None:
        return [f"cluster {number + 1}" for number in range(int(assigned.max()) + 1)]
    from clipkit.classifiers.zero_shot import ZeroShotClassifier

    classifier = ZeroShotClassifier.from_labels(encoder, labels)
    names = [str(label) for label in classifier.labels]
    return name_clusters(vectors, assigned, names, classifier.weights)


def _middle(points: NDArray[np.float32]) -> tuple[float, float]:
    """Position of a cluster's name: the item nearest to the median, never an empty spot."""
    middle = np.median(points, axis=0)
    x, y = points[np.argmin(np.square(points - middle).sum(axis=1))]
    return float(x), float(y)


def _lead(manifest: Manifest, items: int, named: bool) -> str:
    count = f"{items:,} images" if items == manifest.count else f"{items:,} of {manifest.count:,}"
    ref = manifest.require_model()
    # Only the end of a path: the page may be published.
    model = "" if ref.external else f", embedded with {'/'.join(str(ref).split('/')[-2:])}"
    how = "named zero-shot by the same model" if named else "numbered by size"
    return (
        f"{count}{model}: similar images are close together (t-SNE of the first principal "
        f"components), and colours are clusters (k-means), {how}."
    )


def _linked(manifest: Manifest, keys: Sequence[str], out: Path) -> list[str]:
    """URLs of image files relative to the page; empty strings for missing files."""
    roots, folder = roots_of(manifest), out.resolve().parent
    files = [file_of(roots, key) for key in keys]
    return [quote(Path(os.path.relpath(file, folder)).as_posix()) if file else "" for file in files]


def _embedded(manifest: Manifest, keys: Sequence[str]) -> list[str]:
    """Thumbnails as data URIs, for images in a table or tar; empty beyond ``MAX_EMBEDDED``."""
    step = -(-len(keys) // MAX_EMBEDDED)
    found = dict.fromkeys(keys[::step], "")
    # The source may have been deleted, and a damaged image must not affect the others.
    if "spec" not in manifest.source:  # vectors from outside have no images
        return [""] * len(keys)
    with suppress(DataError):
        for row in open_source(manifest.source["spec"], caption="", label="").rows:
            if row.key in found:
                with suppress(ImageError):
                    found[row.key] = data_uri(thumbnail(row.read_image()))
    return [found.get(key, "") for key in keys]
