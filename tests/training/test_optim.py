"""Optimizers, parameter groups and the learning-rate schedule."""

import io

import pytest
import torch
from torch import nn

from clipkit.config import parse_config
from clipkit.data.loader import PairBatch
from clipkit.errors import ConfigError
from clipkit.models.checkpoint import save_checkpoint
from clipkit.models.tokenizer import tokenize
from clipkit.training.build import build_towers
from clipkit.training.distributed import World
from clipkit.training.optim import build_optimizer, learning_rate, optimizer_names
from clipkit.training.step import Trainer
from tests.helpers.models import tiny_model

TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
RESNET = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 32}


def optim(**fields):
    return parse_config({"optim": fields}).optim


def tiny_clip(**vision):
    model = tiny_model() | ({"vision": vision} if vision else {})
    return build_towers(parse_config({"model": model}).model, 0.07, 0).clip


def four_pairs():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.from_numpy(tokenize(["one", "two words", "three", "four"]))
    return PairBatch(images, tokens, list("abcd"))


class Toy(nn.Module):
    """A matrix, a gain, an embedding table and a temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(6, 20))
        self.gain = nn.Parameter(torch.randn(6))
        self.positional_embedding = nn.Parameter(torch.randn(5, 6))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def take_step(self, optimizer, step):
        torch.manual_seed(step)
        optimizer.zero_grad()
        x = self.matrix @ torch.randn(20, 5) * self.gain[:, None] + self.positional_embedding.T
        (self.logit_scale * x).square().mean().backward()
        optimizer.step()


def test_weight_decay_excludes_gains_biases_and_temperature():
    clip = tiny_clip()
    groups = build_optimizer(clip, optim(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in clip.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert decay["logit_scale"] == 0
    assert decay["token_embedding.weight"] == 0.3
    for name, value in decay.items():
        excluded = clip.get_parameter(name).ndim < 2
        assert value == (0 if excluded else 0.3), name
        assert excluded or not ("bias" in name or "ln_" in name)


def test_frozen_parameters_are_left_out():
    clip = tiny_clip()
    for parameter in clip.visual.parameters():
        parameter.requires_grad = False
    frozen = {id(p) for p in clip.visual.parameters()}
    groups = build_optimizer(clip, optim(layer_decay=0.5)).param_groups
    assert not frozen & {id(p) for group in groups for p in group["params"]}


def test_adamw_is_fused_and_has_the_settings_of_clip():
    optimizer = build_optimizer(Toy(), optim())
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.9, 0.98), 1e-6, True)
    group = build_optimizer(Toy(), optim(beta2=0.95)).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-6)


def test_sgd_equals_its_definition():
    """Nesterov momentum (Sutskever et al. 2013) in torch: v = m v + g, w = w - lr (g + m v)."""
    ours, rate, momentum = Toy(), 0.01, 0.7
    optimizer = build_optimizer(ours, optim(name="sgd", lr=rate, momentum=momentum, weight_decay=0))
    wanted, velocity = ours.matrix.detach().clone(), torch.zeros_like(ours.matrix)
    for step in range(3):
        ours.take_step(optimizer, step)
        gradient = ours.matrix.grad
        velocity = momentum * velocity + gradient
        wanted -= rate * (gradient + momentum * velocity)
        torch.testing.assert_close(ours.matrix.detach(), wanted)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_trains_and_resumes_bit_for_bit(name):
    config = optim(name=name, lr=1e-2, weight_decay=0.01)
    whole = Toy()
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    optimizer = build_optimizer(whole, config)
    for step in range(3):
        whole.take_step(optimizer, step)
    file = io.BytesIO()
    torch.save({"weights": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for step in range(3, 6):
        whole.take_step(optimizer, step)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = Toy()
    again.load_state_dict(state["weights"])
    torch.manual_seed(99)
    optimizer = build_optimizer(again, config)
    optimizer.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        again.take_step(optimizer, step)
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key
        assert not torch.equal(value, before[key]), key


FAST = ("adamw", "sgd", "muon")
REST = [
    pytest.param(name, marks=pytest.mark.slow) for name in optimizer_names() if name not in FAST
]


@pytest.mark.parametrize("name", [*FAST, *REST])
def test_a_trainer_resumes_bit_for_bit(tmp_path, name):
    settings = {"model": tiny_model(), "optim": {"name": name, "layer_decay": 0.7}}
    config = parse_config(settings | {"train": {"precision": "fp32"}})
    batch = four_pairs()

    def trainer():
        return Trainer(build_towers(config.model, 0.07, 0), config, World())

    whole, again = trainer(), trainer()
    for step in range(4):
        if step == 2:
            save_checkpoint(tmp_path / "step-2", whole.towers, whole.state(), {"step": 2})
        whole.take_step(batch, step, 0.2 + step / 10)
    again.restore(tmp_path / "step-2")
    for step in (2, 3):
        again.take_step(batch, step, 0.2 + step / 10)
    for key, value in again.network.state_dict().items():
        assert torch.equal(value, whole.network.state_dict()[key]), key


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "adamv"}, "did you mean adam"),
        ({"name": "zzzzzz"}, "known names: adabelief"),
        ({"name": "sgd", "beta1": 0.9}, "optim.beta1 is set, but sgd has none"),
        ({"name": "lion", "eps": 1e-8}, "optim.eps is set, but lion has none"),
        ({"name": "adafactor", "beta2": 0.9}, "optim.beta2 is set, but adafactor has none"),
        ({"momentum": 0.9}, "optim.momentum is set, but adamw has none"),
        ({"beta1": 1.0}, "adamw cannot be built: Invalid beta"),
        ({"name": "fusedadam"}, "is not an optimizer"),
    ],
)
def test_invalid_optimizer_settings_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_optimizer(Toy(), optim(**fields))


@pytest.mark.parametrize(
    ("fields", "points"),
    [
        ({"warmup": 0.2}, {0: 0, 0.1: 0.5, 0.2: 1, 0.4: 0.853553, 0.6: 0.5, 1: 0}),
        ({"warmup": 0.2, "min_lr_ratio": 0.1}, {0.2: 1, 0.6: 0.55, 1: 0.1}),
        ({"warmup": 0.2, "schedule": "constant"}, {0.1: 0.5, 0.2: 1, 0.7: 1, 1: 1}),
        (
            {"warmup": 0.1, "schedule": "constant", "cooldown": 0.2},
            {0.05: 0.5, 0.1: 1, 0.8: 1, 0.85: 0.75, 0.9: 0.5, 1: 0},
        ),
        (
            {"warmup": 0.2, "cooldown": 0.2, "min_lr_ratio": 0.1},
            {0.1: 0.5, 0.2: 1, 0.5: 0.55, 0.8: 0.1, 0.9: 0.05, 1: 0},
        ),
        ({"warmup": 0.0}, {0: 1, 0.5: 0.5, 1: 0}),
        ({"warmup": 1.0}, {0: 0, 0.5: 0.5, 1: 1}),
        ({"warmup": 0.5, "cooldown": 0.5, "schedule": "constant"}, {0.25: 0.5, 0.5: 1, 0.75: 0.5}),
    ],
)
def test_learning_rate(fields, points):
    config = optim(lr=3.0, **fields)
    found = {progress: learning_rate(progress, config) for progress in points}
    assert found == pytest.approx({k: 3 * v for k, v in points.items()}, abs=1e-5)


def test_the_rate_is_never_negative_after_the_end_of_the_run():
    assert learning_rate(1.3, optim(schedule="constant", cooldown=0.2)) == 0
    assert learning_rate(1.3, optim()) == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"warmup": 0.6, "cooldown": 0.5, "schedule": "constant"}, "at most 1"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "a constant schedule has no minimum"),
        ({"cooldown": 0.1}, "set optim.min_lr_ratio"),
        ({"schedule": "linear"}, "'cosine' or 'constant'"),
        ({"layer_decay": 0}, "greater than 0"),
    ],
)
def test_contradictory_schedules_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        optim(**fields)


def scales(clip, decay=0.5):
    """The factor on the learning rate of each parameter, by name."""
    names = {id(p): name for name, p in clip.named_parameters()}
    groups = build_optimizer(clip, optim(layer_decay=decay)).param_groups
    return {names[id(p)]: group["scale"] for group in groups for p in group["params"]}


def test_layer_decay_of_transformers():
    model = tiny_model()
    model["vision"] |= {"layers": 3}
    model["text"] |= {"layers": 2}
    found = scales(build_towers(parse_config({"model": model}).model, 0.07, 0).clip)
    wanted = {
        "visual.proj": 1,
        "visual.ln_post.weight": 1 / 2,
        "visual.transformer.resblocks.2.mlp.c_fc.weight": 1 / 2,
        "visual.transformer.resblocks.1.ln_1.bias": 1 / 4,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 1 / 8,
        "visual.ln_pre.weight": 1 / 16,
        "visual.conv1.weight": 1 / 16,
        "visual.class_embedding": 1 / 16,
        "visual.positional_embedding": 1 / 16,
        "text_projection": 1,
        "ln_final.bias": 1 / 2,
        "transformer.resblocks.1.attn.out_proj.weight": 1 / 2,
        "transformer.resblocks.0.ln_2.weight": 1 / 4,
        "token_embedding.weight": 1 / 8,
        "positional_embedding": 1 / 8,
        "logit_scale": 1,
    }
    assert {name: found[name] for name in wanted} == wanted


def test_layer_decay_of_a_resnet():
    found = scales(tiny_clip(**RESNET))
    wanted = {
        "visual.attnpool.c_proj.weight": 1,
        "visual.layer4.0.conv1.weight": 1 / 2,
        "visual.layer3.0.bn2.bias": 1 / 4,
        "visual.layer2.1.conv3.weight": 1 / 8,
        "visual.layer2.0.downsample.0.weight": 1 / 16,
        "visual.layer1.0.conv1.weight": 1 / 32,
        "visual.conv3.weight": 1 / 64,
        "visual.bn1.weight": 1 / 64,
        "token_embedding.weight": 1 / 4,
    }
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("proj", ["linear", ""])
def test_layer_decay_of_a_timm_tower(proj):
    found = scales(tiny_clip(**TIMM | {"timm_proj": proj}))
    top = "visual.head.proj.weight" if proj else "visual.trunk.fc.weight"
    wanted = {
        top: 1,
        "visual.trunk.layer4.0.conv1.weight": 1 / 2,
        "visual.trunk.layer1.0.bn2.bias": 1 / 16,
        "visual.trunk.conv1.0.weight": 1 / 32,
        "transformer.resblocks.0.ln_1.weight": 1 / 2,
    }
    assert {name: found[name] for name in wanted} == wanted


def test_layer_decay_scales_the_updates():
    """Adam's first update equals the learning rate, wherever the gradient is not zero."""
    settings = {"optim": {"layer_decay": 0.5, "lr": 1e-3, "schedule": "constant", "warmup": 0}}
    settings["optim"] |= {"weight_decay": 0, "clip_norm": 0, "eps": 1e-12}
    config = parse_config(settings | {"model": tiny_model(), "train": {"precision": "fp32"}})
    trainer = Trainer(build_towers(config.model, 0.07, 0), config, World())
    clip = trainer.towers.clip
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    batch = four_pairs()
    assert trainer.take_step(batch, 0, 0.5).lr == 1e-3
    for name, share in {
        "visual.proj": 1,
        "visual.transformer.resblocks.0.mlp.c_proj.weight": 1 / 2,
        "visual.conv1.weight": 1 / 4,
    }.items():
        moved = (clip.get_parameter(name).detach() - before[name]).abs().median()
        assert moved.item() == pytest.approx(1e-3 * share, rel=1e-3), name
