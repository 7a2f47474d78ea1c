"""Shared fixtures: real data where present, a tiny network with a fixed seed, small pictures."""

import os
from pathlib import Path

# Tiny networks are fastest on one thread, and sums come in one order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Streams leave lock files in the cache of `datasets`: not in the person's own."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def shared_data() -> Path:
    """Real photos with captions, where the checkout has them."""
    if not SHARED.is_dir():
        pytest.skip("no real photos beside the project (../shared/data)")
    return SHARED


def tiny_model(image_size: int = 32):
    """A real open_clip network of width 32, the settings of [model]."""
    return {
        "embed_dim": 32,
        "vision": {
            "image_size": image_size,
            "layers": 1,
            "width": 32,
            "patch_size": 8,
            "head_width": 16,
        },
        "text": {"width": 32, "heads": 2, "layers": 1},
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint directory of the tiny network."""
    from clipkit.config import parse_config
    from clipkit.model.checkpoint import save_checkpoint
    from clipkit.model.towers import build_towers

    path = tmp_path_factory.mktemp("tiny") / "step-1"
    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=0)
    save_checkpoint(path, towers, {"step": 1}, {"step": 1})
    return path


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}


@pytest.fixture
def colour_folder(tmp_path) -> Path:
    """Twelve pictures of three colours with sidecar captions: red-0.png, red-0.txt, …"""
    folder = tmp_path / "colours"
    folder.mkdir()
    for name, colour in COLOURS.items():
        for number in range(4):
            shade = tuple(max(0, value - 8 * number) for value in colour)
            Image.new("RGB", (40, 30), shade).save(folder / f"{name}-{number}.png")
            (folder / f"{name}-{number}.txt").write_text(f"a {name} picture\n")
    return folder
