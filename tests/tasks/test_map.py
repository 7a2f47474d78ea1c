"""Maps: the layout against brute force, names by hand, and the page's content."""

import base64
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data.labels import EVERYDAY
from clipkit.data.prompts import check_labels
from clipkit.errors import ArtifactError, DataError
from clipkit.index.projection import (
    cluster,
    name_clusters,
    neighbours,
    principal_components,
    project,
    unit_square,
)
from clipkit.index.vector_index import VectorIndex
from clipkit.reports.map import Cluster, MapPage, render_map
from clipkit.tasks.embed import embed
from clipkit.tasks.map import draw_map
from tests.helpers.toys import COLOURS, ColourEncoder

pytest.importorskip("openTSNE")
WORDS = ["red", "green", "blue"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def three_groups(rng, each=30, dim=16):
    """Vectors around three axes, and their group."""
    group = np.repeat(np.arange(3), each)
    vectors = np.eye(dim)[group] + 0.1 * rng.standard_normal((len(group), dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), group


def test_components_are_those_of_the_decomposition(rng):
    vectors = rng.standard_normal((40, 12)).astype(np.float32)
    found = principal_components(vectors, 3)
    centred = vectors - vectors.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :3] * s[:3]), atol=1e-4)


def test_neighbours_are_those_of_all_distances(rng):
    points = rng.standard_normal((50, 4)).astype(np.float32)
    points[7] = points[3]  # on the same spot
    ids, distances = neighbours(points, 6)
    every = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(every, np.inf)
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :6], atol=1e-3)
    assert not (ids == np.arange(50)[:, None]).any()
    assert 7 in ids[3]


def test_many_copies_of_a_point_are_each_others_neighbours():
    points = np.zeros((20, 4), np.float32)
    ids, distances = neighbours(points, 5)
    assert not (ids == np.arange(20)[:, None]).any()
    assert not distances.any()


def test_what_is_alike_lies_together_and_again_in_the_same_place(rng):
    vectors, group = three_groups(rng)
    places = project(vectors)
    nearest, _ = neighbours(places, 1)
    assert (group[nearest[:, 0]] == group).all()
    assert places.min() >= 0
    assert places.max() <= 1
    np.testing.assert_array_equal(places, project(vectors))


def test_the_square_keeps_proportions():
    found = unit_square(np.array([[0.0, 0.0], [4.0, 2.0]]))
    np.testing.assert_allclose(found, [[0, 0.25], [1, 0.75]])


def test_clusters_are_the_groups_largest_first(rng):
    vectors, group = three_groups(rng)
    keep = (group != 1) | (np.arange(len(group)) % 2 == 0)
    vectors, group = vectors[keep], group[keep]
    found = cluster(vectors, 3)
    assert len({(a, b) for a, b in zip(found, group, strict=True)}) == 3
    assert set(found[group == 1]) == {2}  # the smallest


def test_a_label_near_to_everything_names_nothing():
    vectors = np.array([[1, 0, 0.9], [1, 0, 1], [0, 1, 1], [0, 1, 0.9]], np.float32)
    weights = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.float32)
    clusters = np.array([0, 0, 1, 1])
    assert name_clusters(vectors, clusters, ["hub", "x", "y"], weights) == ["x", "y"]


def test_clusters_of_one_name_get_a_second():
    vectors = np.array([[1, 0.2, 0], [1, 0, 0.2], [-1, 0, 0], [-1, 0, 0]], np.float32)
    weights = np.eye(3, dtype=np.float32)
    clusters = np.array([0, 1, 2, 2])
    names = name_clusters(vectors, clusters, ["a", "b", "c"], weights)
    assert names[:2] == ["a, b", "a, c"]


