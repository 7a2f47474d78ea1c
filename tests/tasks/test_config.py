"""The starter configuration and the list of fields."""

import dataclasses

import pytest
from PIL import Image

from clipkit.config import TrainConfig, load_config
from clipkit.errors import ConfigError, DataError
from clipkit.tasks.config import config_fields, init_config


def write_pairs(folder, count, size):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", size, (number, 80, 160)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image number {number}")
    return folder


def test_choices_follow_from_the_number_and_size_of_the_images(tmp_path):
    data = write_pairs(tmp_path / "pairs", 40, (150, 70))
    found = init_config(data)
    assert (found.images, found.image_side, found.path) == (40, 70, None)
    assert found.config.model.vision["image_size"] == 64  # the largest step up to 70 px
    assert found.config.train.batch_size == 4  # at most an eighth of the images, a power of 2
    assert found.config.train.epochs == 50  # 120,000 / 40, bounded
    assert found.config.data.train == str(data)


def test_the_file_loads_and_trains(colour_folder, tmp_path, run):
    out = tmp_path / "train.toml"
    printed, noted = run("init", colour_folder, "--out", out)
    assert printed == out.read_text()
    assert str(out) in noted
    assert load_config(out) == init_config(colour_folder).config
    run("train", out, "--out", tmp_path / "run", "--set", "train.epochs=1")
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_a_named_column_is_written_down(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 3, (40, 40))
    table = tmp_path / "pairs.csv"
    rows = [f"{folder / str(n)}.png,a,b{n}" for n in range(3)]
    table.write_text("\n".join(["filepath,title,words", *rows]))
    assert init_config(table, caption_column="words").config.data.caption_column == "words"


def test_an_existing_file_and_data_without_captions_are_refused(tmp_path):
    data = write_pairs(tmp_path / "pairs", 3, (40, 40))
    out = tmp_path / "there.toml"
    out.write_text("")
    with pytest.raises(ConfigError, match="exists"):
        init_config(data, out)
    for caption in data.glob("*.txt"):
        caption.unlink()
    with pytest.raises(DataError, match="no captions"):
        init_config(data)


def test_every_field_is_listed_with_its_default():
    listed = {field.name: field for field in config_fields()}
    expected = {
        f"{section.name}.{item.name}": getattr(getattr(TrainConfig(), section.name), item.name)
        for section in dataclasses.fields(TrainConfig)
        for item in dataclasses.fields(getattr(TrainConfig(), section.name))
    }
    assert list(listed) == list(expected)
    for name, field in listed.items():
        default = expected[name]
        assert field.default == (list(default) if isinstance(default, tuple) else default)
        assert field.description.endswith(".")
    assert listed["optim.lr"].type == "number above 0"
    assert listed["train.precision"].type == '"auto" or "fp32" or "bf16"'


def test_config_prints_one_section(run):
    printed, _ = run("config", "optim")
    assert printed.startswith("optim.name = ")
    assert "train." not in printed
    _, noted = run("config", "optimiser", code=1)
    assert "expected one of model, data, augment, optim, train" in noted
