"""A network that is small enough for any test."""

from pathlib import Path


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


def save_tiny(path: Path, seed: int = 0) -> Path:
    """A checkpoint of the tiny network with random weights."""
    from clipkit.config import parse_config
    from clipkit.models.checkpoint import save_checkpoint
    from clipkit.training.build import build_towers

    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=seed)
    save_checkpoint(path, towers, {"step": 1}, {"step": 1})
    return path
