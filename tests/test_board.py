"""The log as TensorBoard reads it, by value."""

import sys

import pytest
from conftest import dies
from test_train import configured

from clipkit.errors import MissingExtraError
from clipkit.tasks.train import train
from clipkit.training.loop import TrainingLoop
from clipkit.training.run_directory import read_log

SCALARS = ("loss", "guess", "lr", "scale", "grad_norm", "samples_per_second", "waiting_for_data")


def assert_board_shows_the_log(run, lines):
    """Every number of the lines is there, once, and nothing else."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    found = accumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    wanted = {name: [(i["step"], i[name]) for i in lines if name in i] for name in SCALARS}
    measured = [line for line in lines if "held_out" in line]
    for name in measured[0]["held_out"]:
        wanted[f"held_out/{name}"] = [(i["step"], i["held_out"][name]) for i in measured]
    assert set(found.Tags()["scalars"]) == set(wanted)
    for name, points in wanted.items():
        shown = found.Scalars(name)
        assert [event.step for event in shown] == [step for step, _ in points], name
        assert [event.value for event in shown] == pytest.approx([v for _, v in points]), name


def test_a_resumed_run_shows_each_point_once(colour_folder, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    config = configured(colour_folder, train={"tensorboard": True})

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        dies(patch, TrainingLoop, "_between_steps", 8)
        train(config, tmp_path / "run")
    run = train(config, tmp_path / "run", resume=True).run
    lines = read_log(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert_board_shows_the_log(run, lines)


def test_a_run_that_went_back_shows_what_stands(colour_folder, tmp_path, fails):
    pytest.importorskip("tensorboard")
    fails(lambda number, rate: rate == 1 and number >= 8)
    config = configured(colour_folder, train={"tensorboard": True, "bad_steps": 3})
    run = train(config, tmp_path / "run").run
    lines = read_log(run)
    (back,) = [i for i, line in enumerate(lines) if "back_to" in line]
    stands = [line for line in lines[:back] if line["step"] <= lines[back]["back_to"]]
    assert_board_shows_the_log(run, stands + lines[back + 1 :])


def test_what_to_install_is_said_before_anything_is_done(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = configured(colour_folder, train={"tensorboard": True})
    with pytest.raises(MissingExtraError, match=r"pip install 'clipkit\[tensorboard\]'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
