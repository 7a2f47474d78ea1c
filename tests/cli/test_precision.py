"""``--precision``: every command that encodes hands it to the model that it loads."""

import sys
import warnings
from types import SimpleNamespace

import pytest
from PIL import Image

import clipkit
from clipkit.cli import main
from clipkit.models import loading
from clipkit.tasks.index import build_index
from tests.helpers.colours import COLOURS


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; returns the precisions that models were asked for."""
    asked = []
    prepare = loading.prepare
    monkeypatch.setattr(
        loading,
        "prepare",
        lambda clip, setting, *a: (asked.append(setting), prepare(clip, setting, *a))[1],
    )

    def run(*words, code=0):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed.err
        return list(asked), printed.out

    return run


@pytest.fixture
def albums(tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / "albums" / name).mkdir(parents=True)
        for number in range(6):
            shade = tuple(max(0, value - 9 * number) for value in colour)
            Image.new("RGB", (20, 20), shade).save(tmp_path / "albums" / name / f"{number}.png")
    (tmp_path / "suite.toml").write_text(
        '[[set]]\nname = "albums"\ndata = "albums"\ntask = "zero-shot"'
    )
    return tmp_path / "albums"


@pytest.mark.parametrize(
    "words",
    [
        "eval retrieval {colours} --model {model}",
        "eval zero-shot {albums} --labels red,green,blue --model {model}",
        "eval suite {albums}/../suite.toml --out {albums}/../results --model {model}",
        "eval compare {model} {model} --data {colours}",
        "eval probe {albums} --shots 1 --seeds 1 --methods neighbours --model {model}",
        "classify {albums} --labels red,green,blue --model {model}",
        "embed {albums} --out {albums}/../store --model {model}",
        "index build {albums} --out {albums}/../index --model {model}",
    ],
    ids=lambda words: " ".join(words.split("{")[0].split()),
)
def test_a_model_is_loaded_in_the_precision_that_was_named(
    run, words, albums, colour_folder, tiny_checkpoint
):
    given = words.format(albums=albums, colours=colour_folder, model=tiny_checkpoint).split()
    assert set(run(*given, "--precision", "bf16")[0]) == {"bf16"}
    assert set(run(*given)[0]) == {"auto"}


def test_a_server_encodes_in_the_precision_that_was_named(
    run, colour_folder, tiny_checkpoint, tmp_path, monkeypatch
):
    index = build_index(
        colour_folder, tmp_path / "index", encoder=clipkit.load_model(tiny_checkpoint)
    )
    served = []
    monkeypatch.setattr(
        "clipkit.web.server.server",
        lambda app: SimpleNamespace(run=lambda sockets: served.append(app)),
    )
    words = ["serve", index.path, "--port", "0", "--cache", tmp_path / "thumbs"]
    assert run(*words, "--precision", "bf16", code=130)[0] == ["bf16"]
    assert run(*words, code=130)[0] == ["auto"]
    assert len(served) == 2


def test_help_says_what_a_batch_size_may_be(run):
    _, out = run("embed", "--help")
    assert "--batch-size <int|auto> " in out
    assert "<Any>" not in out.replace("<any>", "<Any>")
