"""Note where the text tower of a loaded model lies, for queries that need no more than it.

Load a MODEL: a run or checkpoint of ours, an open_clip name with weights, or a hub repository.

Building and downloading are open_clip's own; what is added is that nothing goes wrong quietly:
the activation follows the weights, a text tower that is not CLIP's is refused, and every failure
is one sentence.
"""

import difflib
import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError, safe_open
from torch import nn

from clipkit.artifacts import MANIFEST, ModelRef, is_complete, read_manifest
from clipkit.data.transforms import Preprocess
from clipkit.errors import ModelError
from clipkit.models.checkpoint import (
    CONFIG,
    WEIGHTS,
    checkpoint_step,
    fingerprint,
    is_step,
    vector_dim,
)
from clipkit.models.dual_encoder import why_unsuitable
from clipkit.models.encoder import Encoder
from clipkit.models.inference_precision import DEFAULT_PRECISION, Precision, prepare
from clipkit.models.text_encoder_numpy import EPSILON, KnownTower, note, recall, stamp
from clipkit.models.transformer import runs_text_tower

_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


def remember(model: ModelRef, clip: Any, file: Path) -> None:
    """Keep a note of the file, if it holds the text tower's weights as they were loaded.

    Args:
        model: which model it is, its fingerprint of all weights just computed.
        clip: open_clip's model, as loaded.
        file: of its weights.
    """
    text = getattr(clip, "text", clip)
    if file.suffix != ".safetensors" or not runs_text_tower(text) or recall(model):
        return
    blocks = text.transformer.resblocks
    activations = {_activation(block.mlp.gelu) for block in blocks}
    heads = {block.attn.num_heads for block in blocks}
    norms = [m for m in (*blocks.modules(), text.ln_final) if isinstance(m, nn.LayerNorm)]
    plain = None not in activations and all(norm.eps == EPSILON for norm in norms)
    if not plain or len(activations) != 1 or len(heads) != 1:
        return
    try:
        before = stamp(file)
        prefix = _prefix(text, file)
        unchanged = stamp(file) == before
    except (OSError, SafetensorError):
        return
    if prefix is not None and unchanged:
        activation = str(activations.pop())
        note(
            model,
            KnownTower(str(file), before, prefix, heads.pop(), len(blocks), activation),
        )


def _activation(module: nn.Module) -> str | None:
    if type(module) is QuickGELU:
        return "quick_gelu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def _prefix(text: nn.Module, file: Path) -> str | None:
    """What stands before the names of the tower's weights in a file; None where others do."""
    wanted = {
        name: tensor
        for name, tensor in text.state_dict().items()
        if name.partition(".")[0] in _PARTS
    }
    with safe_open(file, "pt") as held:
        names = set(held.keys())
        for prefix in ("", "text."):
            if all(prefix + name in names for name in wanted):
                equal = all(_equal(held.get_tensor(prefix + n), t) for n, t in wanted.items())
                return prefix if equal else None
    return None


def _equal(held: torch.Tensor, loaded: torch.Tensor) -> bool:
    # Types that numpy knows.
    return held.dtype in (torch.float32, torch.float16) and torch.equal(held.float(), loaded)


DEFAULT_MODEL = "ViT-B-32/laion2b_s34b_b79k"
"""The MODEL where none is named."""


def load_model(
    model: str | Path = DEFAULT_MODEL,
    *,
    device: str | None = None,
    precision: Precision = DEFAULT_PRECISION,
) -> Encoder:
    """Load an encoder.

    Args:
        model: a run or checkpoint directory of ours (a run stands for its last checkpoint,
            ``RUN/best`` for its best one); an open_clip directory (``open_clip_config.json``
            beside weights); ``NAME/TAG`` or ``NAME/path/to/weights`` with an open_clip model name;
            ``hf-hub:org/name``.
        device: where to put it; None: a CUDA device if there is one, else the CPU.
        precision: of the matrix products: ``"fp32"`` is exact, ``"bf16"`` fast where the machine
            has instructions for it, ``"auto"`` takes bf16 where it gains and harms nothing.

    Raises:
        ModelError: unknown name or tag, weights that cannot be reached or do not fit, or a text
            tower without CLIP's 77 tokens.
    """
    clip, reference = load_clip(str(model))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = prepare(clip, precision, torch.device(device))
    reference = replace(reference, precision=network.precision)
    return Encoder(network, reference, Preprocess.of(clip.visual.preprocess_cfg))


