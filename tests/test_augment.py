import random

import numpy as np
import pytest
from PIL import Image

from clipkit.config import AugmentConfig
from clipkit.data.augment import augmentation, crop_box


def picture(width=60, height=40):
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 255, (height, width, 3), np.uint8))


def test_whole_image_is_a_plain_resize():
    config = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5))
    found = augmentation(config, (20, 30))(picture(60, 40), random.Random(0))
    wanted = np.asarray(picture(60, 40).resize((30, 20), Image.Resampling.BICUBIC))
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
def test_each_change_depends_on_the_generator_alone(settings):
    augment = augmentation(AugmentConfig(**settings), (16, 16))
    same = [augment(picture(), random.Random(3)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    others = [augment(picture(), random.Random(seed)) for seed in range(8)]
    assert any((same[0] != other).any() for other in others)


def test_no_mirror_image_by_default():
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (0, 0, 20, 40))
    augment = augmentation(AugmentConfig(crop_scale=(0.9, 1.0)), (20, 20))
    for seed in range(50):
        pixels = augment(half, random.Random(seed)).astype(int)
        assert pixels[:, 0].mean() > pixels[:, -1].mean()


def test_jitter_equals_three_changes_one_after_the_other():
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    found = augmentation(AugmentConfig(color_jitter=0.3, **whole), (40, 60))(
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


def test_grayscale_and_flip_by_value():
    gray = augmentation(AugmentConfig(grayscale=1.0), (16, 16))(picture(), random.Random(0))
    assert (gray[..., 0] == gray[..., 1]).all()
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    flipped = augmentation(AugmentConfig(flip=1.0, **whole), (20, 30))(picture(), random.Random(0))
    plain = augmentation(AugmentConfig(**whole), (20, 30))(picture(), random.Random(0))
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
