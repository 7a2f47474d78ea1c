import json
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import clipkit
from clipkit.config import dump_config, parse_config
from clipkit.data.open_source import open_source
from clipkit.errors import (
    ArtifactError,
    CaptionError,
    ConfigError,
    DataError,
    SkipLimitError,
    TrainingError,
)
from clipkit.tasks.train import train
from clipkit.training.run_directory import read_log
from tests.helpers.colours import COLOURS
from tests.helpers.models import tiny_model
from tests.helpers.runs import assert_same_run, configured, curve, last_weights


def test_learns_what_colour_words_mean(colour_folder, tmp_path):
    config = configured(
        colour_folder, train={"epochs": 60, "eval_every_epochs": 0, "save_every_epochs": 0}
    )
    result = train(config, tmp_path / "run")
    assert result.finished
    losses = [line["loss"] for line in read_log(result.run) if "loss" in line]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    encoder = clipkit.load_model(result.run)
    swatches = [Image.new("RGB", (32, 32), colour) for colour in COLOURS.values()]
    scores = (
        encoder.encode_images(swatches)
        @ encoder.encode_text([f"a {name} picture" for name in COLOURS]).T
    )
    assert scores.argmax(axis=1).tolist() == [0, 1, 2]


def test_recall_in_training_is_that_of_the_evaluation(colour_folder, tmp_path):
    """Four captions of each colour are equal: both merge them."""
    config = configured(colour_folder, data={"val": str(colour_folder), "val_fraction": 0.0})
    result = train(config, tmp_path / "run")
    encoder = clipkit.load_model(result.run, precision="fp32")
    report = clipkit.evaluate_retrieval(colour_folder, encoder, progress=False)
    assert report.counts["equal_captions"] == 9
    shared = result.held_out.keys() & report.estimates.keys()
    assert {"text_to_image_r1", "text_to_image_r10", "image_to_text_r1"} <= shared
    for name in shared:
        assert result.held_out[name] == pytest.approx(report.estimates[name].value)
    page = (result.run / "report.html").read_text(encoding="utf-8")
    assert "Measured during training, with the weights in training precision" in page


def test_same_seed_same_run_whatever_the_workers(colour_folder, tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        train(configured(colour_folder, data={"workers": workers}), tmp_path / name)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    train(configured(colour_folder, train={"seed": 1}), tmp_path / "other")
    assert curve(tmp_path / "one") != curve(tmp_path / "other")


@pytest.mark.parametrize(
    "vision",
    [
        tiny_model()["vision"],
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        {
            "timm_model_name": "resnet10t",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 32,
        },
    ],
    ids=["transformer", "resnet", "timm"],
)
def test_a_checkpoint_loads_in_open_clip_with_equal_vectors(colour_folder, tmp_path, vision):
    config = configured(colour_folder, model={"vision": vision}, train={"epochs": 1})
    result = train(config, tmp_path / "run")
    step = result.run / f"step-{result.step}"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{step}")
    model.eval()
    encoder = clipkit.load_model(step, precision="fp32")
    images = [Image.open(file).convert("RGB") for file in sorted(colour_folder.glob("*.png"))]
    texts = ["a red picture", "", "blue " * 200]
    with torch.no_grad():
        wanted_images = model.encode_image(torch.stack([preprocess(i) for i in images]), True)
        tokens = open_clip.get_tokenizer(f"local-dir:{step}")(texts)
        wanted_texts = model.encode_text(tokens, normalize=True)
    np.testing.assert_allclose(encoder.encode_images(images), wanted_images, atol=1e-6)
    with pytest.warns(UserWarning, match="77"):
        found = encoder.encode_text(texts)
    np.testing.assert_allclose(found, wanted_texts, atol=1e-6)
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp().detach()))


