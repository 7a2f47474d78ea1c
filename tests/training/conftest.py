"""Fixtures of training tests."""

import pytest
from PIL import Image

from clipkit.config import parse_config
from clipkit.models.checkpoint import save_checkpoint
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model


@pytest.fixture
def squares(colour_folder):
    """The coloured images, resized to the input size of the model to avoid cropping."""
    for file in colour_folder.glob("*.png"):
        with Image.open(file) as image:
            image.resize((32, 32)).save(file)
    return colour_folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint for ``model.init_from``, with both towers."""
    path = tmp_path_factory.mktemp("start") / "step-1"
    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=3)
    save_checkpoint(path, towers, {"step": 1}, {"step": 1})
    return path
