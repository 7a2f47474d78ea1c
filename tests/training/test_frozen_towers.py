"""Locked towers: what stays frozen, and that stored features change nothing but the speed."""

import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clipkit
from clipkit.artifacts import read_manifest
from clipkit.config import parse_config
from clipkit.errors import ConfigError
from clipkit.evaluation.retrieval import retrieval_recall
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.embed_source import encode_pairs
from clipkit.tasks.train import train
from clipkit.training.build import build_towers
from clipkit.training.data import ValidationSet
from clipkit.training.run_directory import read_log
from clipkit.training.step import Trainer
from tests.helpers.models import tiny_model
from tests.helpers.runs import assert_same_run, configured, last_weights, uncropped

TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights for the timm tower."""
    import timm

    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), file)
    return file


def locked_image(weights):
    return tiny_model() | {"vision": TIMM, "image_weights": str(weights), "lock": ["image"]}


def assert_close_runs(one, other, atol):
    ours, theirs = ([x for x in read_log(run) if "loss" in x] for run in (one, other))
    assert len(ours) == len(theirs) == 12
    np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], atol=atol)
    weights, others = last_weights(one), last_weights(other)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], atol=atol, rtol=0)


@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_stored_image_features_train_as_the_frozen_tower_does(
    squares, tmp_path, weights, micro_batch_size
):
    model, loop = locked_image(weights), {"micro_batch_size": micro_batch_size}
    train(uncropped(squares, model, train=loop), tmp_path / "stored")
    in_steps = uncropped(squares, model, train=loop, data={"feature_views": 0})
    train(in_steps, tmp_path / "each-step")
    assert_close_runs(tmp_path / "stored", tmp_path / "each-step", atol=1e-5)
    assert not (tmp_path / "each-step" / "features").exists()


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_a_whole_tower_from_a_start_is_locked(squares, tmp_path, start, tower, micro_batch_size):
    loop = {"micro_batch_size": micro_batch_size}
    model = {"init_from": str(start), "lock": [tower]}
    train(uncropped(squares, model, train=loop), tmp_path / "stored")
    in_steps = uncropped(squares, model, train=loop, data={"feature_views": 0})
    train(in_steps, tmp_path / "each-step")
    assert_close_runs(tmp_path / "stored", tmp_path / "each-step", atol=1e-5)
    before, after = (
        load_file(start / "open_clip_model.safetensors"),
        last_weights(tmp_path / "stored"),
    )
    for name, tensor in before.items():
        of_image, of_scale = name.startswith("visual."), name == "logit_scale"
        kept = not of_scale and of_image == (tower == "image")
        assert torch.equal(tensor, after[name]) == kept, name


def test_the_precision_is_chosen_with_a_locked_tower_too(squares, tmp_path, start):
    model = {"init_from": str(start), "lock": ["image"]}
    result = train(uncropped(squares, model, train={"precision": "auto"}), tmp_path / "run")
    assert result.finished


def test_trunk_and_statistics_keep_still_while_the_projection_learns(squares, tmp_path, weights):
    result = train(
        uncropped(squares, locked_image(weights), data={"feature_views": 0}),
        tmp_path / "run",
    )
    after, given = last_weights(result.run), load_file(weights)
    fresh = build_towers(uncropped(squares, locked_image(weights)).model, 0.07, 0)
    moved = 0
    for name, tensor in after.items():
        if name.startswith("visual.trunk."):
            assert torch.equal(tensor, given[name.removeprefix("visual.trunk.")]), name
        elif name.startswith("visual.head."):
            moved += not torch.equal(tensor, fresh.clip.state_dict()[name])
    assert moved >= 3


def test_a_locked_run_loads_in_open_clip_with_equal_vectors(squares, tmp_path, weights):
    result = train(uncropped(squares, locked_image(weights)), tmp_path / "run")
    step = result.run / f"step-{result.step}"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{step}")
    images = [Image.open(file).convert("RGB") for file in sorted(squares.glob("*.png"))]
    with torch.no_grad():
        wanted = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), True)
        texts = model.encode_text(open_clip.tokenize(["a red picture"]), normalize=True)
    encoder = clipkit.load_model(step, precision="fp32")
    np.testing.assert_allclose(encoder.encode_images(images), wanted, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_text(["a red picture"]), texts, atol=1e-6)


def test_resuming_with_features_gives_the_same_run(squares, tmp_path, weights):
    config = uncropped(squares, locked_image(weights), data={"feature_views": 3})
    train(config, tmp_path / "whole")
    interrupt_after(5, lambda: train(config, tmp_path / "parts"))
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def interrupt_after(steps, run):
    """Run until as many steps are taken, then as Ctrl-C would, and fail if it came to its end."""
    original = Trainer.take_step
    taken = []

    def counted(self, *given):
        taken.append(1)
        if len(taken) > steps:
            raise KeyboardInterrupt
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", counted)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_features_are_found_again_and_made_anew_for_other_weights(squares, tmp_path, weights):
    place = {"feature_dir": str(tmp_path / "kept")}
    config = uncropped(squares, locked_image(weights), data=place)
    train(config, tmp_path / "one")
    made = sorted((tmp_path / "kept").iterdir())
    stamps = [(path / "features.npy").stat().st_mtime_ns for path in made]
    train(config, tmp_path / "two")
    assert sorted((tmp_path / "kept").iterdir()) == made
    assert [(path / "features.npy").stat().st_mtime_ns for path in made] == stamps
    assert_same_run(tmp_path / "one", tmp_path / "two")
    # A quarter of twelve is held out, and has features of its own.
    assert sorted(read_manifest(path, "features").count for path in made) == [3, 9]
    other = tmp_path / "other.safetensors"
    save_file({name: t + 1 if t.ndim == 4 else t for name, t in load_file(weights).items()}, other)
    train(uncropped(squares, locked_image(other), data=place), tmp_path / "three")
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_an_unreadable_image_is_left_out_of_features_too(squares, tmp_path, weights):
    (squares / "red-0.png").write_bytes(b"no image")
    data = {"val_fraction": 0.0, "max_skipped_fraction": 0.5}
    result = train(uncropped(squares, locked_image(weights), data=data), tmp_path / "run")
    assert result.skipped == {"red-0.png": "is not an image of a known format"}


@pytest.fixture
def held_out(squares, tmp_path):
    """Images to measure on: one is broken, one has no caption, one a caption that is cut."""
    folder = tmp_path / "held"
    shutil.copytree(squares, folder)
    (folder / "red-0.png").write_bytes(b"no image")
    (folder / "green-0.txt").unlink()
    (folder / "blue-0.txt").write_text("blue. " * 100 + "\na picture\n")
    return folder


@pytest.mark.parametrize("tower", ["trunk", "image", "text"])
def test_measuring_from_features_gives_the_vectors_of_the_tower(
    squares, held_out, tmp_path, weights, start, tower, monkeypatch
):
    whole = {"init_from": str(start), "lock": [tower]}
    model = locked_image(weights) if tower == "trunk" else whole
    encode, seen = ValidationSet.encode, []

    def compared(self, encoder):
        found = encode(self, encoder)
        wanted = encode_pairs(encoder, self.source, workers=1, progress=False)
        np.testing.assert_allclose(found.images, wanted.images, atol=1e-6)
        np.testing.assert_allclose(found.captions, wanted.captions, atol=1e-6)
        for name in ("owners", "keys", "texts", "labels", "skipped", "report"):
            np.testing.assert_equal(getattr(found, name), getattr(wanted, name), name)
        ours, theirs = (retrieval_recall(x.images, x.captions, x.owners) for x in (found, wanted))
        assert ours == theirs
        seen.append((self.images is not None, self.captions is not None, len(found.skipped)))
        return found

    monkeypatch.setattr(ValidationSet, "encode", compared)
    data = {"val": str(held_out), "long_captions": "split", "feature_views": 2}
    train(uncropped(squares, model, data=data, train={"epochs": 2}), tmp_path / "run")
    assert set(seen) == {(tower != "text", tower == "text", 2)}
    assert len(seen) == 2  # after each epoch


def test_the_locked_tower_sees_each_picture_once(squares, tmp_path, weights, monkeypatch):
    features, seen = DualEncoder.features, []

    def counted(self, tower, given):
        seen.append(len(given))
        return features(self, tower, given)

    def refused(*_):
        raise AssertionError("the whole tower was run")

    monkeypatch.setattr(DualEncoder, "features", counted)
    monkeypatch.setattr(DualEncoder, "encode_images", refused)
    result = train(uncropped(squares, locked_image(weights)), tmp_path / "run")
    assert sum("held_out" in line for line in read_log(result.run)) == 4
    assert sum(seen) == 12


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (tiny_model() | {"lock": ["image"]}, "model.init_from or model.image_weights"),
        (tiny_model() | {"lock": ["text"]}, "set model.init_from"),
        ({"init_from": "START", "lock": ["image", "text"]}, "nothing to train"),
        ({"init_from": "START", "image_weights": "FILE"}, "has its own image tower"),
        (tiny_model() | {"image_weights": "FILE"}, "vision.timm_model_name"),
        (
            tiny_model()
            | {"vision": TIMM | {"timm_proj": ""}, "image_weights": "FILE", "lock": ["image"]},
            "vision.timm_proj",
        ),
        (tiny_model() | {"lock": ["picture"]}, "model.lock"),
    ],
)
def test_impossible_locks(start, weights, model, sentence):
    known = {"START": str(start), "FILE": str(weights)}
    model = {k: known.get(v, v) if isinstance(v, str) else v for k, v in model.items()}
    with pytest.raises(ConfigError, match=sentence):
        build_towers(parse_config({"model": model}).model, 0.07, 0)


def test_a_temperature_beside_weights_that_bring_their_own_is_refused(start):
    model = parse_config({"model": {"init_from": str(start)}}).model
    with pytest.raises(ConfigError, match=r"optim\.temperature is 0\.04, but model\.init_from"):
        build_towers(model, 0.04, 0)


@pytest.mark.parametrize("data", [{"feature_dir": "there"}, {"feature_views": 2}])
def test_features_of_no_locked_tower_are_refused(squares, tmp_path, data):
    with pytest.raises(ConfigError, match="model.lock is empty; remove them"):
        train(configured(squares, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stream_is_refused_unless_the_tower_runs_in_every_step(squares, tmp_path, weights):
    stream = {"streaming": "yes", "val_fraction": 0.0}
    loop = {"steps": 2}
    config = uncropped(squares, locked_image(weights), data=stream, train=loop)
    with pytest.raises(ConfigError, match="feature_views = 0"):
        train(config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    stream |= {"feature_views": 0}
    config = uncropped(squares, locked_image(weights), data=stream, train=loop)
    assert train(config, tmp_path / "run").finished
