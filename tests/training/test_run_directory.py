"""Retention of checkpoints, and the TensorBoard log of a run."""

import sys
from typing import get_args

import numpy as np
import pytest

import clipkit
from clipkit.artifacts import read_manifest
from clipkit.config import Metric
from clipkit.errors import ArtifactError, ConfigError, MissingExtraError, ModelError
from clipkit.evaluation.retrieval import retrieval_recall
from clipkit.tasks.train import train
from clipkit.training.loop import TrainingLoop
from clipkit.training.run_directory import read_log
from tests.helpers.faults import dies
from tests.helpers.runs import assert_same_run, configured, steps


def measured(monkeypatch, recalls):
    """Replace the held-out recall of a run by these numbers, one per evaluation."""
    remaining = iter(recalls)

    def recall(*_, **__):
        return dict.fromkeys(get_args(Metric)[1:], next(remaining))

    monkeypatch.setattr("clipkit.training.loop.retrieval_recall", recall)


def test_valid_metric_names_are_those_that_are_measured():
    vectors = np.eye(3, dtype=np.float32)
    assert {"", *retrieval_recall(vectors, vectors, np.arange(3))} == set(get_args(Metric))
    with pytest.raises(ConfigError, match="did you mean text_to_image_r1"):
        configured("x", train={"best_metric": "text_to_image_1"})


def test_the_best_checkpoint_is_kept_and_a_run_loads_its_last(colour_folder, tmp_path, monkeypatch):
    # Evaluated every two steps, saved every three. Steps 4 and 8 tie for the best recall.
    measured(monkeypatch, [0.1, 0.5, 0.4, 0.5, 0.2, 0.3])
    config = configured(
        colour_folder,
        train={"epochs": 4, "eval_every_epochs": 2 / 3, "save_every_epochs": 1, "keep_last": 1},
    )
    out = train(config, tmp_path / "run").run
    assert steps(out) == [4, 12]
    best = {"step": 4, "metric": "text_to_image_r1", "value": 0.5}
    assert read_manifest(out).detail["best"] == best
    assert read_manifest(out / "step-12").detail["best"] == best
    assert read_manifest(out / "step-4").detail["held_out"]["text_to_image_r1"] == 0.5
    assert clipkit.load_model(out).model.name.endswith("step-12")
    assert clipkit.load_model(f"{out}/best").model == clipkit.load_model(out / "step-4").model


def test_every_nth_checkpoint_is_kept(colour_folder, tmp_path):
    config = configured(
        colour_folder,
        train={
            "epochs": 4,
            "save_every_epochs": 0,
            "keep_last": 1,
            "keep_every_steps": 5,
            "best_metric": "",
        },
    )
    out = train(config, tmp_path / "run").run
    assert steps(out) == [5, 10, 12]
    with pytest.raises(ModelError, match=r"no best checkpoint.*train\.best_metric"):
        clipkit.load_model(f"{out}/best")


def test_a_resumed_run_remembers_the_best_checkpoint(colour_folder, tmp_path, monkeypatch):
    settings = {"epochs": 4, "eval_every_epochs": 2 / 3, "save_every_epochs": 1, "keep_last": 1}
    recalls = [0.1, 0.5, 0.4, 0.3, 0.6, 0.3]
    measured(monkeypatch, recalls)
    train(configured(colour_folder, train=settings), tmp_path / "whole")

    measured(monkeypatch, recalls)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        dies(patch, TrainingLoop, "_after_step", 7)
        train(configured(colour_folder, train=settings), tmp_path / "run")
    assert steps(tmp_path / "run") == [4, 6]
    measured(monkeypatch, recalls[3:])  # step 6 was measured before it was saved
    train(configured(colour_folder, train=settings), tmp_path / "run", resume=True)
    assert steps(tmp_path / "run") == steps(tmp_path / "whole") == [10, 12]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_interval_shorter_than_a_step_evaluates_every_step(colour_folder, tmp_path):
    config = configured(colour_folder, train={"epochs": 1, "eval_every_epochs": 0.1})
    lines = read_log(train(config, tmp_path / "run").run)
    assert [line["step"] for line in lines if "held_out" in line] == [1, 2, 3]


def test_a_full_disk_loses_neither_the_best_nor_the_last_checkpoint(
    colour_folder, disk, monkeypatch, tmp_path
):
    # Room for two checkpoints of 20 MB. The third fails before an old one is removed.
    disk.grow("45m")
    measured(monkeypatch, [0.5, 0.1, 0.2])
    config = configured(colour_folder, train={"epochs": 3, "keep_last": 1})
    with pytest.raises(ArtifactError, match="step-9 cannot be saved.*disk is full"):
        train(config, disk.path / "run")
    assert steps(disk.path / "run") == [3, 6]
    assert clipkit.load_model(disk.path / "run").model.name.endswith("step-6")
    assert clipkit.load_model(disk.path / "run" / "best").model.name.endswith("step-3")
    disk.grow("70m")
    measured(monkeypatch, [0.2, 0.2])
    assert train(config, disk.path / "run", resume=True).finished
    assert steps(disk.path / "run") == [3, 9]


SCALARS = (
    "loss",
    "chance_loss",
    "lr",
    "scale",
    "grad_norm",
    "samples_per_second",
    "waiting_for_data",
)


def assert_tensorboard_equals_log(run, lines):
    """TensorBoard has every number of the lines exactly once, and nothing else."""
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
        dies(patch, TrainingLoop, "_after_step", 8)
        train(config, tmp_path / "run")
    run = train(config, tmp_path / "run", resume=True).run
    lines = read_log(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert_tensorboard_equals_log(run, lines)


def test_tensorboard_omits_steps_that_were_rolled_back(colour_folder, tmp_path, fails):
    pytest.importorskip("tensorboard")
    fails(lambda number, rate: rate == 1 and number >= 8)
    config = configured(colour_folder, train={"tensorboard": True, "max_nonfinite_steps": 3})
    run = train(config, tmp_path / "run").run
    lines = read_log(run)
    (rollback,) = [i for i, line in enumerate(lines) if "rolled_back_to" in line]
    target = lines[rollback]["rolled_back_to"]
    valid = [line for line in lines[:rollback] if line["step"] <= target]
    assert_tensorboard_equals_log(run, valid + lines[rollback + 1 :])


def test_a_missing_extra_is_reported_before_the_run_starts(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = configured(colour_folder, train={"tensorboard": True})
    with pytest.raises(MissingExtraError, match=r"pip install 'clipkit\[tensorboard\]'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
