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
def test_what_is_asked_for_is_not_measured(monkeypatch, setting):
    monkeypatch.setattr(precision, "_step_seconds", lambda *_: pytest.fail("measured"))
    assert resolve_precision(setting, towers(), 8, CPU) == setting


def clock_by_work(monkeypatch, seconds):
    """A clock that runs by what is computed, ``seconds(precision, pairs)``, not by the machine."""
    clock, sizes = [0.0], []
    forward = precision.DualEncoder.forward

    def timed(self, images, tokens):
        clock[0] += seconds(self.precision, len(images))
        sizes.append(len(images))
        return forward(self, images, tokens)

    monkeypatch.setattr(precision.DualEncoder, "forward", timed)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    return clock, sizes


@pytest.mark.parametrize(("half", "chosen"), [(0.5, "bf16"), (0.97, "fp32"), (3.0, "fp32")])
def test_the_faster_one_is_chosen(monkeypatch, half, chosen):
    clock_by_work(monkeypatch, lambda kind, n: n / 1000 * (half if kind == "bf16" else 1))
    assert resolve_precision("auto", towers(), 8, CPU) == chosen


@pytest.mark.parametrize(("pairs", "chosen"), [(32, "fp32"), (64, "fp32"), (256, "bf16")])
def test_a_cost_that_many_pairs_share_is_seen_as_such(monkeypatch, pairs, chosen):
    """fp32 takes 1 ms a pair, bf16 0.5 ms a pair and 40 ms for the weights: even at 80 pairs."""
    clock_by_work(monkeypatch, lambda kind, n: 0.04 + n / 2000 if kind == "bf16" else n / 1000)
    assert resolve_precision("auto", towers(), pairs, CPU) == chosen


@pytest.mark.parametrize(("seconds", "sizes"), [(1e-3, {2, 8, 32}), (0.1, {2, 8}), (1, {2})])
def test_slow_towers_are_measured_on_fewer_pairs(monkeypatch, seconds, sizes):
    clock, seen = clock_by_work(monkeypatch, lambda kind, n: n * seconds)
    resolve_precision("auto", towers(), 256, CPU)
    assert set(seen) == sizes
    assert clock[0] <= 12


def test_no_more_pairs_are_measured_than_the_run_encodes(monkeypatch):
    _, seen = clock_by_work(monkeypatch, lambda kind, n: 0.001)
    resolve_precision("auto", towers(), 5, CPU)
    assert set(seen) == {2, 5}


@pytest.mark.parametrize("vision", [{}, RESNET], ids=["transformer", "resnet"])
def test_nothing_is_left_behind(vision):
    built = towers(**vision)
    clip = built.clip.eval()
    clip.logit_scale.grad = torch.tensor(3.0)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    torch.manual_seed(5)
    wanted = torch.get_rng_state()
    assert resolve_precision("auto", built, 4, CPU) in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), wanted)
    for name, value in clip.state_dict().items():
        assert torch.equal(value, before[name]), name
    grads = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
    assert grads == {"logit_scale": torch.tensor(3.0)}
    assert not any(module.training for module in clip.modules())


def test_a_run_writes_down_what_was_chosen_and_keeps_it(colour_folder, tmp_path, monkeypatch):
    from clipkit.tasks import train as task

    settings = {
        "model": tiny_model(),
        "data": {"train": str(colour_folder), "held_out_share": 0.0, "workers": 1},
        "train": {"batch_size": 4, "steps": 2, "save_epochs": 0.34},
    }
    asked = []

    def chosen(setting, towers, pairs, device):
        asked.append((setting, pairs))
        return "bf16"

    monkeypatch.setattr(task, "resolve_precision", chosen)
    run = task.train(parse_config(settings), tmp_path / "run").run
    assert 'precision = "bf16"' in (run / "config.toml").read_text()
    (run / "manifest.json").unlink()
    task.train(parse_config(settings), run, resume=True)
    assert asked == [("auto", 4), ("bf16", 4)]
