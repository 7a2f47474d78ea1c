"""Shared fixtures: real data where present, a tiny network with a fixed seed, small pictures."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Tiny networks are fastest on one thread, and sums come in one order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from PIL import Image

import clipkit.cli

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Lock files of `datasets` and notes of models: not in the person's own cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    os.environ["CLIPKIT_CACHE"] = str(tmp_path_factory.mktemp("notes"))
    yield
    del os.environ["CLIPKIT_CACHE"]
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True, scope="session")
def own_vectors(tmp_path_factory):
    """Vectors that commands keep lie in a directory of this session, not in the person's own."""
    before = os.environ.get("CLIPKIT_CACHE")
    os.environ["CLIPKIT_CACHE"] = str(tmp_path_factory.mktemp("vectors"))
    yield
    os.environ.pop("CLIPKIT_CACHE")
    if before is not None:
        os.environ["CLIPKIT_CACHE"] = before


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
    from clipkit.models.checkpoint import save_checkpoint
    from clipkit.training.build import build_towers

    path = tmp_path_factory.mktemp("tiny") / "step-1"
    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=0)
    save_checkpoint(path, towers, {"step": 1}, {"step": 1})
    return path


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}


@pytest.fixture
def colour_folder(tmp_path) -> Path:
    """Twelve pictures of three colours with sidecar captions: red-0.png, red-0.txt, …"""
    return write_colours(tmp_path / "colours")


def write_colours(folder: Path) -> Path:
    """Write them into a new folder."""
    folder.mkdir()
    for name, colour in COLOURS.items():
        for number in range(4):
            shade = tuple(max(0, value - 8 * number) for value in colour)
            Image.new("RGB", (40, 30), shade).save(folder / f"{name}-{number}.png")
            (folder / f"{name}-{number}.txt").write_text(f"a {name} picture\n")
    return folder


class SmallDisk:
    """A disk of its own, which can be filled and grown."""

    def __init__(self, path):
        self.path = path

    def fill(self, leaving):
        """Take all room but so many bytes."""
        self.path.joinpath("filler").write_bytes(
            b"\0" * (shutil.disk_usage(self.path).free - leaving)
        )

    def make_room(self):
        (self.path / "filler").unlink()

    def grow(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of 25 MB, where one can be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", path]
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", path], check=True)


def dies(monkeypatch, owner, method, time=1, error=None):
    """Let a method raise when it is called for the ``time``-th time."""
    plain, left = getattr(owner, method), [time]

    def deadly(*args, **settings):
        left[0] -= 1
        if not left[0]:
            raise error or RuntimeError("killed")
        return plain(*args, **settings)

    monkeypatch.setattr(owner, method, deadly)


@pytest.fixture
def fails(monkeypatch):
    """Make steps fail: ``fails(when)``, with when(number of the step from 1, rate)."""

    import math

    import torch
    from open_clip.constants import OPENAI_DATASET_MEAN

    from clipkit.training.step import Learner

    def fail(when):
        take_step = Learner.take_step

        def failing(self, *args):
            number = args[-2] + 1
            if when(number, self.health.rate):
                self._mean.fill_(math.nan)
            report = take_step(self, *args)
            self._mean.copy_(mean)
            return report

        mean = 255 * torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
        monkeypatch.setattr(Learner, "take_step", failing)

    return fail


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns what it printed, as (stdout, stderr)."""

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            clipkit.cli.main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed.err
        return printed.out, printed.err

    return run
