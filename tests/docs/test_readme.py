"""Every command block of the README runs, in order, in one workspace."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

from clipkit.cli import app
from scripts.docs import readme
from tests.helpers.colours import COLOURS
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("clipkit ") and not line.startswith("clipkit serve ")
]
SERVED = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("clipkit serve ")
]
SETUP = [
    block.strip()
    for language, block in BLOCKS
    if language == "bash" and not block.startswith("clipkit ")
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Photos with captions and albums as class folders, as the README assumes."""
    folder = tmp_path_factory.mktemp("readme")
    for label, colour in zip(("dog", "beach", "snow"), COLOURS.values(), strict=True):
        for number in range(4):
            shade = tuple(max(0, value - 9 * number) for value in colour)
            for place in (folder / "photos", folder / "albums" / label):
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (120, 90), shade).save(place / f"{label}-{number}.jpg")
            (folder / "photos" / f"{label}-{number}.txt").write_text(f"a {label} outside\n")
    return folder


def run_command(line):
    """What a command prints on stdout."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors), pytest.raises(SystemExit) as end:
        app(shlex.split(line)[1:])
    assert not end.value.code, f"{line}: {errors.getvalue()}"
    return out.getvalue()


@pytest.fixture(scope="module")
def printed(workspace, tiny_checkpoint):
    """What each command prints; the later blocks use what the commands write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        # The default model is downloaded; a tiny one stands in for it.
        patch.setattr("clipkit.models.loading.DEFAULT_MODEL", str(tiny_checkpoint))
        return [run_command(line) for line in COMMANDS]


@pytest.mark.filterwarnings("default")
def test_every_clipkit_command_works_as_shown(printed):
    assert len(COMMANDS) >= 15
    shown = "".join(block for language, block in BLOCKS if language == "text")
    for line, out in zip(COMMANDS, printed, strict=True):
        assert out.strip() or "--csv" in line, f"{line} printed nothing"
    for line, header in (
        ("clipkit search", "rank  score  key"),
        ("clipkit classify", "key"),
    ):
        found = next(out for text, out in zip(COMMANDS, printed, strict=True) if line in text)
        first = found.splitlines()[0]
        assert first.split()[: len(header.split())] == header.split()
        assert " ".join(first.split()) in " ".join(shown.split())


@pytest.mark.filterwarnings("default")
def test_the_python_block_works_as_shown(printed, workspace, monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(workspace)
    assert printed
    assert (workspace / "run").is_dir()
    (code,) = (block for language, block in BLOCKS if language == "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["hits"]) == 3
    assert names["vector"].shape == (256,)
    assert names["vectors"].shape == (2, 256)
    assert len(names["predictions"]) == 12
    assert "text_to_image_r1" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_the_server_answers_as_shown(printed, workspace):
    """The same words, on a port that is free."""
    assert printed
    assert (workspace / "index").is_dir()
    (line,) = SERVED
    command = [sys.executable, "-m", *shlex.split(line), "--port", "0"]
    with subprocess.Popen(command, cwd=workspace, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(
                found[0] for text in server.stderr if (found := re.search(r"http://[\w.:]+", text))
            )
            with urlopen(f"{address}/search?q=a+dog&k=2", timeout=30) as answer:
                assert len(json.load(answer)["hits"]) == 2
            with urlopen(address, timeout=30) as page:
                assert b"<html" in page.read()
        finally:
            server.send_signal(signal.SIGINT)
    assert server.returncode in (0, 130)


def test_the_setup_commands_exist():
    assert SETUP == ["pip install .", "bash scripts/demo.sh", "bash scripts/test.sh"]
    for command in SETUP[1:]:
        script = ROOT / command.removeprefix("bash ")
        subprocess.run(["bash", "-n", script], check=True)
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert {"serve", "map", "heif", "tensorboard", "gpu"} <= set(extras)


def test_the_generated_parts_are_up_to_date():
    assert readme.render(README) == README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230


def test_the_demo_script_runs(tmp_path):
    """`bash scripts/demo.sh` whole, with seconds of training, in the environment of this test."""
    pytest.importorskip("emoji", reason="the demo extra is not installed")
    if sys.prefix == sys.base_prefix:
        pytest.skip("not in a virtual environment, into which the script would install")
    command = ["bash", "scripts/demo.sh", "--out", tmp_path / "demo", "--minutes", "0.1"]
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert "data:image/" in page
    assert str(tmp_path / "demo" / "index.html") in done.stdout
