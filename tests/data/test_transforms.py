"""The transform against open_clip's and Pillow's own; what is changed at random; what is fast."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipkit.config import AugmentConfig
from clipkit.data.images import read_image
from clipkit.data.transforms import (
    Preprocess,
    as_batch,
    augmentation,
    crop_box,
    reduction,
    resample,
    resample_exactly,
)
from tests.helpers.toys import soft

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


def picture(width=60, height=40):
    generator = np.random.default_rng(0)
    return generator.integers(0, 255, (height, width, 3), np.uint8)


def test_whole_image_is_a_plain_resize():
    config = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5))
    found = augmentation(config, (20, 30), "exact")(picture(60, 40), random.Random(0))
    image = Image.fromarray(picture(60, 40))
    wanted = np.asarray(image.resize((30, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found, wanted)


def test_crop_lies_inside_and_keeps_its_share_of_the_area():
    generator = random.Random(1)
    for _ in range(500):
        left, upper, right, lower = crop_box((200, 100), (0.3, 0.5), (0.75, 1.33), generator)
        assert 0 <= left < right <= 200
        assert 0 <= upper < lower <= 100
        share = (right - left) * (lower - upper) / 20_000
        assert 0.29 <= share <= 0.51


@pytest.mark.parametrize(
    "settings",
    [{"flip": 0.5}, {"color_jitter": 0.4}, {"grayscale": 0.5}, {"rotate": 20.0}],
)
@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_each_change_depends_on_the_generator_alone(settings, decode):
    augment = augmentation(AugmentConfig(**settings), (16, 16), decode)
    same = [augment(picture(), random.Random(3)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    others = [augment(picture(), random.Random(seed)) for seed in range(8)]
    assert any((same[0] != other).any() for other in others)


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_no_mirror_image_by_default(decode):
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (0, 0, 20, 40))
    augment = augmentation(AugmentConfig(crop_scale=(0.9, 1.0)), (20, 20), decode)
    for seed in range(50):
        pixels = augment(np.asarray(half), random.Random(seed)).astype(int)
        assert pixels[:, 0].mean() > pixels[:, -1].mean()


def test_jitter_equals_three_changes_one_after_the_other():
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    found = augmentation(AugmentConfig(color_jitter=0.3, **whole), (40, 60), "exact")(
        picture(), random.Random(5)
    )
    generator = random.Random(5)
    crop_box((60, 40), (1.0, 1.0), (1.5, 1.5), generator)
    brightness, contrast, saturation = (1 + generator.uniform(-0.3, 0.3) for _ in range(3))
    pixels = np.asarray(picture(), np.float64) * brightness
    pixels = 128 + contrast * (pixels - 128)
    grey = pixels @ [0.299, 0.587, 0.114]
    pixels = grey[..., None] + saturation * (pixels - grey[..., None])
    np.testing.assert_allclose(found, pixels.clip(0, 255), atol=1)


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_grayscale_and_flip_by_value(decode):
    def augmented(size, **settings):
        return augmentation(AugmentConfig(**settings), size, decode)(picture(), random.Random(0))

    gray = augmented((16, 16), grayscale=1.0)
    assert (gray[..., 0] == gray[..., 1]).all()
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    flipped, plain = augmented((20, 30), flip=1.0, **whole), augmented((20, 30), **whole)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_fast_and_exact_draw_the_same_and_differ_by_little():
    photo = soft(120, 90)
    changes = {"flip": 0.5, "color_jitter": 0.3, "grayscale": 0.3, "rotate": 10.0}
    fast, exact = (augmentation(AugmentConfig(**changes), (32, 32), d) for d in ("fast", "exact"))
    for seed in range(20):
        one, other = fast(photo, random.Random(seed)), exact(photo, random.Random(seed))
        assert np.abs(one.astype(int) - other.astype(int)).mean() < 3


def test_no_crop_is_enlarged_because_its_picture_was_reduced():
    generator = random.Random(0)
    for scale, ratio in [((0.5, 1.0), (0.75, 1.3333)), ((0.08, 1.0), (0.5, 2.0)), ((1, 1), (1, 1))]:
        config = AugmentConfig(crop_scale=scale, crop_ratio=ratio)
        factor_of = reduction(config, (32, 48), "fast")
        factors = set()
        for _ in range(500):
            width, height = generator.randrange(20, 4000), generator.randrange(20, 4000)
            factor = factor_of(width, height)
            factors.add(factor)
            left, upper, right, lower = crop_box((width, height), scale, ratio, generator)
            if factor > 1:
                assert right - left >= factor * 48 - 1e-6
                assert lower - upper >= factor * 32 - 1e-6
        assert factors == {1, 2, 4, 8}
    assert reduction(AugmentConfig(crop_scale=(0.0, 1.0)), (8, 8), "fast")(9000, 9000) == 1
    assert reduction(AugmentConfig(), (8, 8), "exact") is None


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
