"""A run that is killed anywhere and resumed is the run that was never killed, bit for bit."""

import io
import os
import random
import shutil
import signal
import tarfile

import datasets
import pytest
from PIL import Image

from clipkit.artifacts import ArtifactWriter
from clipkit.models.checkpoint import load_training_state
from clipkit.tasks.train import train
from clipkit.training.step import Trainer
from tests.helpers.colours import COLOURS
from tests.helpers.faults import in_a_child
from tests.helpers.runs import assert_same_run, configured, facts

STEPS = 16
LONG = "a red picture. " + "It shows one colour and nothing else at all. " * 12


def items():
    """Two dozen pictures: name, bytes (some are none, or no picture), captions, label."""
    for number in range(24):
        colour = list(COLOURS)[min(number // 8, 2) if number < 20 else 0]
        stream = io.BytesIO()
        size = (40 + number, 30 + 2 * number)
        Image.new("RGB", size, COLOURS[colour]).save(stream, "JPEG" if number % 2 else "PNG")
        image = b"no picture" if number in (5, 17) else stream.getvalue()
        captions = [f"a {colour} picture", f"picture {number}, all in {colour}"]
        if number == 2:
            captions[1] = LONG
        yield f"{number:02}.{'jpg' if number % 2 else 'png'}", image, captions, colour


def folder(path):
    for name, image, captions, _ in items():
        (path / name).write_bytes(image)
        (path / f"{name[:2]}.txt").write_text("\n".join(captions))
    return path


def csv(path):
    folder(path)
    rows = [f'{n},"{caption}",{label}' for n, _, cs, label in items() for caption in cs]
    (path / "pairs.csv").write_text("\n".join(["image,caption,label", *rows]))
    return path / "pairs.csv"


def table(_):
    names, images, captions, labels = zip(*items(), strict=True)
    columns = {"key": names, "image": images, "captions": captions, "label": labels}
    return datasets.Dataset.from_dict({name: list(column) for name, column in columns.items()})


def parquet(path):
    # Several row groups, so that a stream has shards to mix.
    table(path).to_parquet(path / "pairs.parquet", batch_size=9)
    return path / "pairs.parquet"


def saved(path):
    table(path).save_to_disk(path / "saved")
    return path / "saved"


def tars(path):
    for shard in range(3):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for name, image, captions, label in list(items())[shard::3]:
                parts = {name: image, f"{name[:2]}.txt": "\n".join(captions).encode()}
                parts[f"{name[:2]}.cls"] = label.encode()
                for member, content in parts.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            if shard == 1:  # a member that the reader itself leaves out
                info = tarfile.TarInfo("alone.txt")
                tar.addfile(info, io.BytesIO())
    return path / "{0..2}.tar"


def mixed(path):
    for name in ("a", "b", "c"):
        (path / name).mkdir()
    return f"{csv(path / 'a')}::{tars(path / 'b')}::{parquet(path / 'c')}"


TABLES, STREAMS = (folder, csv, parquet, saved), (tars, parquet)
PLAIN, PARTS = {}, {"train": {"micro_batch_size": 2}}
LIKE = {"train": {"bucket_by_length": True}}
BALANCED = {"data": {"balance": "label", "caption_weights": {"blue": 2.0}}}
BOTH = {"train": {"bucket_by_length": True, "micro_batch_size": 2}, "data": BALANCED["data"]}
UNKEPT = {"data": {"image_cache": "no", "decode": "exact", "long_captions": "split"}}

# One after the other, so that every source, number of workers and way to draw has its turn.
FEW = [(folder, PARTS, 0), (csv, BALANCED, 2), (parquet, LIKE, 0), (saved, BOTH, 2)]
FEW += [(tars, PARTS, 2), (parquet, {"data": {"streaming": "yes"}}, 0)]
FEW += [(mixed, {"data": {"weights": [1, 2, 0.5]}}, 2), (tars, LIKE, 0)]
ALL = [
    (source, kind, workers)
    for source in TABLES
    for kind in (PLAIN, PARTS, LIKE, BALANCED, BOTH, UNKEPT)
    for workers in (0, 2)
    if source is not folder or "balance" not in kind.get("data", {})
]
ALL += [
    (source, {"data": {"streaming": "yes"} | data, "train": parts}, workers)
    for source in STREAMS
    for data in ({}, UNKEPT["data"])
    for parts in ({}, PARTS["train"])
    for workers in (0, 2)
]
ALL += [
    (mixed, {"data": {"weights": weights}, "train": parts}, workers)
    for weights in ([], [1, 2, 0.5])
    for parts in ({}, LIKE["train"])
    for workers in (0, 2)
]


def killed_at(owner, method, time, action):
    """Run ``action`` in a child that is killed when it calls a method for the ``time``-th time."""
    plain, left = getattr(owner, method), [time]

    def deadly(*args, **settings):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **settings)

    def act():
        setattr(owner, method, deadly)
        action()

    status = in_a_child(act)
    assert os.WIFSIGNALED(status), f"the child was not killed, but ended with {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def check(source, kind, workers, tmp_path, monkeypatch):
    # So small that a short stream lets rows go before its end, and wait for later ones.
    for setting, value in {"PART": 3, "WAITS": 3, "LANES": 2, "_SORTED_ROWS": 12}.items():
        monkeypatch.setattr(f"clipkit.data.streaming.{setting}", value)
    (tmp_path / "data").mkdir()
    config = configured(
        source(tmp_path / "data"),
        data={"workers": workers, "max_skipped_fraction": 0.5, "val_fraction": 0.2}
        | kind.get("data", {}),
        train={"steps": STEPS, "batch_size": 4, "save_every_epochs": 0.21, "log_every_steps": 2}
        | kind.get("train", {}),
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, whole)
    # Where it is killed is another place for each kind, and the same each time.
    chance = random.Random(f"{source.__name__} {kind} {workers}")
    step = chance.randrange(1, STEPS)
    killed_at(Trainer, "take_step", step, lambda: train(config, run))
    resumes = any(run.glob("step-*/manifest.json"))
    if not resumes:
        shutil.rmtree(run)
    # Then while it writes a checkpoint, all of which is there but its name.
    killed_at(ArtifactWriter, "finish", 2, lambda: train(config, run, resume=resumes))
    resumes = any(run.glob("step-*/manifest.json"))
    train(config, run, resume=resumes)
    assert_same_run(whole, run)
    assert facts(whole) == facts(run)
    # A resume further on would know of all that was left out so far.
    state = load_training_state(run / f"step-{STEPS}")
    assert list(state["data"]["skipped"]) == [line["key"] for line in facts(run)[1]]


def name(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("source", "kind", "workers"), FEW, ids=name)
def test_killed_and_resumed_is_never_killed(source, kind, workers, tmp_path, monkeypatch):
    check(source, kind, workers, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "kind", "workers"), ALL, ids=name)
def test_every_source_and_way_to_draw(source, kind, workers, tmp_path, monkeypatch):
    check(source, kind, workers, tmp_path, monkeypatch)


@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_an_interrupt_adds_nothing_to_the_log(step, colour_folder, tmp_path, monkeypatch):
    """At steps with and without a line, a measurement and a checkpoint of their own."""
    config = configured(
        colour_folder,
        train={
            "epochs": 4,
            "log_every_steps": 4,
            "eval_every_epochs": 4 / 3,
            "save_every_epochs": 2,
        },
    )
    train(config, tmp_path / "whole")
    plain, seen = Trainer.take_step, []

    def interrupting(*args, **settings):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **settings)

    monkeypatch.setattr(Trainer, "take_step", interrupting)
    result = train(config, tmp_path / "run")
    assert (result.finished, result.step) == (False, step)
    monkeypatch.undo()
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert facts(tmp_path / "whole") == facts(tmp_path / "run")