@pytest.mark.parametrize("when", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_resumes_as_if_never_interrupted(colour_folder, tmp_path, when):
    config = configured(
        colour_folder, train={"epochs": 12, "save_every_epochs": 1, "keep_last": 50}
    )
    train(config, tmp_path / "whole")
    (tmp_path / "config.toml").write_text(dump_config(config))
    command = [sys.executable, "-m", "clipkit", "train", "config.toml", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "run").glob("step-*/manifest.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(when)
    _, errors = process.communicate(timeout=120)
    if when == signal.SIGINT:
        assert process.returncode == 130
        assert "--out run --resume" in errors
    assert not (tmp_path / "run" / "manifest.json").exists()
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_bad_images_are_skipped_counted_and_listed(colour_folder, tmp_path):
    (colour_folder / "red-0.png").write_bytes(b"no image")
    config = configured(colour_folder, data={"val_fraction": 0.0, "max_skipped_fraction": 0.5})
    result = train(config, tmp_path / "run")
    assert list(result.skipped) == ["red-0.png"]
    text = (tmp_path / "run" / "skipped.jsonl").read_text(encoding="utf-8")
    listed = [json.loads(line) for line in text.splitlines()]
    assert [line["key"] for line in listed] == ["red-0.png"]
    assert listed[0]["reason"]


def test_too_many_bad_images_end_the_run(colour_folder, tmp_path):
    for file in list(colour_folder.glob("*.png"))[:6]:
        file.write_bytes(b"")
    with pytest.raises(SkipLimitError, match="clipkit data check"):
        train(configured(colour_folder, data={"val_fraction": 0.0}), tmp_path / "run")


def test_long_captions_are_counted_refused_or_split(colour_folder, tmp_path):
    long = "a red picture. " + "It shows one colour and nothing else at all. " * 12
    (colour_folder / "red-0.txt").write_text(long)
    keep_all = {"val_fraction": 0.0}
    result = train(configured(colour_folder, data=keep_all), tmp_path / "cut")
    assert (result.cut.seen, result.cut.cut) == (12, 1)
    with pytest.raises(CaptionError, match="77"):
        train(configured(colour_folder, data=keep_all | {"long_captions": "error"}), tmp_path / "e")
    assert not (tmp_path / "e").exists()
    result = train(
        configured(colour_folder, data=keep_all | {"long_captions": "split"}), tmp_path / "s"
    )
    assert result.cut.cut == 0
    assert result.cut.seen > 12


def test_a_run_by_the_clock_ends_in_time(colour_folder, tmp_path):
    config = configured(colour_folder, train={"minutes": 0.03, "epochs": 100_000})
    result = train(config, tmp_path / "run")
    lines = [line for line in read_log(result.run) if "loss" in line]
    assert result.finished
    assert 1.8 <= lines[-1]["seconds"] < 20
    assert lines[-1]["lr"] < 0.1 * max(line["lr"] for line in lines)


def test_a_stream_needs_its_length_named(colour_folder, tmp_path):
    config = configured(colour_folder, data={"streaming": "yes", "val_fraction": 0.0})
    with pytest.raises(ConfigError, match=r"train\.steps"):
        train(config, tmp_path / "run")
    config = configured(
        colour_folder, data={"streaming": "yes", "val_fraction": 0.0}, train={"steps": 6}
    )
    assert train(config, tmp_path / "run").step == 6


def test_a_streams_long_captions_are_counted_too(colour_folder, tmp_path):
    (colour_folder / "red-0.txt").write_text("a red picture " * 40)
    stream = {"streaming": "yes", "val_fraction": 0.0}
    steps = {"steps": 4}
    result = train(configured(colour_folder, data=stream, train=steps), tmp_path / "run")
    assert (result.cut.seen, result.cut.cut) == (12, 1)
    with pytest.raises(CaptionError, match="77"):
        train(
            configured(colour_folder, data=stream | {"long_captions": "error"}, train=steps),
            tmp_path / "e",
        )


def test_columns_of_any_name_are_trained_on(colour_folder, tmp_path):
    rows = "".join(f"{name}-{n}.png,a {name} thing,{name}\n" for name in COLOURS for n in range(4))
    (colour_folder / "t.csv").write_text("bild,worte,sorte\n" + rows)
    data = {"image_column": "bild", "caption_column": "worte", "label_column": "sorte"}
    config = configured(
        colour_folder / "t.csv", data=data | {"balance": "label"}, train={"epochs": 1}
    )
    assert train(config, tmp_path / "run").finished
    for column in data:
        with pytest.raises(DataError, match="bild, worte, sorte|no label"):
            train(configured(config.data.train, data=data | {column: "no"}), tmp_path / column)


def test_out_that_is_taken(colour_folder, tmp_path):
    config = configured(colour_folder, train={"epochs": 1})
    train(config, tmp_path / "run")
    with pytest.raises(ArtifactError, match="already contains a run.*--resume"):
        train(config, tmp_path / "run")
    with pytest.raises(TrainingError, match="is finished"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(ArtifactError, match="is not a clipkit run"):
        train(config, colour_folder)
    with pytest.raises(ArtifactError, match="no run to resume"):
        train(config, tmp_path / "nothing", resume=True)


def test_resume_refuses_another_configuration(colour_folder, tmp_path):
    config = configured(colour_folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match="another configuration.*lr = 0.5"):
        train(configured(colour_folder, optim={"lr": 0.5}), tmp_path / "run", resume=True)


def test_data_without_captions_or_name(colour_folder, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20)).save(folder / f"{number}.png")
    with pytest.raises(DataError, match="no captions"):
        train(configured(folder), tmp_path / "run")
    with pytest.raises(DataError, match="no captions"):
        train(configured(colour_folder, data={"val": str(folder)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        train(configured(""), tmp_path / "run")


def test_a_run_can_start_from_another(colour_folder, tmp_path):
    first = train(configured(colour_folder, train={"epochs": 1}), tmp_path / "first")
    settings = {
        "model": {"init_from": str(first.run)},
        "data": {"train": str(colour_folder), "val_fraction": 0.0},
        "optim": {"lr": 1e-9},
        "train": {"batch_size": 3, "epochs": 1, "precision": "fp32"},
    }
    second = train(parse_config(settings), tmp_path / "second")
    before, after = last_weights(first.run), last_weights(second.run)
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({}, "exactly one of"),
        ({"name": "ViT-S-32", "init_from": "x"}, "exactly one of"),
        ({"name": "ViT-S-33"}, "did you mean"),
        ({"embed_dim": 8}, "all of embed_dim"),
        (tiny_model() | {"text": {"wdith": 3}}, "did you mean width"),
        (tiny_model() | {"text": {"context_length": 64}}, "its context is 64"),
        (tiny_model() | {"vision": {"timm_model_name": "resnet0"}}, "cannot build"),
        (tiny_model() | {"text": {"width": 32, "heads": 0, "layers": 1}}, "cannot build"),
        (tiny_model() | {"vision": {"layers": [1], "width": 8}}, "cannot build.*fix"),
        (tiny_model() | {"vision": {"patch_size": 0}}, "cannot build.*fix"),
        (tiny_model() | {"vision": {"image_size": -32}}, "image_size is -32 and patch"),
        (tiny_model() | {"vision": {"image_size": 8, "patch_size": 16}}, "8 and patch_size 16"),
        (tiny_model() | {"text": {"layers": -1}}, "model.text.layers is -1, expected"),
        (tiny_model() | {"vision": {"layers": [1, 1, 0, 1]}}, r"vision.layers is \[1, 1, 0, 1\]"),
        ({"init_from": "x", "mean": [0.5, 0.5, 0.5]}, "leave model.mean"),
    ],
)
def test_impossible_towers(colour_folder, tmp_path, model, sentence):
    settings = {"model": model, "data": {"train": str(colour_folder)}}
    with pytest.raises((ConfigError,), match=sentence):
        train(parse_config(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_temperature_is_clamped(colour_folder, tmp_path):
    config = configured(colour_folder, optim={"temperature": 0.0101, "lr": 0.05})
    result = train(config, tmp_path / "run")
    scales = [line["scale"] for line in read_log(result.run) if "scale" in line]
    assert max(scales) <= 100.001
    assert scales[0] > 90


def test_a_file_a_dictionary_and_a_config_train_the_same_run(colour_folder, tmp_path):
    config = configured(colour_folder, train={"epochs": 1})
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config), encoding="utf-8")
    result = train(config, tmp_path / "config")
    train(str(file), str(tmp_path / "file"))
    elsewhere = tomllib.loads(file.read_text(encoding="utf-8"))
    elsewhere["data"]["train"] = "not there"
    train(elsewhere, tmp_path / "dict", data=open_source(colour_folder))
    train(elsewhere, tmp_path / "path", data=colour_folder)
    for name in ("file", "dict", "path"):
        assert_same_run(tmp_path / "config", tmp_path / name)
    assert json.loads(json.dumps(result.to_dict()))["held_out"] == result.held_out
    with pytest.raises(TypeError, match="config is a list, expected a TOML file"):
        train([1], tmp_path / "wrong")


class Pairs:
    """Images as torchvision's ToTensor gives them, with captions, like a map-style Dataset."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        file = self.files[number]
        pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
        return pixels.permute(2, 0, 1) / 255, file.with_suffix(".txt").read_text().strip()


def test_a_dataset_of_tensors_trains_the_same_run_as_its_files(colour_folder, tmp_path):
    files = sorted(colour_folder.glob("*.png"))
    config = configured(colour_folder, data={"val": str(colour_folder)}, train={"epochs": 1})
    from_files = train(config, tmp_path / "files")
    from_pairs = train(config, tmp_path / "pairs", data=Pairs(files))
    assert curve(from_files.run) == curve(from_pairs.run)
    with pytest.raises(TypeError, match="leave out the normalisation"):
        train(config, tmp_path / "wrong", data=[(torch.full((3, 8, 8), -1.0), "red")])
