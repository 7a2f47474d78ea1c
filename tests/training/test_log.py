"""The log of a run is strict JSON, also if numbers are not finite, and its readers accept it."""

import json
import math
import re

import numpy as np
import pytest

from clipkit.config import parse_config
from clipkit.reports.plots import plot_run
from clipkit.tasks.plot import plot_runs
from clipkit.tasks.train import train
from clipkit.training.log import log_line, read_log
from clipkit.training.loop import TrainingLoop
from clipkit.training.warnings import RunMonitor
from tests.helpers.faults import dies
from tests.helpers.runs import LINES, assert_same_run, configured

CLOCK = ("seconds", "samples_per_second", "waiting_for_data")


def strict(run):
    """The lines, parsed by a reader that accepts only RFC 8259."""

    def refuse(name):
        raise AssertionError(f"{name} is not valid JSON")

    text = (run / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def lines_without_times(run):
    kept = [{k: v for k, v in line.items() if k not in CLOCK} for line in strict(run)]
    return [json.dumps(line) for line in kept]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_null_at_any_depth(tmp_path, value):
    line = {"step": 3, "loss": value, "lr": 0.1, "held_out": {"r1": value, "r5": 0.5}}
    (tmp_path / "log.jsonl").write_text(log_line(line))
    assert strict(tmp_path) == [line | {"loss": None, "held_out": {"r1": None, "r5": 0.5}}]
    (read,) = read_log(tmp_path)
    nothing = line | {"loss": math.nan, "held_out": {"r1": math.nan, "r5": 0.5}}
    np.testing.assert_equal(read, nothing)


def test_numbers_keep_all_digits(tmp_path):
    numbers = np.random.default_rng(0).normal(size=200).tolist()
    text = "".join(log_line({"step": i, "loss": x}) for i, x in enumerate(numbers))
    (tmp_path / "log.jsonl").write_text(text)
    assert "".join(map(log_line, read_log(tmp_path))) == text
    assert [line["loss"] for line in read_log(tmp_path)] == numbers


def test_old_and_truncated_logs_are_read(tmp_path):
    text = '{"step": 1, "loss": NaN, "grad_norm": Infinity}\n{"step": 2, "loss": 1.5}\n{"step": 3, '
    (tmp_path / "log.jsonl").write_text(text)
    one, two = read_log(tmp_path)
    assert math.isnan(one["loss"])
    assert two == {"step": 2, "loss": 1.5}


def test_a_skipped_step_is_null_and_a_resumed_run_logs_the_same(
    colour_folder, tmp_path, fails, monkeypatch
):
    fails(lambda number, _: number in (2, 8, 12))
    config = configured(colour_folder)
    whole = train(config, tmp_path / "whole").run
    losses = {line["step"]: line["loss"] for line in strict(whole) if "loss" in line}
    assert [step for step, loss in losses.items() if loss is None] == [2, 8, 12]
    norms = [line["grad_norm"] for line in strict(whole) if "grad_norm" in line]
    assert [norm is None for norm in norms] == [loss is None for loss in losses.values()]

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        dies(patch, TrainingLoop, "_after_step", 10)
        train(config, tmp_path / "parts")
    # Older versions wrote NaN; their runs can be resumed too.
    log = tmp_path / "parts" / "log.jsonl"
    before = log.read_text(encoding="utf-8")
    log.write_text(before.replace("null", "NaN"), encoding="utf-8")
    train(config, tmp_path / "parts", resume=True)
    kept = before.splitlines(keepends=True)
    kept = kept[: 1 + max(i for i, line in enumerate(kept) if '"held_out"' in line)]
    assert "null" in "".join(kept)
    assert log.read_text(encoding="utf-8").startswith("".join(kept))
    assert lines_without_times(tmp_path / "parts") == lines_without_times(whole)
    assert_same_run(whole, tmp_path / "parts")


def test_readers_ignore_null(colour_folder, tmp_path, fails):
    fails(lambda number, _: number in (3, 12))
    run = train(configured(colour_folder), tmp_path / "run").run
    page = (run / "report.html").read_text(encoding="utf-8")
    last = next(line["loss"] for line in strict(run) if "loss" in line and line["step"] == 11)
    assert f"<b>{last:.3f}</b><span>final loss</span>" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    image = plot_runs([run])._repr_png_()
    assert image.startswith(b"\x89PNG")
    gap = [LINES[0], LINES[1] | {"loss": math.nan}, *LINES[2:]]
    drawn = plot_run(gap, "a run").figure.axes[0].lines[0].get_ydata()
    np.testing.assert_equal(drawn, [4.0, math.nan])


def test_warnings_ignore_skipped_steps():
    """Every other step is skipped; the others are stuck, which ten logged steps show."""
    settings = {"optim": {"warmup": 0.0}, "train": {"log_every_steps": 10, "batch_size": 64}}
    monitor = RunMonitor(parse_config(settings), 1000, ())
    warnings = []
    for step in range(10, 601, 10):
        loss = 4.0 if step % 20 else math.nan
        line = {"step": step, "loss": loss, "chance_loss": 4.0, "scale": 20.0, "seconds": 1.0}
        warnings += [(step, about) for about, _ in monitor.update(line | {"waiting_for_data": 0.0})]
    assert warnings == [(190, "stuck")]
