"""The README tells the truth: every command block in it is run, in order, in one workspace."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

from clipkit.cli import app
from tests.helpers.paths import ROOT
from tests.helpers.pictures import COLOURS

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
SCRIPTS = [
    block.strip()
    for language, block in BLOCKS
    if language == "bash" and not block.startswith("clipkit ")
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the README takes for granted: photos with captions, class folders, photos.toml."""
    folder = tmp_path_factory.mktemp("readme")
    for label, colour in zip(("dog", "beach", "snow"), COLOURS.values(), strict=True):
        for number in range(4):
            shade = tuple(max(0, value - 9 * number) for value in colour)
            for place in (folder / "photos", folder / "albums" / label):
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (120, 90), shade).save(place / f"{label}-{number}.jpg")
            (folder / "photos" / f"{label}-{number}.txt").write_text(f"a {label} outside\n")
    (config,) = (block for language, block in BLOCKS if language == "toml")
    (folder / "photos.toml").write_text(config, encoding="utf-8")
    return folder


def run_command(line, capsys):
    """What a command prints on stdout."""
    with pytest.raises(SystemExit) as end:
        app(shlex.split(line)[1:])
    out, errors = capsys.readouterr()
    assert not end.value.code, f"{line}: {errors}"
    return out


@pytest.mark.filterwarnings("default")
def test_every_clipkit_command_works_as_shown(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert len(COMMANDS) >= 10
    printed = [run_command(line, capsys) for line in COMMANDS]
    shown = "".join(block for language, block in BLOCKS if language == "text")
    for line, out in zip(COMMANDS, printed, strict=True):
        assert out.strip(), f"{line} printed nothing"
    for line, header in (
        ("clipkit search", "rank  score  key"),
        ("clipkit classify", "key"),
    ):
        found = next(out for text, out in zip(COMMANDS, printed, strict=True) if line in text)
        first = found.splitlines()[0]
        assert first.split()[: len(header.split())] == header.split()
        assert " ".join(first.split()) in " ".join(shown.split())


@pytest.mark.filterwarnings("default")
def test_the_python_block_works_as_shown(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert (workspace / "run").is_dir(), "the commands run first"
    (code,) = (block for language, block in BLOCKS if language == "python")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 12  # three hits, then a label for each photo


def test_the_server_answers_as_shown(workspace):
    """The same words, on a port that is free."""
    assert (workspace / "index").is_dir(), "the commands run first"
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


def test_the_two_setup_commands_are_what_is_here():
    assert SCRIPTS == ["bash scripts/demo.sh", "bash scripts/test.sh"]
    for command in SCRIPTS:
        script = ROOT / command.removeprefix("bash ")
        subprocess.run(["bash", "-n", script], check=True)
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


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
