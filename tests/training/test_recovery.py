"""Non-finite steps are skipped without a trace; several in a row roll the run back."""

import math
import os
import signal

import pytest
import torch

from clipkit.config import parse_config
from clipkit.data.loader import PairBatch
from clipkit.errors import TrainingError
from clipkit.models.tokenizer import tokenize
from clipkit.tasks.train import train
from clipkit.training import step as step_module
from clipkit.training.build import build_towers
from clipkit.training.distributed import World
from clipkit.training.loop import TrainingLoop
from clipkit.training.run_directory import read_log
from clipkit.training.step import Trainer
from tests.helpers.models import tiny_model
from tests.helpers.runs import assert_same_run, configured, curve, last_weights, steps
from tests.helpers.torchrun import end, train_with_two


def tiny_config(**model):
    return parse_config({"model": tiny_model() | model, "train": {"precision": "fp32"}})


def settings(**train):
    return {
        "epochs": 4,
        "max_nonfinite_steps": 3,
        "best_metric": "",
        "eval_every_epochs": 0,
    } | train


def test_a_skipped_step_changes_nothing(fails):
    convolutions = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    config = tiny_config(vision=convolutions)
    trainer = Trainer(build_towers(config.model, 0.07, 0), config, World())
    images = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    batch = PairBatch(images, torch.from_numpy(tokenize(["red", "green", "blue"])), ["a", "b", "c"])
    trainer.take_step(batch, 0, 0.1)
    before = {name: value.clone() for name, value in trainer.towers.clip.state_dict().items()}
    moments = [dict(state) for state in trainer.optimizer.state_dict()["state"].values()]
    fails(lambda number, _: number == 2)
    assert math.isnan(trainer.take_step(batch, 1, 0.2).grad_norm)
    for name, value in trainer.towers.clip.state_dict().items():
        assert torch.equal(value, before[name]), name
    for was, now in zip(moments, trainer.optimizer.state_dict()["state"].values(), strict=True):
        assert was["step"] == now["step"]
    assert (trainer.recovery.skipped_steps, trainer.recovery.last_finite_step) == (1, 1)
    trainer.take_step(batch, 2, 0.3)
    assert (trainer.recovery.consecutive_skipped, trainer.recovery.last_finite_step) == (0, 3)
    changed = trainer.towers.clip.state_dict()
    assert any(not torch.equal(changed[name], before[name]) for name in before)


def test_a_run_rolls_back_to_the_last_good_checkpoint_with_a_lower_rate(
    colour_folder, tmp_path, fails, monkeypatch, capsys
):
    # Checkpoints every three steps. Steps 8 to 10 fail, so checkpoint 9 is not a good one.
    fails(lambda number, rate: rate == 1 and number >= 8)
    config = configured(colour_folder, train=settings())
    run = train(config, tmp_path / "run").run
    lines = read_log(run)
    (back,) = [line for line in lines if line.get("kind") == "rollback"]
    assert (back["step"], back["rolled_back_to"]) == (10, 6)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 11), *range(7, 13)]
    rates = [line["lr"] for line in lines if line["step"] == 7 and "loss" in line]
    assert rates[1] == rates[0] / 2
    assert "rolling back to step 6" in capsys.readouterr().err
    assert steps(run) == [9, 12]
    # The same in two runs: six steps, then the rest at half the rate.
    monkeypatch.undo()
    stopped(monkeypatch, 7)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "manual")
    monkeypatch.undo()
    whole_rate = step_module.learning_rate
    monkeypatch.setattr(step_module, "learning_rate", lambda *args: whole_rate(*args) / 2)
    train(config, tmp_path / "manual", resume=True)
    ours, theirs = last_weights(run), last_weights(tmp_path / "manual")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stopped(monkeypatch, at, rollbacks=0):
    """Make a run die after a step, once it has rolled back so many times."""
    original = TrainingLoop._after_step

    def die(loop):
        if (loop.step, loop.trainer.recovery.rollbacks) == (at, rollbacks):
            raise RuntimeError("killed")
        return original(loop)

    monkeypatch.setattr(TrainingLoop, "_after_step", die)


@pytest.mark.parametrize(("at", "rollbacks"), [(9, 0), (8, 1), (10, 1), (11, 1)])
def test_a_run_that_rolled_back_resumes_as_if_never_interrupted(
    colour_folder, tmp_path, fails, monkeypatch, at, rollbacks
):
    fails(lambda number, rate: rate == 1 and number >= 8)
    config = configured(colour_folder, train=settings())
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        stopped(patch, at, rollbacks)
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("at", [pytest.param(5, marks=pytest.mark.slow), 7])
def test_an_interrupt_does_not_change_where_a_run_rolls_back_to(
    colour_folder, tmp_path, fails, monkeypatch, at
):
    # Checkpoints every three steps; steps 9 to 11 fail, so the run rolls back to step 6.
    fails(lambda number, rate: rate == 1 and number >= 9)
    config = configured(colour_folder, train=settings(save_every_minutes=0))
    train(config, tmp_path / "whole")
    original = TrainingLoop._after_step

    def interrupting(loop):
        if loop.step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(loop)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_after_step", interrupting)
        assert train(config, tmp_path / "run").step == at
    assert steps(tmp_path / "run")[-1] == at
    # Save an interim checkpoint at each step, too.
    often = configured(colour_folder, train=settings(save_every_minutes=1e-9))
    train(often, tmp_path / "run", resume=True)
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_without_a_good_checkpoint_it_rolls_back_to_the_initial_weights(
    colour_folder, tmp_path, fails, monkeypatch
):
    fails(lambda number, rate: rate == 1 and number >= 2)
    run = train(configured(colour_folder, train=settings()), tmp_path / "run").run
    monkeypatch.undo()
    lines = read_log(run)
    (number,) = [i for i, line in enumerate(lines) if line.get("kind") == "rollback"]
    assert lines[number]["rolled_back_to"] == 0
    half = configured(colour_folder, train=settings(), optim={"lr": 1.5e-3})
    train(half, tmp_path / "half")
    assert curve(run)[number + 1 :] == curve(tmp_path / "half")
    ours, theirs = last_weights(run), last_weights(tmp_path / "half")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("at", [3, 12])
