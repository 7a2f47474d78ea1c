"""Cropping, turning and resizing: exactly as Pillow does, and faster with a stated difference."""

import io

import numpy as np
import pytest
from PIL import Image
from toys import soft

from clipkit.data.images import read_image
from clipkit.data.transforms import resample, resample_exactly

BOXES = [(0, 0, 90, 60), (10, 5, 70, 50), (3, 20, 33, 60)]


def difference(one, other):
    """Mean over pixels, of 255 levels."""
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other.astype(int)).mean()


@pytest.mark.parametrize("degrees", [0, 7])
def test_exactly_is_what_pillow_does(degrees):
    box = (3.25, 4.5, 77.1, 50.9)
    image = Image.fromarray(soft(90, 60))
    if degrees:
        corner = image.getpixel((0, 0))
        image = image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=corner)
    wanted = np.asarray(image.resize((40, 30), Image.Resampling.BICUBIC, box=box))
    np.testing.assert_array_equal(resample_exactly(soft(90, 60), degrees, box, (30, 40)), wanted)


@pytest.mark.parametrize("size", [(20, 30), (64, 64), (100, 150)])
@pytest.mark.parametrize("box", BOXES)
def test_upright_differs_from_pillow_by_rounding(size, box):
    args = (soft(90, 60), 0, box, size)
    assert difference(resample(*args), resample_exactly(*args)) < 0.2


@pytest.mark.parametrize("degrees", [5, -20, 90, 180])
@pytest.mark.parametrize("size", [(12, 18), (40, 40), (100, 150)])
@pytest.mark.parametrize("box", BOXES)
def test_turned_in_one_pass_differs_little_from_two(degrees, size, box):
    args = (soft(90, 60), degrees, box, size)
    wanted = resample_exactly(*args)
    assert difference(resample(*args), wanted) < 5
    # Far less than another place would make.
    aside = tuple(side + 6 * (1 if number % 2 == 0 else 0) for number, side in enumerate(box))
    if aside[2] <= 90:
        assert difference(resample(args[0], degrees, aside, size), wanted) > 5


def test_corners_take_the_colour_of_the_first_pixel():
    picture = np.full((50, 50, 3), 255, np.uint8)
    picture[0, 0] = (10, 20, 30)
    turned = resample(picture, 45, (0, 0, 50, 50), (50, 50))
    assert turned[1, 1].tolist() == [10, 20, 30]
    assert turned[25, 25].tolist() == [255, 255, 255]


@pytest.mark.parametrize("degrees", [0, 30])
@pytest.mark.parametrize("picture", [(1, 1), (1, 90), (100, 1), (2, 3)])
def test_tiny_pictures_and_crops(degrees, picture):
    pixels = np.full((*picture, 3), 77, np.uint8)
    for box in [(0, 0, picture[1], picture[0]), (0.2, 0.3, 0.4, 0.6)]:
        assert (resample(pixels, degrees, box, (4, 6)) == 77).all()


def test_a_picture_that_may_not_be_written_to_is_read():
    pixels = soft(30, 30)
    pixels.flags.writeable = False
    for one in (resample, resample_exactly):
        for degrees in (0, 10):
            assert one(pixels, degrees, (0, 0, 30, 30), (30, 30)).shape == (30, 30, 3)


def jpeg(pixels, **settings):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_decoded_smaller_looks_the_same(factor, settings):
    data = jpeg(soft(403, 301), **settings)
    small = read_image(data, lambda width, height: factor)
    assert small.size == (-(-403 // factor), -(-301 // factor))
    whole = np.asarray(read_image(data))
    size = (24, 32)
    wanted = resample_exactly(whole, 0, (0, 0, 403, 301), size)
    # Its last row and column reach beyond the picture where the factor does not divide its sides.
    box = (0, 0, 403 / factor, 301 / factor)
    assert difference(resample_exactly(np.asarray(small), 0, box, size), wanted) < 1.5


def test_other_formats_are_averaged():
    stream = io.BytesIO()
    Image.fromarray(soft(41, 30)).save(stream, "PNG")
    small = read_image(stream.getvalue(), lambda width, height: 4)
    assert np.array_equal(small, Image.fromarray(soft(41, 30)).reduce(4))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_reduced_jpeg_is_upright(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(soft(160, 96), exif=exif)
    small = read_image(data, lambda width, height: 2)
    whole = read_image(data).resize(small.size, Image.Resampling.BOX)
    assert difference(np.asarray(small), np.asarray(whole)) < 2


def test_the_reduction_is_asked_for_either_way_round():
    asked = []
    factors = {(64, 32): 4, (32, 64): 2}

    def reduction(*size):
        asked.append(size)
        return factors[size]

    assert read_image(jpeg(soft(64, 32)), reduction).size == (32, 16)
    assert set(asked) == set(factors)


def test_real_photos_decoded_smaller(shared_data):
    """The figures that the configuration's words rest on."""
    import datasets

    file = str(shared_data / "flickr8k-224-dev.parquet")
    rows = datasets.load_dataset("parquet", data_files=file, split="train[:30]")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    found = []
    for row in rows:
        data = row["image"]["bytes"]
        small = np.asarray(read_image(data, lambda width, height: 2))
        size = (64, 64)
        wanted = resample_exactly(np.asarray(read_image(data)), 0, (0, 0, 224, 224), size)
        found.append(difference(resample(small, 0, (0, 0, 112, 112), size), wanted))
    assert np.mean(found) < 2
