"""The page of a map: a canvas of points to pan and zoom, each with its image."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cluster:
    """A cluster of a map: its name, the place of the name in [0, 1]², and its number of items."""

    name: str
    x: float
    y: float
    size: int


@dataclass(frozen=True)
class MapPage:
    """The content of the page of a map.

    Attributes:
        title: its heading.
        lead: the sentence below it.
        places: float [n, 2] in [0, 1]².
        clusters: int [n], the number of each item's cluster in ``names``.
        names: the clusters.
        keys: keys of the n items.
        captions: one caption of each, or an empty text.
        images: URL of each image relative to the page, or an empty text.
    """

    title: str
    lead: str
    places: NDArray[np.float32]
    clusters: NDArray[np.int64]
    names: Sequence[Cluster]
    keys: Sequence[str]
    captions: Sequence[str]
    images: Sequence[str]


def render_map(page: MapPage) -> str:
    """The page as one HTML file: it loads nothing but the images under the pointer."""
    style, points, script = map(_part, ("map.css", "map_points.js", "map.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(page.title)}</h1><p>{escape(page.lead)}</p></header>
<main>
<canvas id="map" tabindex="0" role="img" aria-label="Map of {len(page.keys):,} images in \
{len(page.names)} clusters, listed beside it. Arrows move it, plus and minus zoom, 0 shows all.">\
</canvas>
<aside>
<label>Find <input id="find" type="search" placeholder="in names and captions"></label>
<p id="count" role="status"></p>
<ul id="clusters"></ul>
</aside>
<figure id="card" hidden><img alt=""><figcaption></figcaption></figure>
</main>
<script type="application/json" id="data">{_data(page)}</script>
<script>{points}{script}</script>
</body>
</html>
"""


def _part(name: str) -> str:
    return files("clipkit.reports").joinpath("static", name).read_text(encoding="utf-8")


def _data(page: MapPage) -> str:
    """The points as JSON for a script element; ``<`` is escaped, so that no text can end it."""
    places = np.round(np.clip(page.places, 0, 1) * 65_535).astype("<u2")
    content = {
        "places": base64.b64encode(places.tobytes()).decode(),
        "clusters": base64.b64encode(page.clusters.astype("<u2").tobytes()).decode(),
        "names": [asdict(one) for one in page.names],
        "keys": list(page.keys),
        "captions": list(page.captions),
        "images": list(page.images),
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
