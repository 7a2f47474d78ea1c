"""Shared fixtures: real data where present, a tiny network with a fixed seed, small pictures."""

import os
import subprocess
import sys
from pathlib import Path

# Tiny networks are fastest on one thread, and sums come in one order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import clipkit.cli
from tests.helpers import shapes
from tests.helpers.browser import missing
from tests.helpers.colours import write_colours
from tests.helpers.faults import SmallDisk
from tests.helpers.models import tiny_model
from tests.helpers.paths import SHARED

shapes.install()


def pytest_terminal_summary(terminalreporter):
    """Say once if browser tests were skipped."""
    if reason := missing():
        terminalreporter.write_line(f"browser tests skipped: {reason}")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What `datasets` locks and clipkit keeps: in a directory of this session, not a person's."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("CLIPKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def shared_data() -> Path:
    """Real photos with captions, where the checkout has them."""
    if not SHARED.is_dir():
        pytest.skip("no real photos beside the project (../shared/data)")
    return SHARED


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


@pytest.fixture
def colour_folder(tmp_path) -> Path:
    """Twelve pictures of three colours with sidecar captions: red-0.png, red-0.txt, …"""
    return write_colours(tmp_path / "colours")


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


@pytest.fixture
def fails(monkeypatch):
    """Make steps fail: ``fails(when)``, with when(number of the step from 1, rate)."""

    import math

    import torch
    from open_clip.constants import OPENAI_DATASET_MEAN

    from clipkit.training.step import Trainer

    def fail(when):
        take_step = Trainer.take_step

        def failing(self, *args):
            number = args[-2] + 1
            if when(number, self.recovery.lr_factor):
                self._mean.fill_(math.nan)
            report = take_step(self, *args)
            self._mean.copy_(mean)
            return report

        mean = 255 * torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
        monkeypatch.setattr(Trainer, "take_step", failing)

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
