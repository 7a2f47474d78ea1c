"""How many files a reader meets on the way of one item through the package.

A walk is traced while it runs: the files of clipkit whose functions are on the call stack when a
landmark is reached (a function that must be passed, such as the encoder or the writer of shards).
Modules that are only imported, and helpers that return before the landmark, do not count.
"""

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from clipkit.cli import main
from clipkit.config import load_config
from tests.helpers.models import tiny_model
from tests.helpers.paths import PACKAGE
from tests.helpers.web_toys import build, client


def walk(action: Callable[[], object], *landmarks: str) -> list[str]:
    """Files of clipkit on the way to the landmarks, as paths below the package."""
    files: set[str] = set()
    reached: set[str] = set()

    def trace(frame, event, _):
        if event != "call" or frame.f_code.co_name not in landmarks:
            return
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        reached.add(frame.f_code.co_name)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(str(PACKAGE)) and frame.f_code.co_name != "<module>":
                files.add(Path(path).relative_to(PACKAGE).as_posix())
            frame = frame.f_back

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert reached == set(landmarks), f"not reached: {set(landmarks) - reached}"
    return sorted(files)


@pytest.fixture
def command(monkeypatch):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code

    return command


def report(name: str, files: list[str], most: int) -> None:
    print(f"\n{name}: {len(files)} files, at most {most}: {', '.join(files)}")
    assert len(files) <= most


def test_a_text_query_from_the_command_line_to_hits(
    command, colour_folder, tiny_checkpoint, tmp_path
):
    index = tmp_path / "index"
    command("index", "build", colour_folder, "--out", index, "--model", tiny_checkpoint)
    words = ("search", index, "red")
    report("text query", walk(lambda: command(*words), "encode_text", "search_rows"), 8)


def test_an_image_from_embed_to_its_shard(command, colour_folder, tiny_checkpoint, tmp_path):
    words = ("embed", colour_folder, "--out", tmp_path / "store", "--model", tiny_checkpoint)
    files = walk(lambda: command(*words), "read", "encode", "write_shard")
    report("image", files, 9)


@pytest.fixture
def config(colour_folder, tmp_path):
    """A training configuration of two steps."""
    settings = {
        "model": tiny_model(),
        "data": {"train": str(colour_folder), "val_fraction": 0.25, "workers": 1},
        "train": {"batch_size": 3, "steps": 2, "precision": "fp32"},
    }
    file = tmp_path / "train.toml"
    file.write_text(tomli_w.dumps(settings))
    return file


def test_a_training_batch_from_the_loader_to_the_optimiser_step(command, config, tmp_path):
    words = ("train", config, "--out", tmp_path / "run")
    landmarks = ("_pair", "take_step", "info_nce", "clip_gradients")
    report("training batch", walk(lambda: command(*words), *landmarks), 12)


def test_a_learning_rate_from_toml_to_the_optimiser(config):
    from clipkit.training.build import build_towers
    from clipkit.training.optim import build_optimizer

    def action():
        settings = load_config(config)
        build_optimizer(build_towers(settings.model, 0.07, 0).clip, settings.optim)

    report("learning rate", walk(action, "load_config", "build_towers", "build_optimizer"), 5)


def test_a_hit_from_the_web_page_to_json(tmp_path):
    index = build(tmp_path, per_colour=1)

    def action():
        with client(index) as ask:
            assert ask.get("/search", params={"q": "red"}).json()["hits"]

    report("hit", walk(action, "search", "search_rows", "_describe"), 9)
