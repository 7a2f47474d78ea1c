"""A training run killed at any write to its directory, and resumed, is the run never killed."""

import os
import random
import shutil
import signal
import sys

import pytest

from clipkit.artifacts import is_complete
from clipkit.models import checkpoint
from clipkit.tasks.train import train
from tests.helpers.faults import in_a_child
from tests.helpers.runs import assert_same_run, configured, facts

WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def kill_at(number, run):
    """From now on, end this process before its write number ``number`` below ``run``."""
    left = [number]

    def count(*_, **__):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event not in WRITES or isinstance(args[0], int):
            return
        path = os.fsdecode(args[0])
        # Names that are relative are those of a tree being removed.
        below = path.startswith(str(run)) or not os.path.isabs(path)
        reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if below and not reads:
            count()

    sys.addaudithook(hook)
    # What is written by Rust and C++ is not seen by the hook.
    for owner, name in ((checkpoint, "save_file"), (checkpoint.torch, "save")):
        setattr(owner, name, after(getattr(owner, name), count))


def after(function, then):
    def both(*args, **settings):
        function(*args, **settings)
        then()

    return both


def begin_or_go_on(config, run):
    if not is_complete(run):
        train(config, run, resume=(run / "config.toml").is_file())


def is_killed(config, run, number):
    def act():
        kill_at(number, run)
        begin_or_go_on(config, run)

    status = in_a_child(act)
    assert status == 0 or os.WIFSIGNALED(status), f"the child ended with {status}"
    return status != 0


def names(run):
    # A lock that a kill leaves when the run is complete is free, and in nobody's way.
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p != run / ".lock")


def settings(folder, **more):
    train = {
        "epochs": 3,
        "keep_last": 1,
        "best_metric": "",
        "eval_every_epochs": 1,
        "max_nonfinite_steps": 2,
    } | more
    return configured(folder, data={"workers": 0}, train=train)


def check(config, tmp_path, numbers):
    """Kill at each of these writes, then at another one of the resumed run; the last is no kill."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, whole)
    for number in numbers:
        killed = is_killed(config, run, number)
        if killed and is_killed(config, run, random.Random(number).randrange(1, 40)):
            begin_or_go_on(config, run)
        assert_same_run(whole, run)
        assert facts(whole) == facts(run)
        assert names(whole) == names(run), number
        shutil.rmtree(run)
        if not killed:
            return number
    pytest.fail("each number was that of a write")


def test_killed_at_some_writes(colour_folder, tmp_path):
    assert check(settings(colour_folder), tmp_path, range(7, 1000, 23)) > 50


@pytest.mark.slow
def test_killed_at_every_write(colour_folder, tmp_path):
    check(settings(colour_folder), tmp_path, range(1, 1000))


@pytest.mark.slow
def test_killed_at_every_write_of_a_run_that_goes_back(colour_folder, tmp_path, fails):
    # Steps 6 and 7 fail at the full rate, so that step 6 is saved, removed, and saved again.
    fails(lambda number, rate: rate == 1 and number in (6, 7))
    check(settings(colour_folder, keep_last=2), tmp_path, range(1, 1000))