def load_clip(model: str) -> tuple[Any, ModelRef]:
    """open_clip's model of a MODEL on the CPU, and which model it is.

    Raises:
        ModelError: as ``load_model``.
    """
    name, weights = resolve(model)
    clip, file = _create(name, weights)
    label = name.removeprefix("local-dir:")
    digest = fingerprint(clip, dict(clip.visual.preprocess_cfg))
    reference = ModelRef(label, weights, digest, vector_dim(clip))
    remember(reference, clip, file)
    return clip, reference


def load_model_ref(
    model: ModelRef, what: str = "this artifact", *, precision: Precision = DEFAULT_PRECISION
) -> Encoder:
    """Load the model that made something, and check that it is still the same.

    Args:
        model: the reference in its manifest.
        what: it made, for the error.
        precision: as of ``load_model``; vectors of either go together.

    Raises:
        ModelError: it cannot be loaded.
        ModelMismatchError: what is there now has other weights or preprocessing.
    """
    name = f"{model.name}/{model.weights}" if model.weights else model.name
    encoder = load_model(name, precision=precision)
    model.require(
        encoder.model,
        what=what,
        repair="put the model back that made it, or embed and index again with the new one",
    )
    return encoder


def resolve(model: str) -> tuple[str, str]:
    """Split a MODEL into open_clip's model name and its weights (empty for directories and hubs).

    Raises:
        ModelError: nothing of that name exists.
    """
    if model.startswith("hf-hub:"):
        return model, ""
    path = Path(model.removeprefix("local-dir:"))
    if path.name == "best" and not path.exists() and run_checkpoints(path.parent):
        path = best_checkpoint(path.parent)
    if path.is_dir():
        return f"local-dir:{checkpoint_directory(path)}", ""
    name, weights = _split_name(model)
    if name not in open_clip.list_models():
        if path.is_absolute():
            raise ModelError(
                f"the model {model} is not there (any more); put it back, or name another"
            )
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
        raise ModelError(
            f"{model!r} is no directory and no open_clip model name with weights; {hint}"
        )
    if not weights:
        raise ModelError(
            f"{model} names no weights, and random ones would give meaningless vectors; "
            f"expected {name}/TAG or {name}/path/to/weights, TAG one of {_tags(name)}"
        )
    for file in (Path(weights), Path("/") / weights):
        if file.is_file():
            return name, str(file.absolute())
    if get_pretrained_cfg(name, weights):
        return name, weights
    raise ModelError(f"{weights!r} is neither a file nor a tag of {name}; its tags: {_tags(name)}")


def _split_name(model: str) -> tuple[str, str]:
    """``NAME/WEIGHTS``, where OpenAI's spelling of NAME may hold a slash itself (``ViT-B/32``)."""
    first, _, rest = model.partition("/")
    second, _, weights = rest.partition("/")
    if first not in open_clip.list_models() and f"{first}-{second}" in open_clip.list_models():
        return f"{first}-{second}", weights
    return first, rest


def _tags(name: str, most: int = 8) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    more = f" and {len(tags) - most} more" if len(tags) > most else ""
    return (", ".join(tags[:most]) or "none") + more


