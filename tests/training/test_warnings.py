"""Warnings during a run, computed from its log."""

import math

import pytest
from PIL import Image

from clipkit.config import parse_config
from clipkit.tasks.train import train
from clipkit.training.run_directory import read_log
from clipkit.training.warnings import RunMonitor
from tests.helpers.runs import configured

CONFIG = parse_config(
    {"optim": {"warmup": 0.1}, "train": {"log_every_steps": 10, "batch_size": 64}}
)
CHANCE = math.log(64)


def line(step, loss=1.0, scale=20.0, waited=0.1):
    of_step = {"step": step, "loss": loss, "chance_loss": CHANCE, "scale": scale, "seconds": 1.0}
    return of_step | {"waiting_for_data": waited}


def warnings(lines, config=CONFIG, steps=1000, known=()):
    """Step and subject of each warning."""
    monitor = RunMonitor(config, steps, known)
    return [(item["step"], about) for item in lines for about, _ in monitor.update(item)]


def test_a_healthy_run_has_no_warnings():
    lines = [line(step, loss=CHANCE * (1.05 - step / 1000)) for step in range(10, 1001, 10)]
    assert warnings(lines) == []


@pytest.mark.parametrize(
    ("of_chance", "expected"), [(0.97, []), (0.985, [(190, "stuck")]), (1.3, [(190, "stuck")])]
)
def test_a_loss_stuck_at_chance_warns_once_after_the_warm_up(of_chance, expected):
    # The warm-up ends at step 100; the ten log lines after it cover a hundred steps.
    lines = [line(step, loss=of_chance * CHANCE) for step in range(10, 601, 10)]
    assert warnings(lines) == expected


def test_single_steps_near_chance_do_not_warn():
    lines = [line(step, loss=CHANCE * (1.0 if step % 20 else 0.9)) for step in range(10, 601, 10)]
    assert warnings(lines) == []


def test_warns_of_a_temperature_at_its_limit_and_of_waiting_for_data():
    pinned = [line(step, scale=99.99999 if step > 200 else 90.0) for step in range(10, 601, 10)]
    assert warnings(pinned) == [(300, "temperature")]
    starved = [line(step, waited=0.9 if step > 200 else 0.0) for step in range(10, 601, 10)]
    assert warnings(starved) == [(260, "waiting")]


def test_a_resumed_run_gives_the_same_warnings():
    lines = [line(step, loss=CHANCE, scale=100.0, waited=0.6) for step in range(10, 301, 10)]
    whole = warnings(lines)
    assert sorted(about for _, about in whole) == ["stuck", "temperature", "waiting"]
    for cut in range(len(lines)):
        logged = [{"step": step, "kind": about, "warning": "…"} for step, about in whole]
        known = lines[:cut]
        known = known + [item for item in logged if item["step"] <= 10 * cut]
        assert warnings(lines[cut:], known=known) == [item for item in whole if item[0] > 10 * cut]


def test_a_time_limit_also_ends_the_warm_up():
    config = parse_config(
        {"optim": {"warmup": 0.5}, "train": {"minutes": 1, "log_every_steps": 50}}
    )
    lines = [line(step, loss=CHANCE) | {"seconds": step / 50} for step in range(50, 3001, 50)]
    # The warm-up ends after half a minute, at step 1500; the next five log lines count.
    assert warnings(lines, config, steps=0) == [(1700, "stuck")]


def test_lines_of_an_older_log_do_not_count():
    old = [
        {k: v for k, v in line(step).items() if k != "chance_loss"} for step in range(10, 201, 10)
    ]
    lines = [line(step, loss=CHANCE) for step in range(210, 401, 10)]
    assert warnings(lines, known=old) == [(300, "stuck")]


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}
FIVE = COLOURS | {"white": (240, 240, 240), "black": (10, 10, 10)}


@pytest.mark.parametrize(("colours", "expected"), [(FIVE, []), (dict.fromkeys(FIVE, 0), ["stuck"])])
def test_a_stuck_run_with_few_distinct_captions_warns(tmp_path, colours, expected):
    """Forty images with five captions, which describe them, or all of them black."""
    folder = tmp_path / "few"
    folder.mkdir()
    for name, colour in colours.items():
        for number in range(8):
            Image.new("RGB", (32, 32), colour).save(folder / f"{name}-{number}.png")
            (folder / f"{name}-{number}.txt").write_text(f"a {name} picture\n")
    config = configured(
        folder,
        data={"val_fraction": 0.0},
        train={"batch_size": 20, "epochs": 60, "log_every_steps": 10}
        | {"eval_every_epochs": 0, "save_every_epochs": 0},
    )
    lines = read_log(train(config, tmp_path / "run").run)
    assert [item["kind"] for item in lines if "warning" in item] == expected
    # Duplicate captions in a batch of twenty are masked; about sixteen negatives are left.
    steps = [item for item in lines if "loss" in item]
    assert all(math.log(14) < item["chance_loss"] < math.log(18) for item in steps)
    # A chance loss of ln(20) would not have warned.
    assert steps[-1]["loss"] < 0.98 * math.log(20)


def test_a_warning_is_printed_and_logged(colour_folder, tmp_path, capsys):
    config = configured(
        colour_folder,
        optim={"lr": 1e-9},
        train={"epochs": 150, "log_every_steps": 20, "batch_size": 9, "duplicates": "ignore"}
        | {"eval_every_epochs": 0, "save_every_epochs": 0},
    )
    run = train(config, tmp_path / "run").run
    (warning,) = [item for item in read_log(run) if "warning" in item]
    assert warning["step"] == 100
    assert "optim.lr is 1e-09" in warning["warning"]
    assert f"warning: step 100: {warning['warning']}\n" in capsys.readouterr().err
