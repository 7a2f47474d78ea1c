"""Draw a map of a collection: ``clipkit map INDEX|STORE --out map.html``."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.artifacts import Manifest, read_manifest, write_text
from clipkit.data.labels import EVERYDAY
from clipkit.data.open_source import open_source, row_image
from clipkit.display.html import data_uri
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import ArtifactError, DataError, ImageError
from clipkit.index.projection import cluster, lay_out, name_clusters, require_enough
from clipkit.index.roots import file_of, roots_of
from clipkit.index.vector_index import VectorIndex
from clipkit.reports import plots
from clipkit.reports.map import Cluster, MapPage, render_map
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.store.shards import Vectors

if TYPE_CHECKING:
    from clipkit.artifacts import ModelRef
    from clipkit.models.encoder import Encoder


MOST = 50_000
"""Items drawn, at most: what a browser moves smoothly and a person can overlook."""
MOST_CLUSTERS = 24
EMBEDDED = 5_000
"""Pictures inside a page, at most: about 4 kB each."""


@dataclass(frozen=True)
class MapSummary:
    """What was drawn.

    Attributes:
        page: the HTML file.
        picture: the PNG beside it.
        drawn: how many items.
        of: how many there are.
        unpictured: how many of those drawn show no picture, as it is in no file or gone.
        clusters: name and size of each, the largest first.
    """

    page: Path
    picture: Path
    drawn: int
    of: int
    unpictured: int
    clusters: list[tuple[str, int]]

    def _repr_png_(self) -> bytes:
        return self.picture.read_bytes()


def draw_map(
    collection: str | Path,
    out: str | Path,
    *,
    labels: Sequence[str] = EVERYDAY,
    load: "Callable[[ModelRef], Encoder] | None" = None,
    clusters: int = 0,
    most: int = MOST,
) -> MapSummary:
    """Lay a store or an index out on a plane, name its clusters, write a page and a picture.

    Args:
        collection: directory of a store or an index.
        out: the HTML file; a PNG of the same name is written beside it.
        labels: what a cluster may be called.
        load: gives the collection's model, for the names; None: clusters are numbered.
        clusters: how many; 0: about the root of half the items, at most 24.
        most: items drawn; of more, so many are chosen evenly.

    Raises:
        ArtifactError: no store or index there, or ``out`` is no name for a page.
        DataError: there are too few items.
        MissingExtraError: the package openTSNE is not installed.
        ModelError: the collection's model cannot be loaded.
    """
    out = Path(out)
    if out.suffix.lower() != ".html" or out.is_dir():
        raise ArtifactError(f"{out} is no name for a page, expected FILE.html")
    manifest, vectors, records = _sample(Path(collection), most)
    places = lay_out(vectors)
    wanted = clusters or min(MOST_CLUSTERS, max(2, round(math.sqrt(len(vectors) / 2))))
    found = cluster(vectors, min(wanted, len(vectors)))
    names = _names(vectors, found, labels, load, manifest)
    groups = [
        Cluster(name, *_middle(places[found == number]), int((found == number).sum()))
        for number, name in enumerate(names)
    ]
    keys = records["key"].to_pylist()
    pictures = _linked(manifest, keys, out)
    if not any(pictures):
        pictures = _embedded(manifest, keys)
    page = MapPage(
        title=Path(collection).resolve().name,
        lead=_lead(manifest, len(vectors), bool(load)),
        places=places,
        clusters=found,
        names=groups,
        keys=keys,
        captions=[(texts or [""])[0] for texts in records["captions"].to_pylist()],
        pictures=pictures,
    )
    picture = out.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    named = [(group.name, group.x, group.y) for group in groups]
    plots.plot_map(places, found, named, page.title).save(picture)
    write_text(out, render_map(page))
    sizes = [(g.name, g.size) for g in groups]
    return MapSummary(out, picture, len(vectors), manifest.count, pictures.count(""), sizes)


def _sample(path: Path, most: int) -> tuple[Manifest, Vectors, pa.Table]:
    """The manifest, and at most so many vectors and records, chosen evenly."""
    manifest = read_manifest(path)
    opened: EmbeddingStore | VectorIndex
    if manifest.kind == "store":
        opened = EmbeddingStore.open(path)
    elif manifest.kind == "index":
        opened = VectorIndex.open(path)
    else:
        raise ArtifactError(f"{path} is a {manifest.kind}, expected a store or an index")
    require_enough(len(opened))
    chosen = np.arange(len(opened))
    if len(opened) > most:
        chosen = np.sort(np.random.default_rng(0).choice(len(opened), most, replace=False))
    vectors = np.empty((len(chosen), opened.dim), np.float32)
    tables, start, filled = [], 0, 0
    for part, table in opened.shards():
        rows = chosen[(chosen >= start) & (chosen < start + len(part))] - start
        vectors[filled : filled + len(rows)] = part[rows]
        tables.append(table.select(["key", "captions"]).take(pa.array(rows)))
        start, filled = start + len(part), filled + len(rows)
    return manifest, vectors, pa.concat_tables(tables)


def _names(
    vectors: Vectors,
    found: NDArray[np.int64],
    labels: Sequence[str],
    load: "Callable[[ModelRef], Encoder] | None",
    manifest: Manifest,
) -> list[str]:
    if load is None:
        return [f"cluster {number + 1}" for number in range(int(found.max()) + 1)]
    from clipkit.classifiers.zero_shot import ZeroShotClassifier

    classifier = ZeroShotClassifier.from_labels(load(manifest.require_model()), list(labels))
    return name_clusters(vectors, found, classifier.labels, classifier.weights)


def _middle(places: NDArray[np.float32]) -> tuple[float, float]:
    """Where a cluster's name goes: on its item nearest to the middle, never into a void."""
    middle = np.median(places, axis=0)
    x, y = places[np.argmin(np.square(places - middle).sum(axis=1))]
    return float(x), float(y)


def _lead(manifest: Manifest, drawn: int, named: bool) -> str:
    whole = f"{drawn:,} images" if drawn == manifest.count else f"{drawn:,} of {manifest.count:,}"
    # A page may be shown to others, whom the place of a model on this machine is nothing to.
    model = "/".join(str(manifest.require_model()).split("/")[-2:])
    how = "named zero-shot by the same model" if named else "numbered by size"
    return (
        f"{whole}, as {model} sees them: what is alike lies together (t-SNE of "
        f"the first principal components), and colours are clusters (k-means), {how}."
    )


def _linked(manifest: Manifest, keys: Sequence[str], out: Path) -> list[str]:
    """Addresses of picture files relative to the page; empty where there is no file."""
    roots, folder = roots_of(manifest), out.resolve().parent
    files = [file_of(roots, key) for key in keys]
    return [quote(Path(os.path.relpath(file, folder)).as_posix()) if file else "" for file in files]


def _embedded(manifest: Manifest, keys: Sequence[str]) -> list[str]:
    """Small pictures inside the page, for those of a table or tar; empty beyond ``EMBEDDED``."""
    step = -(-len(keys) // EMBEDDED)
    found = dict.fromkeys(keys[::step], "")
    # The source may have moved since, and a bad picture harms no other.
    with suppress(DataError):
        for row in open_source(manifest.source.get("spec", ""), caption="", label="").rows:
            if row["key"] in found:
                with suppress(ImageError):
                    found[row["key"]] = data_uri(thumbnail(row_image(row)))
    return [found.get(key, "") for key in keys]
