"""What objects show of themselves in a notebook, and the drawings of one call."""

import io

import numpy as np
import pytest
from PIL import Image

import clipkit
from clipkit.classifiers.predictions import LabelScore, Prediction, Predictions
from clipkit.config import parse_config
from clipkit.data.open_source import open_source
from clipkit.data.rows import StoredImage
from clipkit.errors import DataError
from clipkit.index.hits import Hit, Hits
from clipkit.index.roots import Root, file_of
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from tests.helpers.models import tiny_model
from tests.helpers.toys import ColourEncoder, square

HUB = [Root("", "org/name", False)]
NASTY = "<img src=x onerror=alert(1)>"


def size_of(png):
    with Image.open(io.BytesIO(png)) as image:
        return image.size


@pytest.fixture
def searcher(colour_folder, tmp_path):
    encoder = ColourEncoder()
    embed(colour_folder, tmp_path / "store", encoder)
    return build_index(tmp_path / "store", tmp_path / "index", encoder)


def test_hits_show_their_images(searcher, colour_folder):
    hits = searcher.search("red", k=4)
    page = hits._repr_html_()
    assert page.count("data:image/jpeg;base64,") == 4
    assert "“red”" in page
    assert all(hit.key in page and f"{hit.score:.3f}" in page for hit in hits)
    assert list(hits) == list(hits.items)
    (colour_folder / hits[0].key).unlink()
    assert hits._repr_html_().count("data:image/jpeg;base64,") == 3


def test_hits_show_no_file_outside_their_root(tmp_path):
    (tmp_path / "root").mkdir()
    square("red").save(tmp_path / "secret.png")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    square("red").save(tmp_path / "root" / "a.png")
    hits = Hits([], "", [Root("", str(tmp_path / "root"), True)])
    assert hits.thumbnail(Hit("a.png", 1.0))
    for key in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png", ""):
        assert hits.thumbnail(Hit(key, 1.0)) is None


def test_a_key_is_looked_for_in_its_own_root(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        square("red").save(tmp_path / name / "a.png")
    (tmp_path / "two" / "table.csv").touch()
    roots = [
        Root("", str(tmp_path / "one"), True),
        Root("second", str(tmp_path / "two" / "table.csv"), False),
        Root("hub", "org/name", False),
    ]
    assert file_of(roots, "a.png") == tmp_path / "one" / "a.png"
    assert file_of(roots, "second/a.png") == tmp_path / "two" / "a.png"
    assert file_of(roots, "second/../one/a.png") is None
    assert file_of(roots, "hub/a.png") is None


def test_what_is_shown_is_escaped():
    hits = Hits([Hit(NASTY, 1.0)], NASTY, HUB)
    picture = StoredImage()
    predictions = Predictions((Prediction(NASTY, (LabelScore(NASTY, 0.9),), image=picture),))
    for page in (hits._repr_html_(), predictions._repr_html_()):
        assert "<img src=x" not in page
        assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_many_hits_are_cut_and_counted():
    page = Hits([Hit(f"{number}.png", 0.5) for number in range(100)], "", HUB)._repr_html_()
    assert page.count("<figure") == 60
    assert "and 40 more" in page


def test_probabilities_are_shown_where_they_are_known():
    items = Hit("a", 0.3, probability=0.91), Hit("b", 0.2, probability=0.2)
    hits = Hits(items, "fox", HUB, matched=True)
    assert "91%" in hits._repr_html_()
    assert "no good match" not in hits._repr_html_()
    assert "no good match" not in hits[1:]._repr_html_()
    assert "“fox”: no good match" in Hits(items, "fox", HUB, matched=False)._repr_html_()


def test_an_encoder_answers_and_a_report_show_themselves(tiny_checkpoint, tmp_path):
    for colour in ("red", "green"):
        for number in range(3):
            (tmp_path / "albums" / colour).mkdir(parents=True, exist_ok=True)
            square(colour, 10 * number, 32).save(tmp_path / "albums" / colour / f"{number}.png")
    encoder = clipkit.load_model(tiny_checkpoint)
    weights = sum(p.numel() for p in encoder.network.parameters())
    assert f"{weights / 1e6:.1f} million" in encoder._repr_html_()
    source = open_source(tmp_path / "albums")
    predictions = clipkit.classify(source, ["red", "green"], encoder, progress=False)
    page = predictions._repr_html_()
    assert page.count("data:image/jpeg;base64,") == 6
    assert f"{predictions[0].label} {predictions[0].score:.0%}" in page
    report = clipkit.evaluate_zero_shot(source, encoder, ["red", "green"], progress=False)
    assert f"{report.metrics['top1']:.3f}" in report._repr_html_()
    assert size_of(clipkit.plot_confusion(report)._repr_png_())[0] > 300


def test_a_retrieval_has_no_confusion_matrix(colour_folder, tiny_checkpoint):
    encoder = clipkit.load_model(tiny_checkpoint)
    report = clipkit.evaluate_retrieval(open_source(colour_folder), encoder, progress=False)
    assert "text_to_image_r1" in report._repr_html_()
    with pytest.raises(DataError, match="a retrieval report has no confusion matrix"):
        clipkit.plot_confusion(report)


def test_similarities_are_drawn_from_files_and_images(colour_folder, tmp_path):
    encoder = ColourEncoder()
    few = clipkit.plot_similarity([colour_folder / "red-0.png"], ["red"], encoder)
    more = clipkit.plot_similarity([square("red"), square("blue")], ["red", "blue"], encoder)
    assert size_of(more._repr_png_())[0] > size_of(few._repr_png_())[0]
    values = [text.get_text() for text in more.figure.axes[1].texts]
    np.testing.assert_allclose([float(v) for v in values], [1, -1 / 3, -1 / 3, 1], atol=0.01)
    more.save(tmp_path / "similarity.png")
    assert size_of((tmp_path / "similarity.png").read_bytes()) == size_of(more._repr_png_())
    with pytest.raises(DataError, match="got 0 images and 1 captions, expected"):
        clipkit.plot_similarity([], ["red"], encoder)


def test_a_run_shows_what_it_came_to(colour_folder, tmp_path):
    config = parse_config(
        {
            "model": tiny_model(),
            "data": {"train": str(colour_folder)},
            "train": {"batch_size": 4, "steps": 2},
        }
    )
    page = clipkit.train(config, tmp_path / "run")._repr_html_()
    assert "finished" in page
    assert "text_to_image_r1" in page
