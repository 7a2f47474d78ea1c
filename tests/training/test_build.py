"""Towers of a training run: patch dropout, gradient checkpointing, refused settings."""

import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from clipkit.config import parse_config
from clipkit.errors import ConfigError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.tokenizer import tokenize
from clipkit.training.build import build_towers, checkpoint_gradients
from clipkit.training.distributed import ALONE, World
from clipkit.training.step import Trainer
from tests.helpers.models import tiny_model

RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
TIMM = {"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 32}
# The model has a fixed size of 160 pixels, 100 patches.
TIMM_VIT = {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}


def deep_model(**vision):
    model = tiny_model()
    model["vision"] = vision or model["vision"] | {"layers": 3}
    return model | {"text": model["text"] | {"layers": 3}}


def towers(model):
    return build_towers(parse_config({"model": model}).model, 0.07, seed=0)


def random_images(n, size):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def captions(n):
    words = [f"{'very ' * number}small picture" for number in range(n)]
    return torch.from_numpy(tokenize(words))


def saved_bytes(function, argument):
    """The result of a function, and the bytes that its autograd graph saves."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(argument)
    return result, sum(saved.values())


@pytest.mark.parametrize("tower", ["images", "captions"])
def test_checkpointing_saves_less_and_gives_the_same_gradient(tower):
    gradients, memory = [], []
    for checkpointing in (False, True):
        built = towers(deep_model() | {"patch_dropout": 0.5})
        if checkpointing:
            checkpoint_gradients(built.clip)
        network = DualEncoder(built.clip).double().train()
        torch.manual_seed(3)
        if tower == "images":
            vectors, size = saved_bytes(network.encode_images, random_images(8, 32).double())
        else:
            vectors, size = saved_bytes(network.encode_tokens, captions(8))
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        gradients.append(found)
        memory.append(size - sum(p.nbytes for p in network.parameters()))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-6)
    assert len(gradients[0]) > 30
    assert memory[1] < 0.5 * memory[0]


def test_checkpointing_of_a_timm_transformer():
    gradients = []
    for checkpointing in (False, True):
        built = towers(deep_model(**TIMM_VIT))
        if checkpointing:
            checkpoint_gradients(built.clip)
            assert built.clip.visual.trunk.grad_checkpointing
        DualEncoder(built.clip).train().encode_images(random_images(2, 160))[:, 0].sum().backward()
        gradients.append({n: p.grad for n, p in built.clip.visual.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vision", [RESNET, TIMM])
def test_checkpointing_is_refused_where_statistics_would_count_twice(vision):
    with pytest.raises(ConfigError, match=r"batch normalisation.*train\.micro_batch_size"):
        checkpoint_gradients(towers(deep_model(**vision)).clip)


def test_the_trainer_enables_checkpointing():
    for setting in (False, True):
        config = parse_config({"train": {"grad_checkpointing": setting, "precision": "fp32"}})
        clip = Trainer(towers(tiny_model()), config, World()).towers.clip
        switches = (clip.transformer.grad_checkpointing, clip.visual.transformer.grad_checkpointing)
        assert switches == (setting, setting)


def tokens_seen(built, inner, size, training):
    """How many tokens of each image reach a module of the image tower."""
    seen = []
    hook = inner.register_forward_hook(lambda module, given, result: seen.append(given[0].shape[1]))
    DualEncoder(built.clip).train(training).encode_images(random_images(2, size))
    hook.remove()
    return seen


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_patches_are_dropped_only_in_training(tiny_checkpoint, share):
    kept = int(16 * (1 - share))
    for model in (tiny_model(), {"init_from": str(tiny_checkpoint)}):
        built = towers(model | {"patch_dropout": share})
        inner = built.clip.visual.ln_pre
        assert tokens_seen(built, inner, 32, training=True) == [1 + kept]
        assert tokens_seen(built, inner, 32, training=False) == [1 + 16]
        assert not built.model_config["vision_cfg"].get("patch_dropout")


def test_patches_of_named_and_timm_towers_are_dropped():
    built = towers({"name": "ViT-S-32-alt", "patch_dropout": 0.5})
    assert tokens_seen(built, built.clip.visual.ln_pre, 224, training=True) == [1 + 24]
    built = towers(tiny_model() | {"vision": TIMM_VIT, "patch_dropout": 0.5})
    assert tokens_seen(built, built.clip.visual.trunk.norm_pre, 160, training=True) == [1 + 50]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"vision": RESNET, "patch_dropout": 0.5}, r"\(ModifiedResNet\) has no patches"),
        ({"vision": TIMM, "patch_dropout": 0.5}, r"\(ResNet\) has no patches"),
        ({"patch_dropout": 1.0}, "less than 1"),
        ({"vision": {"patch_dropout": 0.5}}, "write it as model.patch_dropout"),
        ({"vision": TIMM | {"width": 32}}, "a timm tower has its own"),
        ({"vision": RESNET | {"timm_drop": 0.5}}, "only a timm tower has one"),
    ],
)
def test_settings_without_effect_are_refused(model, sentence):
    with pytest.raises(ConfigError, match=sentence):
        towers(tiny_model() | model)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    config = parse_config({"model": tiny_model(), "train": {"compile": True, "precision": "fp32"}})
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        Trainer(towers(tiny_model()), config, ALONE)
    monkeypatch.setenv("CXX", sys.executable)  # an absolute path needs no PATH
    trainer = Trainer(towers(tiny_model()), config, ALONE)
    assert trainer.network.training


def test_compiling_with_fsdp_is_refused():
    with pytest.raises(ConfigError, match=r"train\.compile and train\.fsdp"):
        parse_config({"train": {"compile": True, "fsdp": True}})
