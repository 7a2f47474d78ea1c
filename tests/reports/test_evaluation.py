"""The page of an evaluation agrees with the report, and is self-contained."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clipkit.cli import main
from clipkit.evaluation.bootstrap import Estimate
from clipkit.reports.evaluation import (
    Confused,
    confused_pairs,
    confusion_table,
    metrics_table,
)
from tests.helpers.colours import COLOURS


class Balanced(HTMLParser):
    """Fails where a tag is closed that was not open; collects text and pictures."""

    VOID = frozenset({"meta", "img", "br", "line", "polyline", "rect", "circle"})

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attributes)
        self.links += [values[name] for name in ("href", "src") if values.get(name)]
        self.images += [values["alt"]] if tag == "img" else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    page = Balanced()
    page.feed(html)
    assert page.open == []
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    return page


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert not end.value.code, printed.err
        return dict(line.split("  ", 1) for line in printed.out.splitlines())

    return run


def test_the_page_of_a_retrieval(run, colour_folder, tiny_checkpoint, tmp_path):
    (colour_folder / "red-1.txt").write_text("<b>not bold</b>\n")
    (colour_folder / "red-2.txt").unlink()
    words = [colour_folder, "--model", tiny_checkpoint, "--html", tmp_path / "page.html"]
    shown = run("eval", "retrieval", *words)
    html = (tmp_path / "page.html").read_text()
    page = read(html)
    text = " ".join(page.text)
    for name, value in shown.items():
        if name.strip().endswith(("_r1", "_r5", "_map")):
            assert f"{float(value.split()[0]):.0%}" in text.replace(".0%", "%") or re.search(
                rf"{float(value.split()[0]) * 100:.1f}%", text
            ), name
    assert "<b>not bold</b>" in text  # as text: in the file it is escaped
    assert "&lt;b&gt;not bold" in html
    assert "red-2.png: has no caption" in text
    assert page.images  # of captions whose image is far down
    assert "captions equal to an earlier one" in text
    assert "--equal-captions" not in text
    run(*["eval", "retrieval", *words, "--equal-captions", "apart"])
    assert "--equal-captions apart" in (tmp_path / "page.html").read_text()


def test_the_page_of_a_classification(run, tiny_checkpoint, tmp_path):
    generator = np.random.default_rng(0)
    for name in COLOURS:
        (tmp_path / "albums" / name).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "albums" / name / f"{number}.png")
    words = ["--model", tiny_checkpoint, "--labels", ",".join([*COLOURS, "grey"])]
    shown = run(
        *["eval", "zero-shot", tmp_path / "albums", *words, "--html", tmp_path / "page.html"]
    )
    page = read((tmp_path / "page.html").read_text())
    text = " ".join(page.text)
    top1 = float(shown["top1"].split()[0])
    assert f"{top1:.1%} of the predictions are correct; a uniform predictor reaches 25.0%" in text
    assert "labels without an image: 1 of 4 (grey)" in text
    wrong = round(24 * (1 - top1))
    counts = [int(n) for n in re.findall(r": (\d+) images", text)]
    assert sum(counts) == wrong  # all pairs fit on the page
    assert 0 < len(page.images) <= wrong
    assert all(key.split("/")[0] in COLOURS for key in page.images)


def test_what_has_no_value_is_no_number():
    nan = float("nan")
    html = metrics_table({"roc_auc": Estimate(nan, nan, nan)})
    assert "nan" not in html.replace("name", "")
    assert "–" in html


def test_a_large_matrix_is_left_out():
    small = confusion_table(["a", "b"], [[3, 1], [0, 2]])
    assert small.count("<td") == 4
    assert "<td" not in confusion_table([str(n) for n in range(30)], [[0] * 30] * 30)
    assert "All predictions are correct" in confused_pairs([])
    assert "<b>a</b> predicted as <b>b</b>: 2 images" in confused_pairs([Confused("a", "b", 2, [])])
