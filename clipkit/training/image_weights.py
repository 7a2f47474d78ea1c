"""Initialise an image tower from pretrained weights in timm's layout, such as ImageNet's."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clipkit.errors import ModelError

PRETRAINED = "pretrained"
"""The value of ``model.image_weights`` that selects timm's own weights."""
NAMED = 3  # maximum number of tensor names in an error message


def load_image_weights(trunk: nn.Module, file: Path) -> None:
    """Load a state dict in timm's layout into the trunk of an image tower.

    A classifier that the trunk does not have, or that has a different number of classes, is skipped
    with a warning.

    Args:
        trunk: a timm model.
        file: ``.safetensors``, or a plain PyTorch state dict.

    Raises:
        ModelError: the file cannot be read, would run code when opened, or its tensors do not
            match the trunk's.
    """
    found = _read(file)
    wanted = trunk.state_dict()
    left_out = [
        name
        for name in found
        if _is_classifier(trunk, name)
        and (name not in wanted or wanted[name].shape != found[name].shape)
    ]
    fitting = {name: tensor for name, tensor in found.items() if name not in left_out}
    shapes = [
        f"{name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}"
        for name, tensor in fitting.items()
        if name in wanted and wanted[name].shape != tensor.shape
    ]
    if shapes:
        raise _unfit(file, trunk, _listed(shapes))
    missing, unexpected = trunk.load_state_dict(fitting, strict=False)
    # A classifier that the file does not contain stays random.
    missing = [name for name in missing if not _is_classifier(trunk, name)]
    if missing or unexpected:
        parts = [f"missing: {_listed(missing)}"] if missing else []
        parts += [f"unexpected: {_listed(unexpected)}"] if unexpected else []
        raise _unfit(file, trunk, "; ".join(parts))
    if left_out:
        warnings.warn(
            f"{file}: {', '.join(left_out)} skipped, because this tower has no such classifier",
            stacklevel=2,
        )


def own_preprocessing(trunk: Any) -> dict[str, Any]:
    """Mean, standard deviation and interpolation of timm's own weights for a trunk."""
    return {key: trunk.pretrained_cfg[key] for key in ("mean", "std", "interpolation")}


def _read(file: Path) -> dict[str, Tensor]:
    expected = "expected weights as .safetensors or a plain PyTorch state dict"
    if not file.is_file():
        raise ModelError(
            f"model.image_weights {str(file)!r} is not a file; name weights in timm's layout, or "
            f'"{PRETRAINED}" to download timm\'s own'
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file} was not opened, because it is damaged or would run code; {expected}"
        ) from None
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot read {file}: {reason}; {expected}") from None
    if isinstance(content, dict) and all(isinstance(t, Tensor) for t in content.values()):
        return content
    held = ", ".join(map(str, list(content)[:NAMED])) if isinstance(content, dict) else "no dict"
    raise ModelError(f"{file} is not a state dict (it contains {held}); {expected}")


def _is_classifier(trunk: Any, name: str) -> bool:
    heads = trunk.pretrained_cfg.get("classifier") or ()
    return name.startswith(tuple(f"{head}." for head in ([heads] if type(heads) is str else heads)))


def _unfit(file: Path, trunk: Any, what: str) -> ModelError:
    architecture = trunk.pretrained_cfg.get("architecture", type(trunk).__name__)
    return ModelError(
        f"{file} does not match the image tower {architecture} ({what}); name weights of this "
        "architecture in timm's layout"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
