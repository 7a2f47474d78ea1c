"""Images of three colours, plain and with noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}


def write_colours(folder: Path) -> Path:
    """Write them into a new folder."""
    folder.mkdir()
    for name, colour in COLOURS.items():
        for number in range(4):
            shade = tuple(max(0, value - 8 * number) for value in colour)
            Image.new("RGB", (40, 30), shade).save(folder / f"{name}-{number}.png")
            (folder / f"{name}-{number}.txt").write_text(f"a {name} picture\n")
    return folder


def picture(colour, seed):
    """A square of a colour with noise in it."""
    noise = np.random.default_rng(seed).integers(-60, 60, (16, 16, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def write_albums(folder: Path, per_label: int, noise: int, tint: int = 0) -> Path:
    """A folder for each colour with noisy images of it: red/0.png, red/1.png, …"""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_label):
            change = generator.integers(-noise, noise, (16, 16, 3))
            change = change + generator.integers(-tint, tint + 1, 3)
            pixels = np.clip(np.array(colour) + change, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder
