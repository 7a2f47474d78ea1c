import json

import numpy as np
import pytest
from PIL import Image

from clipkit.cli import app
from clipkit.errors import ArtifactError
from clipkit.reports.plots import curve, plot_run, smooth
from clipkit.tasks.plot import plot_runs
from tests.helpers.runs import LINES


def test_the_curve_is_a_picture_that_depends_on_the_log(tmp_path):
    for name, lines in (("all", LINES), ("start", LINES[:1]), ("empty", [])):
        plot_run(lines, "a run").save(tmp_path / f"{name}.png")
    sizes = set()
    pixels = set()
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as image:
            sizes.add(image.size)
            pixels.add(image.tobytes())
    assert len(sizes) == 1
    assert len(pixels) == 3


def test_a_curve_by_step_and_by_time_with_a_gap_where_the_run_went_back():
    lines = [
        {"step": 10, "loss": 4.0, "seconds": 30.0},
        {"step": 10, "held_out": {}},
        {"step": 20, "loss": 3.0, "seconds": 60.0},
        {"step": 20, "warning": "…", "kind": "rollback"},
        {"step": 20, "loss": 2.0, "seconds": 90.0},
        {"step": 10, "loss": 1.0, "seconds": 120.0},
    ]

    def loss(line):
        return line.get("loss")

    x, y = curve(lines, "step", loss)
    np.testing.assert_equal(x, [10, 20, 20, np.nan, 10])
    np.testing.assert_equal(y, [4, 3, 2, np.nan, 1])
    assert curve(lines, "time", loss) == ([0.5, 1, 1.5, 2], [4, 3, 2, 1])
    assert curve(lines, "time", lambda line: 1.0 if "held_out" in line else None) == ([0.5], [1.0])


def test_smoothing_is_the_mean_of_the_last_ten():
    values = np.random.default_rng(0).normal(size=50)
    wanted = [values[max(0, i - 9) : i + 1].mean() for i in range(50)]
    np.testing.assert_allclose(smooth(values), wanted)
    np.testing.assert_equal(smooth([1.0, 3.0, np.nan, 5.0]), [1.0, 2.0, np.nan, 5.0])


def test_several_runs_in_one_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, factor in (("a", 1.0), ("b", 0.5), ("b/a", 0.7)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "log.jsonl").open("w") as stream:
            for line in LINES:
                scaled = {k: factor * v if k == "loss" else v for k, v in line.items()}
                stream.write(json.dumps(scaled | {"step": line["step"]}) + "\n")
            stream.write('{"step": 30, "warning": "…"}\n{"step": 40, "lo')  # torn, as by a crash
    pixels = set()
    for number, (runs, by) in enumerate(
        [(["a"], "step"), (["a", "b"], "step"), (["a", "b", "b/a"], "time")]
    ):
        file = tmp_path / "new" / f"{number}.png"
        assert plot_runs(runs, file, by)._repr_png_() == file.read_bytes()
        with Image.open(file) as image:
            assert image.format == "PNG"
            pixels.add(image.tobytes())
    assert len(pixels) == 3


def test_what_cannot_be_drawn(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "log.jsonl").touch()
    for runs, out, sentence in (
        ([tmp_path / "no"], "x.png", "no does not exist, expected the directory of a training run"),
        ([tmp_path], "x.png", r"has no log\.jsonl, expected"),
        ([tmp_path / "begun"], "x.png", "has not logged a step in its log.jsonl yet"),
        ([], "x.png", "no run to plot"),
        ([tmp_path], "x.pdf", "x.pdf is not a PNG file name, expected FILE.png"),
    ):
        with pytest.raises(ArtifactError, match=sentence):
            plot_runs(runs, tmp_path / out)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "run" / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit) as end:
        app(["plot", "run", "--by", "time"])
    assert not end.value.code
    assert capsys.readouterr().out.split() == ["image", "runs.png"]
    assert (tmp_path / "runs.png").is_file()
