"""The report of a run as HTML, and its curves by value."""

import math
import re

import pytest

from clipkit.data.open_source import open_source
from clipkit.display.svg import MAX_POINTS, Scale, Series, chart
from clipkit.errors import TrainingError
from clipkit.models.tokenizer import TruncationReport
from clipkit.reports.run import RunSummary, changed_settings, render_run, run_page
from clipkit.tasks.train import train
from tests.helpers.pages import read_page
from tests.helpers.runs import configured

EVIL = '<script>alert("1")</script> & "more"'


def polylines(svg):
    return [
        [tuple(map(float, place.split(","))) for place in line.split()]
        for line in re.findall(r'points="([^"]+)"', svg)
    ]


def test_a_curve_has_its_points_in_proportion():
    svg = chart([Series("a", [(0, 0.0), (50, 10.0), (100, 5.0)])], "step", Scale(low=0, high=10))
    ((first, middle, last),) = polylines(svg)
    assert first[0] < middle[0] < last[0]
    assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.2)
    # Up is less in a drawing.
    assert first[1] - last[1] == pytest.approx((first[1] - middle[1]) / 2, abs=0.2)


def test_a_logarithmic_curve():
    svg = chart([Series("a", [(1, 1.0), (2, 10.0), (3, 100.0), (4, 0.0)])], "step", Scale(log=True))
    ((first, middle, last),) = polylines(svg)
    assert first[1] - middle[1] == pytest.approx(middle[1] - last[1], abs=0.2)
    assert all(f">{value}</text>" in svg for value in (1, 10, 100))


def test_a_curve_breaks_where_the_run_went_back_or_a_value_is_not_finite():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, 3.0), (3, 2.0), (4, 2.0)]
    svg = chart([Series("a", points)], "step", Scale())
    assert [len(line) for line in polylines(svg)] == [2, 2, 2]
    assert "nan" not in svg


def test_a_long_curve_is_thinned_but_keeps_its_spike():
    points = [(x, 100.0 if x == 7777 else 1.0 + x % 2) for x in range(20_000)]
    (line,) = polylines(chart([Series("a", points)], "step", Scale(low=0)))
    assert MAX_POINTS / 2 < len(line) <= MAX_POINTS
    assert line[0][0] == min(x for x, _ in line)
    top = min(y for _, y in line)
    assert sum(y == top for _, y in line) == 1


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(5, 3.0)], [(1, 0.0), (2, 0.0)]])
def test_curves_of_little_or_nothing(points):
    svg = chart([Series("a", points)], "step", Scale())
    assert ("No data." in svg) == (not any(math.isfinite(y) for _, y in points))
    assert "nan" not in svg


def summary(folder, **changes):
    recall = {f"{way}_r{k}": 0.25 for way in WAYS for k in (1, 5, 10)}
    lines = [
        {"step": 8, "held_out": recall},
        {"step": 10, "loss": 2.0, "chance_loss": 2.5, "lr": 1e-3, "scale": 14.0, "grad_norm": 3.0}
        | {"samples_per_second": 80.0, "waiting_for_data": 0.25, "seconds": 1.0},
        {"step": 10, "kind": "stuck", "warning": EVIL},
        {"step": 10, "kind": "rollback", "warning": "back", "rolled_back_to": 4},
    ]
    facts = {
        "path": folder / EVIL.replace("/", "-"),
        "state": "interrupted",
        "step": 10,
        "seconds": 90.0,
        "findings": [EVIL],
        "recall": recall,
        "best": {"metric": "text_to_image_r1", "value": 0.5, "step": 8},
        "lines": lines,
        "cut": TruncationReport(),
        "skipped": {EVIL: EVIL},
        "drawn": {},
        "skipped_steps": 7,
    }
    facts["cut"].add(f"{EVIL} " * 90, range(1000))
    return RunSummary(**facts | changes)


WAYS = ("text_to_image", "image_to_text")


def test_the_page_is_well_formed_and_escaped(colour_folder, tmp_path):
    source = open_source(colour_folder)
    config = configured(EVIL, model={"name": EVIL})
    page = run_page(config, summary(tmp_path), source, source)
    text, _ = read_page(render_run(page), links=["skipped.jsonl"])
    assert text.count(EVIL) >= 6
    for shown in (
        *("Interrupted after 10 steps of 3 pairs in 90 seconds, on 12 images", "--resume"),
        *("2.000", "80", "25%", "25.0%", "8.3%", "step 10", "back", "50.0% at step 8"),
    ):
        assert shown in text, shown


def test_the_chance_level_follows_the_log(colour_folder, tmp_path):
    source = open_source(colour_folder)
    known = summary(tmp_path)
    older = [{k: v for k, v in line.items() if k != "chance_loss"} for line in known.lines]
    config = configured(colour_folder)
    pages = [
        run_page(config, summary(tmp_path, lines=lines), source, source)
        for lines in (known.lines, older)
    ]
    assert [page.chance_loss for page in pages] == [2.5, None]
    assert [">chance</text>" in render_run(page) for page in pages] == [True, False]


def test_settings_other_than_defaults():
    shown = {name: (value, default) for name, value, default in changed_settings(configured("d"))}
    assert shown["optim.lr"] == ("0.003", "0.0005")
    assert shown["data.train"] == ("d", "none")
    assert "optim.weight_decay" not in shown


def test_finished_and_failed_runs_have_a_report(colour_folder, tmp_path, fails):
    (colour_folder / "red-0.png").write_bytes(b"no image")
    (colour_folder / "red-1.txt").write_text("red " * 100)
    config = configured(
        colour_folder, data={"val_fraction": 0.25, "max_skipped_fraction": 0.5}, train={"epochs": 2}
    )
    run = train(config, tmp_path / "run").run
    text, _ = read_page((run / "report.html").read_text(encoding="utf-8"), links=["skipped.jsonl"])
    assert "Finished after 6 steps of 3 pairs" in text
    assert "local-dir:run/step-6" in text
    assert "--resume" not in text
    for shown in ("train.batch_size", "skipped.jsonl", "clipkit index build", "text→image R@1"):
        assert shown in text, shown
    fails(lambda *_: True)
    bad = configured(
        colour_folder, data={"max_skipped_fraction": 0.5}, train={"max_nonfinite_steps": 2}
    )
    with pytest.raises(TrainingError):
        train(bad, tmp_path / "bad")
    text, _ = read_page((tmp_path / "bad" / "report.html").read_text(), links=["skipped.jsonl"])
    assert "Failed after 2 steps" in text
    assert "--resume" in text
    assert "local-dir" not in text  # there is no checkpoint to load
