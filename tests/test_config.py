import dataclasses
import math
import re

import pytest

from clipkit.config import RENAMED, TrainConfig, dump_config, load_config, parse_config
from clipkit.errors import ConfigError


def write(tmp_path, text):
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_resolved_toml_reads_back_equal(tmp_path):
    file = write(tmp_path, '[model]\nname = "ViT-S-32"\n[train]\nepochs = 3\n')
    config = load_config(file, ["optim.lr=0.002", "data.train=some/folder", "train.seed=7"])
    assert (config.train.epochs, config.optim.lr, config.train.seed) == (3, 0.002, 7)
    assert config.data.train == "some/folder"
    one = load_config(str(file), "train.seed=7")
    assert one == load_config(file, ["train.seed=7"])
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"train": {"epoch": 3}}, "unknown key train.epoch; did you mean epochs"),
        ({"trian": {}}, "did you mean train"),
        ({"optim": {"zzz": 1}}, "known are: name, lr"),
        ({"train": {"epochs": "x"}}, 'train.epochs is "x"'),
        ({"optim": {"lr": -1}}, "greater than 0"),
        ({"data": {"workers": "many"}}, "data.workers is"),
        ({"augment": {"crop_scale": [0.2, 1.5]}}, "augment.crop_scale"),
        ({"train": {"precision": "fp8"}}, "'bf16'"),
        ({"augment": {"flip": True}}, "augment.flip is true; input should be a number"),
        ({"augment": {"crop_scale": [True, 1]}}, "augment.crop_scale is true"),
        ({"augment": {"crop_scale": [1.0, 0.5]}}, "crop_scale is [1, 0.5].*smaller.*first"),
        ({"augment": {"crop_scale": [0, 0]}}, "crop_scale is [0, 0].*above 0"),
        ({"augment": {"crop_ratio": [2, 1]}}, "crop_ratio is [2, 1].*smaller.*first"),
        ({"augment": {"crop_scale": [0.5]}}, "expected more values in the list"),
        ({"optim": {"lr": math.inf}}, "optim.lr is Infinity; input should be a finite number"),
        ({"train": {"save_every_epochs": math.inf}}, "save_every_epochs is Infinity; .*finite"),
        ({"train": {"seed": -1}}, "train.seed is -1"),
        ({"train": {"seed": 2**70}}, "train.seed is"),
        ({"optim": {"temperature": 1e-4}}, "optim.temperature is 0.0001.*0.01"),
        ({"optim": {"temperature": 7}}, "optim.temperature is 7"),
        ({"model": {"mean": [123.7, 116.3, 103.5]}}, "model.mean is 123.7"),
        ({"model": {"std": [0, 0, 0]}}, "model.std is 0; input should be greater than 0"),
        ({"model": {"embed_dim": -4}}, "model.embed_dim is -4"),
        ({"model": {"lock": "image"}}, 'lock is "image"; expected a list in brackets'),
        ({"data": {"workers": 10**9}}, "data.workers is 1000000000"),
        ({"train": 5}, "train is 5; expected a section"),
    ],
)
def test_mistakes_are_named(content, sentence):
    with pytest.raises(ConfigError, match=re.sub(r"([(\[\]])", r"\\\1", sentence)):
        parse_config(content)


@pytest.mark.parametrize("override", ["epochs=3", "train.epochs", "=3", "train.=3"])
def test_an_override_needs_section_and_key(tmp_path, override):
    with pytest.raises(ConfigError, match="section.key=value"):
        load_config(write(tmp_path, ""), [override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.train=2024", "2024"),
        ("data.train=2024-01-31", "2024-01-31"),
        ("data.train=true", "true"),
        ("data.train=a,b = [c]", "a,b = [c]"),
        ('data.train="2024"', "2024"),
        ("data.train=C:\\new photos", "C:\\new photos"),
        ("data.workers=3", 3),
        ("optim.lr=.001", 0.001),
        ("train.compile=true", True),
        ('model.lock=["image"]', ("image",)),
        ("model.vision.layers=[1, 2]", {"layers": [1, 2]}),
        ("model.vision={layers = 3}", {"layers": 3}),
        ("data.caption_weights.dog=2", {"dog": 2.0}),
        ("data.caption_weights.big dog=2", {"big dog": 2.0}),
        ('data.caption_weights."big.dog"=2', {"big.dog": 2.0}),
    ],
)
def test_overrides_are_toml_or_text(tmp_path, override, value):
    config = dataclasses.asdict(load_config(write(tmp_path, ""), [override]))
    section, key = override.partition("=")[0].split(".")[:2]
    assert config[section][key] == value


def test_a_file_from_windows(tmp_path):
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nepochs = 3\r\n")
    assert load_config(file).train.epochs == 3
    file.write_text('[data]\ntrain = "C:\\photos"\n')
    with pytest.raises(ConfigError, match="backslashes in 'single quotes'"):
        load_config(file)
    file.write_text("[data]\ntrain = 'C:\\photos'\n")
    assert load_config(file).data.train == "C:\\photos"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(write(tmp_path, "[train\n"))


def test_every_field_is_documented():
    from clipkit.config import _ADAPTER

    for name, section in _ADAPTER.json_schema()["$defs"].items():
        if name != "TrainConfig":
            for key, field in section["properties"].items():
                assert field.get("description"), f"{name}.{key} has no description"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().train = None


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_is_refused_with_the_present_one(tmp_path, old, new):
    sections = {s.name: s.type for s in dataclasses.fields(TrainConfig)}
    names = {f"{s}.{f.name}" for s, kind in sections.items() for f in dataclasses.fields(kind)}
    assert old not in names
    assert new in names
    section, key = old.split(".")
    with pytest.raises(ConfigError, match=f"{old} was renamed {new};"):
        parse_config({section: {key: 1}})
    with pytest.raises(ConfigError, match=f"{old} was renamed {new};"):
        load_config(write(tmp_path, ""), [f"{old}=1"])
