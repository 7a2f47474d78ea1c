"""Suites: new and existing results, tables of results, CLIP_benchmark's layout."""

import csv
import json
import sys
import warnings

import pyarrow.parquet as pq
import pytest

import clipkit
from clipkit.cli import main
from clipkit.data.labels import Label
from clipkit.data.open_source import open_source
from clipkit.errors import ConfigError, DataError
from clipkit.evaluation.clip_benchmark import open_benchmark
from clipkit.evaluation.suite import read_suite
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from tests.helpers.colours import COLOURS, picture
from tests.helpers.toys import png, write_tar

LABELS = list(COLOURS)


@pytest.fixture
def benchmark(tmp_path):
    """Twelve pictures of three classes in two shards, as clip_benchmark_export_wds writes them."""
    root = tmp_path / "wds"
    for shard in range(2):
        items = []
        for number in range(6):
            place = 6 * shard + number
            items.append((f"s{place}.png", png(picture(LABELS[place % 3], place))))
            items.append((f"s{place}.cls", str(place % 3).encode()))
        write_tar(root / "test" / f"{shard}.tar", items)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("red: a\ngreen/x\nblue\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    return root


@pytest.fixture
def suite(tmp_path, benchmark, colour_folder):
    """A suite of a folder with captions, class folders and a benchmark."""
    for place, name in enumerate(LABELS * 3):
        (tmp_path / "albums" / name).mkdir(parents=True, exist_ok=True)
        picture(name, place).save(tmp_path / "albums" / name / f"{place}.png")
    file = tmp_path / "suite.toml"
    file.write_text(
        """
        [[set]]
        name = "captions"
        data = "colours"
        task = "retrieval"

        [[set]]
        name = "albums"
        data = "albums"
        task = "zero-shot"
        templates = "simple"

        [[set]]
        name = "wds"
        data = "wds"
        """
    )
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed.err
        return printed.out, printed.err

    return run


def test_a_suite_measures_what_single_commands_measure(
    run, suite, tiny_checkpoint, tmp_path, benchmark
):
    words = ["eval", "suite", suite, "--model", tiny_checkpoint, "--out", tmp_path / "results"]
    out, _ = run(*words, "--json")
    found = {one["set"]: one for one in map(json.loads, out.splitlines())}
    encoder = clipkit.load_model(tiny_checkpoint)
    given = open_benchmark(benchmark, "test")
    wanted = {
        "captions": evaluate_retrieval(open_source(tmp_path / "colours"), encoder, progress=False),
        "albums": evaluate_zero_shot(
            open_source(tmp_path / "albums"),
            encoder,
            sorted(LABELS),
            clipkit.data.prompts.read_templates("simple"),
            progress=False,
        ),
        "wds": evaluate_zero_shot(
            given.source, encoder, given.labels, ["a photo of {}.", "{}"], progress=False
        ),
    }
    for name, report in wanted.items():
        values = {metric: one["value"] for metric, one in found[name]["metrics"].items()}
        assert values == pytest.approx(report.metrics, abs=1e-6, nan_ok=True), name
        assert found[name]["data_fingerprint"] == report.fingerprint
        assert found[name]["model_fingerprint"] == encoder.model.fingerprint

    with (tmp_path / "results" / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == sum(len(one["metrics"]) for one in found.values())
    for row, same in zip(
        rows, pq.read_table(tmp_path / "results" / "results.parquet").to_pylist(), strict=True
    ):
        assert (row["set"], row["metric"]) == (same["set"], same["metric"])
        assert float(row["value"]) == pytest.approx(same["value"], nan_ok=True)
    top1 = next(row for row in rows if (row["set"], row["metric"]) == ("wds", "top1"))
    assert float(top1["value"]) == pytest.approx(wanted["wds"].metrics["top1"])
    assert float(top1["low"]) <= float(top1["value"]) <= float(top1["high"])


def test_an_existing_result_is_neither_measured_nor_written_again(
    run, suite, tiny_checkpoint, tmp_path, monkeypatch
):
    words = ["eval", "suite", suite, "--model", tiny_checkpoint, "--out", tmp_path / "results"]
    first, err = run(*words)
    assert err.count(": evaluated") == 3
    files = {f: f.read_bytes() for f in (tmp_path / "results" / "records").iterdir()}
    monkeypatch.setattr("clipkit.tasks.suite.evaluate_zero_shot", None)
    monkeypatch.setattr("clipkit.tasks.suite.evaluate_retrieval", None)
    again, err = run(*words)
    assert err.count(": already evaluated") == 3
    assert again == first
    assert {f: f.read_bytes() for f in files} == files
    monkeypatch.undo()
    # Other templates give another result beside the first one.
    suite.write_text(suite.read_text().replace('"simple"', '"openai"'))
    monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
    with pytest.raises(SystemExit):
        main()
    assert len(list((tmp_path / "results" / "records").iterdir())) == 4
    table = pq.read_table(tmp_path / "results" / "results.parquet").to_pylist()
    assert sum(row["set"] == "albums" and row["metric"] == "top1" for row in table) == 2


def test_one_bad_set_does_not_cost_the_others(run, suite, tiny_checkpoint, tmp_path):
    suite.write_text(suite.read_text().replace('"albums"', '"nowhere"'))
    words = ["eval", "suite", suite, "--model", tiny_checkpoint, "--out", tmp_path / "results"]
    _, err = run(*words, code=1)
    assert "nowhere does not exist" in err
    assert "1 of 3 data sets could not be evaluated (nowhere; see above)" in err
    assert len(list((tmp_path / "results" / "records").iterdir())) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no \[\[set\]\] table"),
        ("nonsense", "cannot read the suite"),
        ('model = "x"\n[[set]]\nname = "a"\ndata = "b"', "has the unknown key 'model'"),
        ('[[set]]\nname = "a"', "lacks its name or data"),
        ('[[set]]\nname = "a"\ndata = "b"\nlabel = "c"', "did you mean labels"),
        ('[[set]]\nname = "a"\ndata = 3', "data = 3, expected a text in quotes"),
        (
            '[[set]]\nname = "a"\ndata = "b"\ntask = "magic"',
            "task = 'magic', expected retrieval or zero-shot",
        ),
        ('[[set]]\nname = "a"\ndata = "b"\nequal_captions = "x"', "expected merge or apart"),
        ('[[set]]\nname = "a"\ndata = "b"\n' * 2, "has two sets named 'a'"),
    ],
)
def test_suites_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "suite.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_suite(tmp_path / "suite.toml")


