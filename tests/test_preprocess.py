"""Our transform against open_clip's own, and the fast one against ours."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from toys import soft

from clipkit.data.images import read_image
from clipkit.data.transforms import Preprocess, as_batch

SIZES = [32, (32, 32), (24, 40), (40, 24)]
MODES = ["shortest", "longest", "squash"]
PICTURES = [
    (32, 32),
    (33, 32),
    (31, 57),
    (57, 31),
    (200, 90),
    (91, 203),
    (3, 5),
    (64, 64),
    (40, 24),
]


def both(**config):
    """open_clip's transform and ours."""
    config = PreprocessCfg(**config)
    ours = Preprocess.of(vars(config))
    return image_transform_v2(config, is_train=False), ours


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize_mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_open_clips(size, resize_mode, interpolation):
    theirs, ours = both(
        size=size, resize_mode=resize_mode, interpolation=interpolation, fill_color=90
    )
    for number, sides in enumerate(PICTURES):
        image = Image.fromarray(soft(*sides, seed=number))
        assert torch.equal(ours(image), theirs(image)), sides


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(20, 90),
    height=st.integers(20, 90),
    size=st.sampled_from([*SIZES, 1, (7, 1)]),
    resize_mode=st.sampled_from(MODES),
)
def test_equal_for_any_sides(width, height, size, resize_mode):
    theirs, ours = both(size=size, resize_mode=resize_mode)
    image = Image.fromarray(soft(width, height))
    try:
        wanted = theirs(image)
    except ValueError:  # open_clip makes a side of 0 pixels of what is very long
        assert ours(image).shape == wanted_shape(size)
    else:
        assert torch.equal(ours(image), wanted)


def wanted_shape(size):
    return (3, *((size, size) if isinstance(size, int) else size))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "1", "P"])
def test_equal_for_pictures_of_other_modes(mode):
    image = Image.fromarray(soft(70, 50)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(soft(70, 50, seed=3)).convert("L"))
    theirs, ours = both(size=32)
    assert torch.equal(ours(image), theirs(image))


def test_any_mean_and_deviation_and_a_number_for_all_channels():
    image = Image.fromarray(soft(40, 30))
    theirs, ours = both(size=16, mean=(0.1, 0.5, 0.9), std=(0.3, 0.2, 1.1))
    assert torch.equal(ours(image), theirs(image))
    theirs, ours = both(size=16, mean=0.5, std=0.25)
    assert torch.equal(ours(image), theirs(image))


def test_a_batch_of_pixels_is_the_batch_of_single_pictures():
    _, ours = both(size=(24, 40))
    images = [Image.fromarray(soft(70, 50, seed=seed)) for seed in range(5)]
    batch = ours.normalise(as_batch([ours.pixels(image) for image in images]))
    assert torch.equal(batch, torch.stack([ours(image) for image in images]))


def test_a_very_long_picture_is_no_error():
    _, ours = both(size=32, resize_mode="longest")
    assert ours(Image.new("RGB", (3300, 33))).shape == (3, 32, 32)


@pytest.mark.parametrize("resize_mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_fast_is_read_no_smaller_than_needed(size, resize_mode):
    ours = Preprocess.of(vars(PreprocessCfg(size=size, resize_mode=resize_mode)))
    assert ours.reduction("exact") is None
    factor = ours.reduction("fast")
    for width, height in [(32, 32), (64, 64), (63, 64), (640, 480), (4000, 3000), (50, 4000)]:
        number = factor(width, height)
        new_height, new_width = ours._resized(width, height)
        spare = min(width / new_width, height / new_height) / 2
        assert number == 1 or spare >= number
        assert number == 8 or spare < 2 * number


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", MODES)
def test_fast_differs_from_exact_by_rounding_where_nothing_is_reduced(resize_mode, interpolation):
    ours = Preprocess.of(
        vars(PreprocessCfg(size=32, resize_mode=resize_mode, interpolation=interpolation))
    )
    for sides in PICTURES:
        image = Image.fromarray(soft(*sides))
        exact, fast = (ours.pixels(image, decode).astype(int) for decode in ("exact", "fast"))
        assert exact.shape == fast.shape == (32, 32, 3)
        assert np.abs(exact - fast).mean() < 0.2, sides


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_fast_looks_the_same_where_pictures_are_read_smaller(factor, form):
    ours = Preprocess.of(vars(PreprocessCfg(size=32)))
    stream = io.BytesIO()
    Image.fromarray(soft(90 * factor, 72 * factor)).save(stream, form, quality=95)
    read = {
        decode: ours.pixels(read_image(stream.getvalue(), ours.reduction(decode)), decode)
        for decode in ("exact", "fast")
    }
    smaller = read_image(stream.getvalue(), ours.reduction("fast"))
    assert smaller.size == (90, 72)
    difference = np.abs(read["exact"].astype(int) - read["fast"])
    assert 0 < difference.mean() < 1.5
    # Far less than another place would make: one pixel aside.
    assert difference.mean() < np.abs(np.diff(read["exact"].astype(int), axis=1)).mean() / 3


def test_a_picture_of_the_right_size_is_taken_as_it_is():
    ours = Preprocess.of(vars(PreprocessCfg(size=32)))
    pixels = soft(32, 32)
    np.testing.assert_array_equal(ours.pixels(Image.fromarray(pixels), "fast"), pixels)


def test_pixels_are_bytes_until_they_are_a_batch(tiny_checkpoint):
    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint)
    images = [Image.fromarray(soft(70, 50, seed=seed)) for seed in range(3)]
    pixels = as_batch([encoder.preprocess.pixels(image) for image in images])
    assert pixels.dtype == torch.uint8
    floats = torch.stack([encoder.preprocess(image) for image in images])
    expected = encoder.encode_images(floats)
    for given_images in (images, pixels):
        np.testing.assert_allclose(encoder.encode_images(given_images), expected, atol=1e-6)
