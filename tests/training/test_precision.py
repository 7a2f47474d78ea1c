"""How ``train.precision = "auto"`` is resolved."""

import pytest
import torch

from clipkit.config import parse_config
from clipkit.training import precision
from clipkit.training.build import build_towers
from clipkit.training.precision import resolve_precision
from tests.helpers.models import tiny_model

CPU = torch.device("cpu")
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}


def towers(**vision):
    model = tiny_model() | ({"vision": vision} if vision else {})
    return build_towers(parse_config({"model": model}).model, 0.07, seed=0)


@pytest.mark.parametrize("setting", ["fp32", "bf16"])
def test_a_set_precision_is_used(monkeypatch, setting):
    for supported in (True, False):
        monkeypatch.setattr(precision, "has_bf16", lambda kind, found=supported: found)
        assert resolve_precision(setting, towers(), 8, CPU) == setting


@pytest.mark.parametrize(
    ("width", "pairs", "expected"),
    [(128, 16, "bf16"), (128, 15, "fp32"), (96, 512, "fp32"), (32, 16, "fp32")],
)
def test_auto_follows_width_and_micro_batch_on_a_cpu(monkeypatch, width, pairs, expected):
    built = towers(width=width, layers=1, head_width=16, patch_size=16, image_size=32)
    monkeypatch.setattr(precision, "has_bf16", lambda kind: True)
    assert resolve_precision("auto", built, pairs, CPU) == expected
    monkeypatch.setattr(precision, "has_bf16", lambda kind: False)
    assert resolve_precision("auto", built, pairs, CPU) == "fp32"


def test_a_resnet_counts_the_channels_of_its_widest_convolution(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda kind: True)
    assert resolve_precision("auto", towers(**RESNET), 16, CPU) == "bf16"


def test_auto_is_bf16_on_a_gpu_with_bf16_units(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda kind: kind == "cuda")
    assert resolve_precision("auto", towers(), 2, torch.device("cuda")) == "bf16"


def test_a_run_records_its_precision_and_keeps_it_when_resumed(
    colour_folder, tmp_path, monkeypatch
):
    from clipkit.tasks import train as task

    settings = {
        "model": tiny_model(),
        "data": {"train": str(colour_folder), "val_fraction": 0.0, "workers": 1},
        "train": {"batch_size": 4, "steps": 2, "save_every_epochs": 0.34},
    }
    calls = []

    def chosen(setting, towers, pairs, device):
        calls.append((setting, pairs))
        return "bf16"

    monkeypatch.setattr(task, "resolve_precision", chosen)
    run = task.train(parse_config(settings), tmp_path / "run").run
    assert 'precision = "bf16"' in (run / "config.toml").read_text()
    (run / "manifest.json").unlink()
    task.train(parse_config(settings), run, resume=True)
    assert calls == [("auto", 4), ("bf16", 4)]
