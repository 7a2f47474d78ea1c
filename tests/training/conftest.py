"""What runs with towers that stay frozen share."""

import pytest
from PIL import Image

from clipkit.config import parse_config
from clipkit.models.checkpoint import save_checkpoint
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model


@pytest.fixture
def squares(colour_folder):
    """The coloured pictures as squares of the model's size, so that no cropping changes them."""
    for file in colour_folder.glob("*.png"):
        with Image.open(file) as picture:
            picture.resize((32, 32)).save(file)
    return colour_folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint to start from, of an open_clip model with both towers."""
    path = tmp_path_factory.mktemp("start") / "step-1"
    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=3)
    save_checkpoint(path, towers, {"step": 1}, {"step": 1})
    return path
