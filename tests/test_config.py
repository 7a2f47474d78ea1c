import dataclasses

import pytest

from clipkit.config import TrainConfig, dump_config, load_config, parse_config
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
    ],
)
def test_mistakes_are_named(content, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        parse_config(content)


@pytest.mark.parametrize("override", ["epochs=3", "train.epochs", "=3", "train.=3"])
def test_an_override_needs_section_and_key(tmp_path, override):
    with pytest.raises(ConfigError, match="section.key=value"):
        load_config(write(tmp_path, ""), [override])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(write(tmp_path, "[train\n"))


def test_every_field_is_documented():
    from clipkit.config.toml import _ADAPTER

    for name, section in _ADAPTER.json_schema()["$defs"].items():
        if name != "TrainConfig":
            for key, field in section["properties"].items():
                assert field.get("description"), f"{name}.{key} has no description"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().train = None