def test_a_set_without_a_task_is_refused(run, tiny_checkpoint, colour_folder, tmp_path):
    (tmp_path / "s.toml").write_text('[[set]]\nname = "a"\ndata = "colours"')
    words = ["eval", "suite", tmp_path / "s.toml", "--model", tiny_checkpoint]
    _, err = run(*words, "--out", tmp_path / "results", code=1)
    assert 'write task = "zero-shot" or "retrieval"' in err


# CLIP_benchmark's layout


def test_classes_have_the_names_of_their_numbers(benchmark):
    found = open_benchmark(benchmark, "test")
    assert found.task == "zero-shot"
    names = ["red: a", "green/x", "blue"]  # as they are: no synonyms, no groups
    assert found.labels == [Label(name) for name in names]
    assert found.templates == ["a photo of {}.", "{}"]
    rows = list(found.source.rows)
    assert [row.label for row in rows] == ["red: a", "green/x", "blue"] * 4
    assert rows[7].key == "1.tar/s7.png"


def test_a_retrieval_set_has_captions(benchmark):
    (benchmark / "dataset_type.txt").write_text("retrieval\n")
    items = [("a.jpg", png(picture("red", 0))), ("a.txt", b"one\ntwo\n")]
    write_tar(benchmark / "test" / "0.tar", items)
    (benchmark / "test" / "nshards.txt").write_text("1")
    found = open_benchmark(benchmark, "test")
    assert found.task == "retrieval"
    assert [row.captions for row in found.source.rows] == [["one", "two"]]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test/nshards.txt", "two", "holds 'two', expected the number of tars"),
        ("test/nshards.txt", "3", "2.tar does not exist, expected 3 tars"),
        ("classnames.txt", "\n", "classnames.txt is empty"),
        ("classnames.txt", None, "cannot read .*classnames.txt"),
        ("zeroshot_classification_templates.txt", None, "cannot read .*templates.txt"),
        ("dataset_type.txt", "captioning", "'captioning', expected retrieval or classification"),
    ],
)
def test_layouts_that_are_damaged(benchmark, file, content, message):
    if content is None:
        (benchmark / file).unlink()
    else:
        (benchmark / file).write_text(content)
    with pytest.raises(DataError, match=message):
        open_benchmark(benchmark, "test")


def test_a_class_number_without_a_name_is_refused(benchmark, tiny_checkpoint):
    (benchmark / "classnames.txt").write_text("red\ngreen\n")
    found = open_benchmark(benchmark, "test")
    encoder = clipkit.load_model(tiny_checkpoint)
    with pytest.raises(DataError, match="has the class '2', expected a number below 2"):
        evaluate_zero_shot(found.source, encoder, found.labels, found.templates, progress=False)
