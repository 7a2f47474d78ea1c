import random

import numpy as np
import pytest
from PIL import Image
from toys import soft

from clipkit.config import AugmentConfig
from clipkit.data.transforms import augmentation, crop_box, reduction


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
