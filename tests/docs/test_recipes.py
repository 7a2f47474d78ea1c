"""The recipes: their settings are known, and weights are renamed without a mistake."""

import subprocess

import pytest
import timm
import torch

from clipkit.config import load_config
from scripts.recipes import efficientnet_weights, ucm_duplicates
from tests.helpers.paths import RECIPES


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_settings_are_known(file):
    assert load_config(file).data.train


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.sh")), ids=lambda file: file.stem)
def test_scripts_parse(file):
    subprocess.run(["bash", "-n", file], check=True)


def test_weights_are_renamed_in_order_and_misfits_refused():
    donor, model = (timm.create_model("tf_efficientnet_lite0") for _ in range(2))
    given = {f"_{i}.{name.rpartition('.')[2]}": t for i, (name, t) in enumerate(state(donor))}
    renamed = efficientnet_weights.renamed(given, model)
    assert all(torch.equal(renamed[name], tensor) for name, tensor in state(donor))
    first = next(iter(given))
    with pytest.raises(SystemExit, match=r"conv_stem\.weight"):
        efficientnet_weights.renamed(given | {first: torch.zeros(3)}, model)


def state(model):
    return model.state_dict().items()


def test_settings_are_compared_seed_by_seed():
    found = {
        "mask": [{"recall": 0.50}, {"recall": 0.58}],
        "positive": [{"recall": 0.41}, {"recall": 0.41}],
        "ignore": [{"recall": 0.40}, {"recall": 0.50}],
    }
    head, row = ucm_duplicates.table(found).splitlines()
    assert head.endswith(" mask − ignore positive − ignore")
    # Of two values the standard error is half their distance.
    figures = [*("54.0 ± 4.0", "41.0 ± 0.0", "45.0 ± 5.0"), *("9.0 ± 1.0", "-4.0 ± 5.0")]
    assert " ".join(row.split()) == " ".join(["recall", *figures])
