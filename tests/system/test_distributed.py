"""Two processes on gloo against one: values, runs that go on with another number, dead ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import clipkit
from clipkit.errors import ConfigError
from clipkit.tasks.train import train
from clipkit.training.distributed import World
from clipkit.training.run_directory import read_log
from tests.helpers.paths import ROOT
from tests.helpers.runs import configured, last_weights
from tests.helpers.torchrun import end, start, train_with_two

SHARED = {
    "batch_size": 4,
    "epochs": 6,
    "eval_every_epochs": 0,
    "keep_last": 50,
    "duplicates": "ignore",
}


def wait_for_checkpoint(process, run):
    while not list(run.glob("step-*/manifest.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def losses(run):
    return {line["step"]: line["loss"] for line in read_log(run) if "loss" in line}


def assert_like(found, wanted):
    """The same losses and weights, but for the order of sums."""
    ours, theirs = losses(found), losses(wanted)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-4, atol=2e-5)
    weights = last_weights(wanted)
    for name, tensor in last_weights(found).items():
        np.testing.assert_allclose(tensor, weights[name], atol=2e-3, err_msg=name)


def cut_short(run, copy, step):
    """A copy of a run as it was when it had saved ``step``."""
    shutil.copytree(run, copy)
    (copy / "manifest.json").unlink()
    for path in copy.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def test_values_equal_those_of_one_process():
    done = start("-m", "tests.helpers.two_processes", cwd=ROOT)
    said, code = end(done)
    assert code == 0, said


def test_a_run_is_shared_and_goes_on_alone(colour_folder, tmp_path):
    """Two processes with a bad image are stopped by Ctrl-C; one process ends the run."""
    (colour_folder / "red-0.png").write_bytes(b"no image")
    config = configured(
        colour_folder,
        data={"val_fraction": 0.0, "max_skipped_fraction": 0.5},
        train=SHARED | {"epochs": 20},
    )
    train(config, tmp_path / "whole")
    process = train_with_two(config, tmp_path / "run")
    wait_for_checkpoint(process, tmp_path / "run")
    said, _ = end(process, [signal.SIGINT])
    assert said.count("--resume") == 1, said
    assert not (tmp_path / "run" / "manifest.json").exists()
    result = train(config, tmp_path / "run", resume=True)
    assert result.finished
    assert_like(tmp_path / "run", tmp_path / "whole")
    text = (tmp_path / "run" / "skipped.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["key"] for line in text.splitlines()] == ["red-0.png"]


def test_shards_are_worth_the_whole(colour_folder, tmp_path):
    """One process, then two with shards, then one again."""
    config = configured(
        colour_folder,
        data={"val_fraction": 0.25},
        train=SHARED | {"micro_batch_size": 1, "fsdp": True},
    )
    whole = train(config, tmp_path / "whole")
    cut_short(tmp_path / "whole", tmp_path / "two", 4)
    said, code = end(train_with_two(config, tmp_path / "two", "--resume"))
    assert code == 0, said
    assert_like(tmp_path / "two", tmp_path / "whole")
    measured = [line["held_out"] for line in read_log(tmp_path / "two") if "held_out" in line]
    assert [recall.keys() for recall in measured] == [whole.held_out.keys()]
    cut_short(tmp_path / "two", tmp_path / "one", 8)
    train(config, tmp_path / "one", resume=True)
    assert_like(tmp_path / "one", tmp_path / "whole")
    assert clipkit.load_model(tmp_path / "two").dim == 32


@pytest.mark.slow
def test_a_stream_goes_on_with_another_number(colour_folder, tmp_path):
    """One process, then two in the middle of an epoch, then one again."""
    config = configured(
        colour_folder,
        data={"streaming": "yes", "val_fraction": 0.0},
        train=SHARED | {"steps": 14, "save_every_epochs": 0.2},
    )
    train(config, tmp_path / "whole")
    cut_short(tmp_path / "whole", tmp_path / "two", 4)
    said, code = end(train_with_two(config, tmp_path / "two", "--resume"))
    assert code == 0, said
    assert "read again" not in said
    assert_like(tmp_path / "two", tmp_path / "whole")
    cut_short(tmp_path / "two", tmp_path / "one", 8)
    train(config, tmp_path / "one", resume=True)
    assert_like(tmp_path / "one", tmp_path / "whole")


def ranks(process):
    """Process numbers of the two, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            facts = dict(
                item.split("=", 1) for item in entry.read_text().split("\0") if "=" in item
            )
            parent = int((entry.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process.pid and "RANK" in facts:
            found[int(facts["RANK"])] = int(entry.parent.name)
    return found


@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_dead_process_ends_the_run_with_a_sentence(colour_folder, tmp_path, dead):
    config = configured(colour_folder, train=SHARED | {"epochs": 100_000})
    process = train_with_two(config, tmp_path / "run")
    wait_for_checkpoint(process, tmp_path / "run")
    os.kill(ranks(process)[dead], signal.SIGKILL)
    said, code = end(process)
    assert code == 1
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, said
    assert "another process of this run ended" in sentences[0]
    assert "--resume" in sentences[0]
    assert "clipkit/" not in said, "a traceback"


def test_too_many_bad_images_end_all_processes(colour_folder, tmp_path):
    """Each sees its own share of the bad images; all count them all, and one says so."""
    for file in sorted(colour_folder.glob("*.png"))[:6]:
        file.write_bytes(b"")
    config = configured(colour_folder, data={"val_fraction": 0.0}, train=SHARED)
    said, code = end(train_with_two(config, tmp_path / "run"))
    assert code == 1
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, said
    assert "clipkit data check" in sentences[0]


def test_a_batch_that_cannot_be_shared(colour_folder, tmp_path, monkeypatch):
    @contextmanager
    def two():
        yield World(rank=1, size=2)

    monkeypatch.setattr("clipkit.tasks.train.join_world", two)
    with pytest.raises(
        ConfigError, match="batch_size is 3, expected a multiple of the number of processes"
    ):
        train(configured(colour_folder, train={"batch_size": 3}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_torchrun_sends_does_not_cut_a_sentence_short():
    """It sends SIGTERM once a process is dead, while another is about to tell so."""
    program = """
import os, signal, sys
from clipkit.progress import catch_interrupts
try:
    with catch_interrupts(patient=sys.argv[1] == "patient"):
        raise RuntimeError
except RuntimeError:
    os.kill(os.getpid(), signal.SIGTERM)
    print("told")
"""
    command = [sys.executable, "-c", program]
    for mood, code, told in (("patient", 0, "told\n"), ("other", -signal.SIGTERM, "")):
        done = subprocess.run([*command, mood], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, told), done.stderr