def checkpoint_directory(path: Path) -> Path:
    """The directory with the weights: ``path`` itself, or the last checkpoint of a run.

    Raises:
        ModelError: ``path`` holds no model.
    """
    path = path.absolute()
    if (path / CONFIG).is_file():
        return path
    steps = run_checkpoints(path)
    if steps:
        return steps[-1]
    found = "nothing of clipkit's"
    if is_complete(path):
        found = f"a clipkit {read_manifest(path).kind}"
    elif (path / "config.toml").is_file():
        found = "a run without a finished checkpoint"
    raise ModelError(
        f"{path} holds {found}, expected a run, a checkpoint or a directory with {CONFIG}"
    )


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the best held-out recall so far.

    Raises:
        ModelError: none was measured, or it is gone.
    """
    best = read_manifest(run_checkpoints(run)[-1], "checkpoint").detail.get("best")
    if best and is_complete(run / f"step-{best['step']}"):
        return run / f"step-{best['step']}"
    raise ModelError(
        f"{run} has no best checkpoint, which takes pairs held out and a metric in train.best; "
        f"name {run} for the last one"
    )


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, in order of their steps."""
    found = [p for p in run.glob("step-*") if is_step(p) and (p / MANIFEST).is_file()]
    return sorted(found, key=checkpoint_step)


def model_config(name: str) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a name as ``resolve`` returns it.

    Raises:
        ModelError: it cannot be read, or its text tower is not CLIP's.
    """
    try:
        with _quiet():
            config: dict[str, Any] = deepcopy(open_clip.get_model_config(name))
        text = config["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(_unreachable(name, error)) from None
    reason = "it has another text tower" if "multimodal_cfg" in config else why_unsuitable(text)
    if "siglip" in name.lower() and not name.startswith("local-dir:"):
        reason = reason or "SigLIP has its own tokenizer"
    if reason:
        raise ModelError(
            f"{name.removeprefix('local-dir:')} cannot be used: {reason}; clipkit takes models "
            "with CLIP's byte-level BPE of 49,408 entries and its 77-token context"
        )
    return config


def _create(name: str, weights: str) -> tuple[Any, Path]:
    """Build the model with open_clip, every failure a ModelError.

    Returns:
        the model, and the file of its weights.
    """
    model_config(name)
    tag = get_pretrained_cfg(name, weights) if weights else None
    try:
        with _quiet():
            # Downloading first keeps a network failure apart from weights that do not fit.
            file = download_pretrained(tag) if tag else weights
            clip, *_ = open_clip.create_model_and_transforms(
                name,
                pretrained=weights or None,
                # The activation belongs to the weights: open_clip only warns when they disagree.
                force_quick_gelu=bool(tag and tag.get("quick_gelu")),
                weights_only=True,
            )
            file = file or _weights_file(name)
    except (OSError, ConnectionError, ValueError) as error:
        raise ModelError(_unreachable(f"{name}/{weights}".rstrip("/"), error)) from None
    except pickle.UnpicklingError:
        raise ModelError(
            f"{weights or name} is damaged or would run code when opened, so it was not; "
            "expected weights as .safetensors or a plain PyTorch state dict"
        ) from None
    except (RuntimeError, KeyError, SafetensorError) as error:
        what = f"{name}/{weights}".rstrip("/").removeprefix("local-dir:")
        raise ModelError(f"the weights of {what} do not fit the model: {_short(error)}") from None
    if not file:
        raise ModelError(f"{name} has a configuration but no weights; expected both")
    return clip, Path(file)


def _weights_file(name: str) -> str | Path | None:
    """The weights of a directory or hub: open_clip goes on with random ones if they are gone."""
    if not name.startswith("local-dir:"):
        found: str | None = open_clip.download_pretrained_from_hf(name.removeprefix("hf-hub:"))
        return found
    folder = Path(name.removeprefix("local-dir:"))
    files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".pth")]
    return folder / WEIGHTS if folder / WEIGHTS in files else next(iter(files), None)


def _unreachable(what: str, error: Exception) -> str:
    if what.startswith("local-dir:"):
        return f"{what.removeprefix('local-dir:')}/{CONFIG} cannot be read ({_short(error)})"
    return (
        f"{what} could not be loaded ({_short(error)}): its files are not in the local cache and "
        "the hub was not reached; connect to the network once, or name weights on disk as "
        "NAME/path/to/weights.safetensors"
    )


def _short(error: Exception, limit: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + "…"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's logging through the root logger; what matters is raised instead."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
