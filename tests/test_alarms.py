"""Alarms during a run, from the lines of its log."""

import math

import pytest
from test_train import configured

from clipkit.config import parse_config
from clipkit.model.alarms import Watch
from clipkit.model.run import read_log
from clipkit.tasks.train import train

CONFIG = parse_config({"optim": {"warmup": 0.1}, "train": {"log_steps": 10, "batch_size": 64}})
GUESS = math.log(64)


def line(step, loss=1.0, scale=20.0, waited=0.1):
    return {"step": step, "loss": loss, "scale": scale, "waiting_for_data": waited, "seconds": 1.0}


def alarms(lines, config=CONFIG, steps=1000, known=()):
    """Step and subject of each alarm."""
    watch = Watch(config, steps, 64, known)
    return [(item["step"], about) for item in lines for about, _ in watch.see(item)]


def test_a_healthy_run_is_left_alone():
    lines = [line(step, loss=GUESS * (1.05 - step / 1000)) for step in range(10, 1001, 10)]
    assert alarms(lines) == []


@pytest.mark.parametrize(
    ("of_guess", "wanted"), [(0.97, []), (0.985, [(190, "stuck")]), (1.3, [(190, "stuck")])]
)
def test_a_loss_stuck_at_guessing_is_told_once_after_the_warm_up(of_guess, wanted):
    # The warm-up ends at step 100; ten lines of the log after it make a hundred steps.
    lines = [line(step, loss=of_guess * GUESS) for step in range(10, 601, 10)]
    assert alarms(lines) == wanted


def test_single_steps_near_guessing_are_no_alarm():
    lines = [line(step, loss=GUESS * (1.0 if step % 20 else 0.9)) for step in range(10, 601, 10)]
    assert alarms(lines) == []


def test_a_temperature_at_its_limit_and_waiting():
    pinned = [line(step, scale=99.99999 if step > 200 else 90.0) for step in range(10, 601, 10)]
    assert alarms(pinned) == [(300, "temperature")]
    starved = [line(step, waited=0.9 if step > 200 else 0.0) for step in range(10, 601, 10)]
    assert alarms(starved) == [(260, "waiting")]


def test_a_resumed_run_says_what_the_whole_run_says():
    lines = [line(step, loss=GUESS, scale=100.0, waited=0.6) for step in range(10, 301, 10)]
    whole = alarms(lines)
    assert sorted(about for _, about in whole) == ["stuck", "temperature", "waiting"]
    for cut in range(len(lines)):
        said = [{"step": step, "about": about, "alarm": "…"} for step, about in whole]
        known = lines[:cut]
        known = known + [item for item in said if item["step"] <= 10 * cut]
        assert alarms(lines[cut:], known=known) == [item for item in whole if item[0] > 10 * cut]


def test_the_clock_ends_the_warm_up_too():
    config = parse_config({"optim": {"warmup": 0.5}, "train": {"minutes": 1, "log_steps": 50}})
    lines = [line(step, loss=GUESS) | {"seconds": step / 50} for step in range(50, 3001, 50)]
    # Half a minute is step 1500; five lines of the log from there on.
    assert alarms(lines, config, steps=0) == [(1700, "stuck")]


def test_an_alarm_is_told_and_logged(colour_folder, tmp_path, capsys):
    config = configured(
        colour_folder,
        optim={"lr": 1e-9},
        train={"epochs": 150, "log_steps": 20, "batch_size": 9, "duplicates": "ignore"}
        | {"eval_epochs": 0, "save_epochs": 0},
    )
    run = train(config, tmp_path / "run").run
    (alarm,) = [item for item in read_log(run) if "alarm" in item]
    assert alarm["step"] == 100
    assert "optim.lr is 1e-09" in alarm["alarm"]
    assert f"warning: step 100: {alarm['alarm']}\n" in capsys.readouterr().err