def content(page):
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_point_and_no_text_ends_its_script():
    nasty = "</script><script>alert(1)</script>"
    page = MapPage(
        title=nasty,
        lead="a lead",
        places=np.array([[0, 0.5], [1, 0.25]], np.float32),
        clusters=np.array([0, 1]),
        names=[Cluster(nasty, 0, 0.5, 1), Cluster("b", 1, 0.25, 1)],
        keys=["a.jpg", nasty],
        captions=["", nasty],
        images=["../a.jpg", ""],
    )
    text = render_map(page)
    assert text.count("<script") == 2
    assert "alert(1)</script>" not in text
    data = content(text)
    assert data["keys"][1] == data["captions"][1] == data["names"][0]["name"] == nasty
    places = np.frombuffer(base64.b64decode(data["places"]), "<u2").reshape(-1, 2) / 65535
    np.testing.assert_allclose(places, page.places, atol=1e-4)
    assert np.frombuffer(base64.b64decode(data["clusters"]), "<u2").tolist() == [0, 1]


@pytest.fixture
def colours(tmp_path):
    """Thirty images of three colours, and a store of them."""
    folder = tmp_path / "pictures & more"
    folder.mkdir()
    for name in WORDS:
        for number in range(10):
            shade = tuple(max(0, value - 5 * number) for value in COLOURS[name])
            Image.new("RGB", (16, 12), shade).save(folder / f"{name} {number}.png")
    return embed(folder, tmp_path / "store", ColourEncoder())


class Toy(ColourEncoder):
    logit_scale = 100.0

    def encode_text(self, captions, policy="cut"):
        return super().encode_text(captions)


def test_a_store_and_its_index_give_a_page_and_an_image(colours, tmp_path):
    VectorIndex.build(colours, tmp_path / "index", "Flat")
    drawn = draw_map(
        colours.path, tmp_path / "out" / "map.html", labels=WORDS, encoder=Toy(), clusters=3
    )
    assert sorted(drawn.clusters) == [("blue", 10), ("green", 10), ("red", 10)]
    assert (drawn.items, drawn.total, drawn.without_image) == (30, 30, 0)
    data = content(drawn.page.read_text(encoding="utf-8"))
    at = data["keys"].index("red 3.png")
    assert data["images"][at] == "../pictures%20%26%20more/red%203.png"
    clusters = np.frombuffer(base64.b64decode(data["clusters"]), "<u2")
    assert data["names"][clusters[at]]["name"] == "red"
    with Image.open(drawn.image) as picture:
        assert picture.format == "PNG"
    again = draw_map(
        tmp_path / "index", tmp_path / "again.html", labels=WORDS, encoder=Toy(), clusters=3
    )
    assert content(again.page.read_text(encoding="utf-8"))["places"] == data["places"]


def test_images_of_a_table_are_inside_the_page(colours, tmp_path):
    folder = tmp_path / "pictures & more"
    rows = [
        {"key": file.stem, "image": {"bytes": file.read_bytes(), "path": None}}
        for file in sorted(folder.iterdir())
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    embed(tmp_path / "table.parquet", tmp_path / "of-table", ColourEncoder())
    drawn = draw_map(tmp_path / "of-table", tmp_path / "map.html", labels=(), max_items=12)
    assert (drawn.items, drawn.total, drawn.without_image) == (12, 30, 0)
    assert drawn.clusters[0][0] == "cluster 1"
    pictures = content(drawn.page.read_text(encoding="utf-8"))["images"]
    assert len(pictures) == 12
    assert all(address.startswith("data:image/jpeg;base64,") for address in pictures)


def test_images_that_are_gone_are_counted(colours, tmp_path):
    (tmp_path / "pictures & more").rename(tmp_path / "elsewhere")
    drawn = draw_map(colours, tmp_path / "map.html", labels=())
    assert drawn.without_image == 30


def test_bad_requests_get_a_sentence(colours, tmp_path):
    with pytest.raises(ArtifactError, match=r"map\.png is not an HTML file name"):
        draw_map(colours.path, tmp_path / "map.png")
    with pytest.raises(ArtifactError, match="elsewhere"):
        draw_map(tmp_path / "elsewhere", tmp_path / "map.html")
    with pytest.raises(DataError, match="cannot draw a map of 3 items, expected at least 5"):
        draw_map(colours.path, tmp_path / "map.html", max_items=3)
    assert not (tmp_path / "map.html").exists()


def test_everyday_labels_are_labels():
    check_labels(EVERYDAY)
    assert len(EVERYDAY) > 150
