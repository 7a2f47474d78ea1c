"""Image towers that start from weights in timm's layout."""

import re

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from clipkit.config import parse_config
from clipkit.errors import ModelError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model

TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(5)
    return timm.create_model("resnet10t").eval()


def towers(weights, **model):
    vision = TIMM | model.pop("vision", {})
    model = tiny_model() | {"vision": vision, "image_weights": str(weights)} | model
    return build_towers(parse_config({"model": model}).model, 0.07, seed=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_gives_the_features_of_its_model(donor, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(donor.state_dict(), file)
    else:
        save_file(donor.state_dict(), file)
    with pytest.warns(UserWarning, match=r"fc\.\w+, fc\.\w+ skipped"):
        built = towers(file)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = donor.forward_head(donor.forward_features(pictures), pre_logits=True)
        found = built.clip.eval().visual.trunk(pictures)
    torch.testing.assert_close(found, wanted)
    assert built.preprocess["mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_a_classifier_of_another_width_is_left_out(donor, tmp_path):
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="skipped"):
        built = towers(tmp_path / "w.safetensors", vision={"timm_proj": ""})
    assert built.clip.visual.trunk.fc.weight.shape == (32, 512)
    headless = timm.create_model("resnet10t", num_classes=0).state_dict()
    save_file(headless, tmp_path / "headless.safetensors")
    built = towers(tmp_path / "headless.safetensors", vision={"timm_proj": ""})
    weight = headless["conv1.0.weight"]
    assert torch.equal(built.clip.visual.trunk.state_dict()["conv1.0.weight"], weight)


def test_mean_and_std_are_the_persons(donor, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), file)
    built = towers(file, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2])
    assert built.preprocess["mean"] == (0.5, 0.4, 0.3)
    assert built.preprocess["std"] == (0.2, 0.2, 0.2)


class Trap:
    def __reduce__(self):
        return (open, ("/dev/null",))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("bn1.weight"), "missing: bn1.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "unexpected: extra"),
        (
            lambda w: w.update({"bn1.weight": torch.ones(3)}),
            re.escape("bn1.weight is [3], expected [64]"),
        ),
        (lambda w: w.update(epoch=3), "is not a state dict"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, sentence):
    weights = dict(timm.create_model("resnet10t", num_classes=0).state_dict())
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=sentence):
        towers(tmp_path / "w.pth")


def test_a_file_that_is_missing_damaged_or_would_run_code(tmp_path):
    with pytest.raises(ModelError, match="is not a file"):
        towers(tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot read"):
        towers(tmp_path / "bad.safetensors")
    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ModelError, match="would run code"):
        towers(tmp_path / "trap.pth")


def fetched(monkeypatch, weights):
    """Let timm find what it would fetch in a file at hand."""
    from timm.models import _builder

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: dict(weights))
    monkeypatch.setattr(_builder, "load_state_dict_from_url", lambda *_, **__: dict(weights))


def test_pretrained_brings_its_own_preprocessing(donor, monkeypatch):
    fetched(monkeypatch, donor.state_dict())
    built = towers("pretrained")
    own = built.clip.visual.trunk.pretrained_cfg
    for key in ("mean", "std", "interpolation"):
        assert built.preprocess[key] == own[key]
    found = built.clip.visual.trunk.state_dict()["conv1.0.weight"]
    assert torch.equal(found, donor.state_dict()["conv1.0.weight"])
    assert built.model_config["vision_cfg"] == TIMM  # a checkpoint fetches nothing
    grey = built.encoder(DualEncoder(built.clip)).preprocess(
        Image.new("RGB", (40, 40), (128, 128, 128))
    )
    expected = (128 / 255 - torch.tensor(own["mean"])) / torch.tensor(own["std"])
    torch.testing.assert_close(grey[:, 5, 5], expected)
    assert towers("pretrained", mean=[0.5, 0.5, 0.5]).preprocess["mean"] == (0.5, 0.5, 0.5)


def test_pretrained_weights_out_of_reach_are_one_sentence(monkeypatch):
    from timm.models import _builder

    def unreachable(*_, **__):
        raise OSError("no route to\nthe hub")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", unreachable)
    monkeypatch.setattr(_builder, "load_state_dict_from_url", unreachable)
    with pytest.raises(ModelError, match="cannot load timm's weights of resnet10t") as error:
        towers("pretrained")
    assert "\n" not in str(error.value)
