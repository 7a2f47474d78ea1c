"""Runs whose directory, data or disk are no longer what they were: one sentence, nothing lost."""

import errno
import json
import os
import pickle
import shlex
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import clipkit
from clipkit.config import dump_config, load_config
from clipkit.errors import ArtifactError, ConfigError, DataError, SkipLimitError
from clipkit.models.checkpoint import STATE, WEIGHTS
from clipkit.tasks.train import train
from clipkit.training import loop as timetable
from clipkit.training.loop import TrainingLoop
from clipkit.training.run_directory import RunDirectory, read_log
from clipkit.training.step import Trainer
from tests.helpers.colours import write_colours
from tests.helpers.faults import dies
from tests.helpers.runs import assert_same_run, configured, facts


def steps(run):
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that died at step 8 of 12, with checkpoints at 3 and 6; and one that did not."""
    folder = tmp_path_factory.mktemp("runs")
    write_colours(folder / "colours")
    config = configured(folder / "colours")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        dies(patch, Trainer, "take_step", 8)
        train(config, folder / "run")
    train(config, folder / "whole")
    assert steps(folder / "run") == [3, 6]
    return config, folder / "run", folder / "whole"


@pytest.fixture
def stopped(runs, tmp_path):
    """The configuration, a copy of the run that died, and the other."""
    config, run, whole = runs
    return config, shutil.copytree(run, tmp_path / "run"), whole


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def without(name):
    def change(file):
        state = torch.load(file, weights_only=True)
        del state[name]
        torch.save(state, file)

    return change


def remove(file):
    file.unlink()


def other_shape(file):
    tensors = load_file(file)
    save_file(tensors | {"positional_embedding": torch.zeros(3, 32)}, file)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (STATE, lambda file: torch.save(Evil(file.parent.parent / "evil"), file)),
        (STATE, lambda file: file.write_bytes(pickle.dumps(Evil(file.parent.parent / "evil")))),
        (STATE, lambda file: file.write_bytes(file.read_bytes()[:1000])),
        (STATE, lambda file: file.write_bytes(b"")),
        (STATE, lambda file: file.write_bytes(b"\0" * 5000)),
        (STATE, lambda file: torch.save([1], file)),
        (STATE, remove),
        (STATE, without("optimizer")),
        (STATE, without("recovery")),
        (WEIGHTS, lambda file: file.write_bytes(file.read_bytes()[:1000])),
        (WEIGHTS, lambda file: file.write_bytes(b"")),
        (WEIGHTS, remove),
        (WEIGHTS, other_shape),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(stopped, name, change):
    config, run, whole = stopped
    change(run / "step-6" / name)
    log = (run / "log.jsonl").read_bytes()
    with pytest.raises(ArtifactError, match=f"step-6/{name} .*remove .*step-6 to go on") as error:
        train(config, run, resume=True)
    assert "\n" not in str(error.value)
    assert (run / "log.jsonl").read_bytes() == log
    assert not (run / "evil").exists()
    if change is remove:
        shutil.rmtree(run / "step-6")
        train(config, run, resume=True)
        assert_same_run(whole, run)


def test_a_copy_of_a_checkpoint_is_passed_over_and_stays(stopped):
    config, run, whole = stopped
    shutil.copytree(run / "step-3", run / "step-3-copy")
    train(config, run, resume=True)
    assert_same_run_but_copy(whole, run)


def assert_same_run_but_copy(whole, run):
    assert (run / "step-3-copy" / WEIGHTS).is_file()
    shutil.rmtree(run / "step-3-copy")
    assert_same_run(whole, run)


def test_a_run_directory_that_was_moved_goes_on(stopped, tmp_path, monkeypatch):
    config, run, whole = stopped
    (tmp_path / "far away").mkdir()
    run = run.rename(tmp_path / "far away" / "a run")
    monkeypatch.chdir(tmp_path / "far away")
    train(config, run.relative_to(tmp_path / "far away"), resume=True)
    assert_same_run(whole, run)


@pytest.mark.parametrize("streaming", ["no", "yes"])
def test_changed_data_give_a_warning(colour_folder, tmp_path, monkeypatch, capsys, streaming):
    data = {"streaming": streaming, "val_fraction": 0.0}
    config = configured(colour_folder, data=data, train={"steps": 12, "save_every_epochs": 0.25})
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        dies(patch, Trainer, "take_step", 8)
        train(config, tmp_path / "run")
    (colour_folder / "red-1.png").unlink()
    (colour_folder / "red-1.txt").unlink()
    capsys.readouterr()
    assert train(config, tmp_path / "run", resume=True).finished
    (told,) = [line for line in read_log(tmp_path / "run") if line.get("kind") == "data"]
    assert told["warning"].startswith(f"{colour_folder} has changed since the run started")
    assert told["warning"] in capsys.readouterr().err


def test_a_run_killed_between_its_last_checkpoint_and_its_end(colour_folder, tmp_path, monkeypatch):
    # A floor, so that a step too many would show in the weights.
    config = configured(colour_folder, optim={"min_lr_ratio": 0.5})
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        dies(patch, RunDirectory, "finish")
        train(config, tmp_path / "run")
    result = train(config, tmp_path / "run", resume=True)
    assert result.finished
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert facts(tmp_path / "whole") == facts(tmp_path / "run")


@pytest.mark.parametrize(("where", "time"), [("log", 7), ("step_path", 3), ("list_skipped", 1)])
def test_a_disk_that_fills_up_is_one_sentence(runs, tmp_path, monkeypatch, where, time):
    config, _, whole = runs
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        monkeypatch.context() as patch,
        pytest.raises(ArtifactError, match=r"the disk that holds .*run is full; .*--resume"),
    ):
        dies(patch, RunDirectory, where, time, full)
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_stream_is_saved_every_thousand_steps(colour_folder, tmp_path, monkeypatch):
    assert timetable.STREAM_EPOCH == 1000
    monkeypatch.setattr(timetable, "STREAM_EPOCH", 4)
    stream = {"streaming": "yes", "val": str(colour_folder)}
    train_ = {"steps": 11, "keep_last": 10, "best_metric": ""}
    run = train(configured(colour_folder, data=stream, train=train_), tmp_path / "run").run
    assert steps(run) == [4, 8, 11]
    assert [line["step"] for line in read_log(run) if "held_out" in line] == [4, 8, 11]
    short = {"steps": 0, "minutes": 0.02, "keep_last": 10**6, "best_metric": ""}
    run = train(configured(colour_folder, data=stream, train=short), tmp_path / "clock").run
    assert steps(run)[0] == 4, "a stream that only the clock ends is saved too"


def test_the_clock_asks_for_an_interim_checkpoint(colour_folder, tmp_path, monkeypatch):
    saved, save = [], TrainingLoop._save

    def spy(loop, planned):
        saved.append((loop.step, planned))
        return save(loop, planned)

    monkeypatch.setattr(TrainingLoop, "_save", spy)
    rare = {"save_every_epochs": 0, "eval_every_epochs": 0, "epochs": 2}
    for minutes, wanted in ((0, []), (30, []), (1e-9, [1, 2, 3, 4, 5])):
        config = configured(colour_folder, train=rare | {"save_every_minutes": minutes})
        run = train(config, tmp_path / f"{minutes}").run
        assert saved == [(step, False) for step in wanted] + [(6, True)]
        assert steps(run) == [6], "an interim checkpoint goes with the next one"
        saved.clear()


def test_what_changes_nothing_may_be_another_when_a_run_goes_on(stopped):
    config, run, whole = stopped
    folder = config.data.train
    changes = {
        "data": {"workers": 2, "image_cache": "no", "max_skipped_fraction": 0.5},
        "train": {"keep_last": 1, "keep_every_steps": 11, "save_every_minutes": 1},
    }
    with pytest.raises(ConfigError, match=r"configuration \(now: optim.lr = 0.5\); resume"):
        train(configured(folder, optim={"lr": 0.5}, **changes), run, resume=True)
    train(configured(folder, **changes), run, resume=True)
    assert_same_run(whole, run)
    assert {11, 12} <= set(steps(run))
    assert load_config(run / "config.toml").data.max_skipped_fraction == 0.5
    assert config.data.max_skipped_fraction == 0.05


def test_what_was_trained_when_the_data_gave_out_is_reported(colour_folder, tmp_path, monkeypatch):
    config = configured(colour_folder, data={"val_fraction": 0.0})
    dies(monkeypatch, TrainingLoop, "_after_step", 5, SkipLimitError("too many bad pictures"))
    with pytest.raises(SkipLimitError):
        train(config, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Failed after 5 steps" in page
    saved = steps(tmp_path / "run")
    assert f"local-dir:run/step-{saved[-1]}" in page
    assert saved[-1] < 5


def test_the_command_to_go_on_can_be_pasted(run, colour_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    colour_folder.rename(tmp_path / "my photos")
    config = configured("elsewhere")
    (tmp_path / "my config.toml").write_text(dump_config(config))
    plain, seen = Trainer.take_step, []

    def interrupting(*args, **settings):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **settings)

    monkeypatch.setattr(Trainer, "take_step", interrupting)
    words = ["train", "my config.toml", "--out", "it's a run", "--set", "data.train=my photos"]
    _, err = run(*words, code=130)
    command = shlex.split(err.strip().rpartition("continue with: ")[2])
    assert command[:2] == ["clipkit", "train"]
    page = (tmp_path / "it's a run" / "report.html").read_text()
    assert "--out &#x27;it&#x27;&quot;&#x27;&quot;&#x27;s a run&#x27; --resume" in page
    run(*command[1:])
    assert clipkit.load_model(tmp_path / "it's a run").dim == 32


def test_a_path_that_is_not_utf8_is_refused_at_once(colour_folder, tmp_path):
    out = tmp_path / os.fsdecode(b"run-\xff")
    with pytest.raises(ArtifactError, match=r"run-\\xff is not UTF-8.*choose another --out"):
        train(configured(colour_folder), out)
    assert not out.exists()


def test_a_run_named_like_a_formula_is_drawn(colour_folder, tmp_path, run):
    train(configured(colour_folder, train={"epochs": 1}), tmp_path / "a$^{$b")
    for name in ("_hidden", "$"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "a$^{$b" / "log.jsonl", tmp_path / name)
    run("plot", *map(tmp_path.joinpath, ("a$^{$b", "_hidden", "$")), "--out", tmp_path / "a.png")


def test_lines_of_a_log_that_are_none_are_passed_over(tmp_path):
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    bad = [b"5", b"null", b'"text"', b'{"loss": 1.0}', b"\xff\xfe", b"\0\0\0", b'{"step"', b"[[["]
    lines = [json.dumps(good[0]).encode(), *bad, json.dumps(good[1]).encode()]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert read_log(tmp_path) == good


def test_holding_out_all_pairs_is_named(colour_folder, tmp_path):
    with pytest.raises(DataError, match=r"data\.val_fraction"):
        train(configured(colour_folder, data={"val_fraction": 0.99}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