@pytest.mark.parametrize("measured", [True, False])
def test_non_finite_weights_roll_the_run_back(colour_folder, tmp_path, monkeypatch, at, measured):
    """A step with a finite gradient leaves non-finite weights, just before a checkpoint."""
    take_step = Trainer.take_step

    def breaking(self, batch, step, progress):
        report = take_step(self, batch, step, progress)
        if step + 1 == at and self.recovery.lr_factor == 1:
            self.network.clip.visual.proj.data.fill_(math.inf)
        return report

    monkeypatch.setattr(Trainer, "take_step", breaking)
    train_settings = settings(eval_every_epochs=1.0 if measured else 0.0)
    run = train(configured(colour_folder, train=train_settings), tmp_path / "run").run
    lines = read_log(run)
    (back,) = [line for line in lines if "rolled_back_to" in line]
    assert (back["step"], back["rolled_back_to"]) == (at, max(0, at - 3))
    assert f"weights or its vectors are not finite after step {at}" in back["warning"]
    assert [line["step"] for line in lines if "held_out" in line] == (
        [3, 6, 9, 12] if measured else [12]
    )
    assert all(torch.isfinite(tensor).all() for tensor in last_weights(run).values())


def test_the_factor_on_the_learning_rate_is_configurable(colour_folder, tmp_path, fails):
    fails(lambda number, rate: rate == 1 and number >= 5)
    config = configured(colour_folder, train=settings(rollback_lr_factor=0.25))
    lines = read_log(train(config, tmp_path / "run").run)
    rates = [line["lr"] for line in lines if line["step"] == 4 and "loss" in line]
    assert rates[1] == rates[0] / 4


def test_the_last_good_checkpoint_is_not_pruned(colour_folder, tmp_path, fails):
    fails(lambda number, rate: rate == 1 and number >= 5)
    run = train(configured(colour_folder, train=settings(keep_last=1)), tmp_path / "run").run
    (back,) = [line for line in read_log(run) if "rolled_back_to" in line]
    assert (back["step"], back["rolled_back_to"]) == (7, 3)
    assert steps(run) == [12]


def test_a_run_stops_after_the_maximum_number_of_rollbacks(colour_folder, tmp_path, fails):
    fails(lambda number, _: number >= 8)
    config = configured(colour_folder, train=settings(keep_last=3, max_rollbacks=2))
    with pytest.raises(
        TrainingError, match=r"up to step 10, after 2 rollbacks.*0\.25 times.*lower"
    ):
        train(config, tmp_path / "run")
    assert [
        line["rolled_back_to"] for line in read_log(tmp_path / "run") if "rolled_back_to" in line
    ] == [6, 6]


def test_a_checkpoint_followed_only_by_non_finite_steps_is_not_good(colour_folder, tmp_path, fails):
    # Every step after checkpoint 6 fails, as if step 6 had broken the weights.
    fails(lambda number, rate: rate == 1 and number >= 7)
    run = train(configured(colour_folder, train=settings(keep_last=3)), tmp_path / "run").run
    assert [line["rolled_back_to"] for line in read_log(run) if "rolled_back_to" in line] == [3]


@pytest.mark.parametrize("max_nonfinite_steps", [3, 100])
def test_a_run_without_a_finite_step_is_an_error(
    colour_folder, tmp_path, fails, max_nonfinite_steps
):
    fails(lambda *_: True)
    with pytest.raises(TrainingError, match=r"steps.*and none before.*fp32.*clipkit data check"):
        train(
            configured(colour_folder, train=settings(max_nonfinite_steps=max_nonfinite_steps)),
            tmp_path / "run",
        )


def test_two_processes_roll_back_together(colour_folder, tmp_path):
    """The first step breaks the weights: the run rolls back to the initial ones, then fails."""
    config = configured(
        colour_folder,
        optim={"name": "sgd", "lr": 1e30, "warmup": 0.0},
        train=settings(batch_size=4, max_rollbacks=1),
    )
    with pytest.raises(TrainingError) as alone:
        train(config, tmp_path / "alone")
    output, code = end(train_with_two(config, tmp_path / "two"))
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    wanted = str(alone.value).replace(str(tmp_path / "alone"), str(tmp_path / "two"))
    assert errors == [f"error: {wanted}"], output
    assert "up to step 4, after 1 rollbacks" in wanted
    for run in ("alone", "two"):
        warnings = [line for line in read_log(tmp_path / run) if "warning" in line]
        assert [line["kind"] for line in warnings] == ["skipped", "rollback"]
        assert warnings[1]["rolled_back_to"] == 0
