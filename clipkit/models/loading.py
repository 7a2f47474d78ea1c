"""Load a model: a run or checkpoint, an open_clip name with weights, a hub repository or an object.

open_clip builds and downloads the models. This module makes every failure loud: the activation
follows the weights, a text tower other than CLIP's is refused, and each error is one sentence.
"""

import difflib
import hashlib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clipkit.artifacts import ModelRef
from clipkit.data.images import Decode
from clipkit.data.transforms import Preprocess
from clipkit.errors import ModelError
from clipkit.models.checkpoint import (
    CONFIG,
    WEIGHTS,
    best_checkpoint,
    checkpoint_directory,
    fingerprint,
    run_checkpoints,
)
from clipkit.models.dual_encoder import vector_dim, why_no_vectors, why_unsuitable
from clipkit.models.encoder import Encoder
from clipkit.models.inference_precision import DEFAULT_PRECISION, Precision, prepare
from clipkit.models.text_encoder_numpy import (
    EPSILON,
    TextTowerFile,
    file_stamp,
    find_text_tower,
    record_text_tower,
)
from clipkit.models.tokenizer import TruncationReport, tokenize
from clipkit.models.transformer import runs_text_tower

DEFAULT_MODEL = "ViT-B-32/laion2b_s34b_b79k"
"""The default MODEL."""
OBJECT = "model object"
"""``ModelRef.weights`` of a model that was passed as an object and cannot be loaded by its name."""

Transform = Callable[[Image.Image], Any]
Tokenizer = Callable[[list[str]], Any]


def load_model(
    model: str | Path | nn.Module = DEFAULT_MODEL,
    *,
    preprocess: Transform | None = None,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device | None = None,
    precision: Precision = DEFAULT_PRECISION,
) -> Encoder:
    """Load an encoder.

    Args:
        model: a run or checkpoint directory (a run means its last checkpoint, ``RUN/best`` its
            best one); an open_clip directory (``open_clip_config.json`` beside weights);
            ``NAME/TAG`` or ``NAME/path/to/weights`` with an open_clip model name;
            ``hf-hub:org/name``; or an open_clip model object, which is copied.
        preprocess: the inference transform of a model object, PIL image to float tensor
            [3, height, width]. None: the one that open_clip stores in the model.
        tokenizer: the tokenizer of a model object, checked to be CLIP's. None: CLIP's.
        device: None: a CUDA device if there is one, else the CPU.
        precision: of the matrix products. ``"fp32"`` is exact, ``"bf16"`` fast on machines with
            bf16 instructions, ``"auto"`` chooses bf16 where it is faster and safe.

    Raises:
        TypeError: ``model`` is neither a name, a path nor a torch module.
        ModelError: unknown name or tag, weights that cannot be reached or do not fit, a text tower
            or tokenizer other than CLIP's with its 77 tokens, or towers that do not give one vector
            of the same width each.
    """
    if isinstance(model, nn.Module):
        clip, reference, transform = _load_object(model, preprocess, tokenizer)
    elif not isinstance(model, str | Path):
        found = type(model).__name__
        raise TypeError(f"found {found} as model, expected a name, a path or an open_clip model")
    elif preprocess or tokenizer:
        raise TypeError(
            f"found preprocess or tokenizer beside the model {model}, which has its own; "
            "pass them with an open_clip model object only"
        )
    else:
        clip, reference = load_clip(str(model))
        transform = Preprocess.of(clip.visual.preprocess_cfg)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = prepare(clip, precision, torch.device(device))
    return Encoder(network, replace(reference, precision=network.precision), transform)


def load_clip(model: str) -> tuple[Any, ModelRef]:
    """The open_clip model of a MODEL string on the CPU, and its reference.

    Raises:
        ModelError: as in ``load_model``.
    """
    name, weights = resolve(model)
    clip, file = _create(name, weights)
    label = name.removeprefix("local-dir:")
    _require_vectors(label, clip)
    digest = fingerprint(clip, dict(clip.visual.preprocess_cfg))
    reference = ModelRef(label, weights, digest, vector_dim(clip))
    _record(reference, clip, file)
    return clip, reference


def load_model_ref(
    model: ModelRef,
    what: str = "this artifact",
    *,
    device: str | torch.device | None = None,
    precision: Precision = DEFAULT_PRECISION,
) -> Encoder:
    """Load the model that an artifact was built with, and check that it is unchanged.

    Args:
        model: the reference in the artifact's manifest.
        what: names the artifact in errors.
        device: as in ``load_model``.
        precision: as in ``load_model``; vectors of both precisions are compatible.

    Raises:
        ModelError: it cannot be loaded, or the vectors came from outside clipkit.
        ModelMismatchError: the model found has other weights or preprocessing.
    """
    if model.external:
        raise ModelError(
            f"the vectors of {what} came from outside clipkit, so the model for texts and images "
            "is unknown; name it (--model, or encoder= in Python), or search with a vector"
        )
    if model.weights == OBJECT:
        raise ModelError(
            f"{what} was built with {model}, which was passed to load_model as an object and "
            "cannot be loaded by name; load it again and pass it as encoder="
        )
    name = f"{model.name}/{model.weights}" if model.weights else model.name
    encoder = load_model(name, device=device, precision=precision)
    model.require(
        encoder.model,
        what=what,
        repair="restore the original model, or embed and index again with the new one",
    )
    return encoder


def resolve(model: str) -> tuple[str, str]:
    """Split a MODEL string into open_clip's model name and its weights.

    Returns:
        name and weights; the weights are empty for directories and hub repositories.

    Raises:
        ModelError: no such model.
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
            raise ModelError(f"the model {model} does not exist; restore it or name another one")
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
        raise ModelError(
            f"{model!r} is neither a directory nor an open_clip model name with weights; {hint}"
        )
    if not weights:
        raise ModelError(
            f"{model} names no weights, and random weights give meaningless vectors; expected "
            f"{name}/TAG or {name}/path/to/weights with TAG one of {_tags(name)}"
        )
    for file in (Path(weights), Path("/") / weights):
        if file.is_file():
            return name, str(file.absolute())
    if get_pretrained_cfg(name, weights):
        return name, weights
    raise ModelError(f"{weights!r} is neither a file nor a tag of {name}; its tags: {_tags(name)}")


def _split_name(model: str) -> tuple[str, str]:
    """Split ``NAME/WEIGHTS``; OpenAI's NAMEs may contain a slash themselves (``ViT-B/32``)."""
    first, _, rest = model.partition("/")
    second, _, weights = rest.partition("/")
    if first not in open_clip.list_models() and f"{first}-{second}" in open_clip.list_models():
        return f"{first}-{second}", weights
    return first, rest


def _tags(name: str, most: int = 8) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    more = f" and {len(tags) - most} more" if len(tags) > most else ""
    return (", ".join(tags[:most]) or "none") + more


def model_config(name: str) -> dict[str, Any]:
    """open_clip's ``model_cfg`` for a name that ``resolve`` returned.

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
        raise _unsuitable(name.removeprefix("local-dir:"), reason)
    return config


def _require_vectors(name: str, clip: Any) -> None:
    if reason := why_no_vectors(clip):
        raise ModelError(f"{name} cannot be used: {reason}")


def _unsuitable(name: str, reason: str) -> ModelError:
    return ModelError(
        f"{name} cannot be used: {reason}; clipkit takes models with CLIP's byte-level BPE of "
        "49,408 entries and its 77-token context"
    )


def _create(name: str, weights: str) -> tuple[Any, Path]:
    """Build a model with open_clip.

    Returns:
        the model, and the file of its weights.

    Raises:
        ModelError: anything fails.
    """
    model_config(name)
    tag = get_pretrained_cfg(name, weights) if weights else None
    try:
        with _quiet():
            # Download first, to tell network failures from weights that do not fit.
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
            f"{weights or name} is damaged or would run code when opened; "
            "expected weights as .safetensors or a plain PyTorch state dict"
        ) from None
    except (RuntimeError, KeyError, SafetensorError) as error:
        what = f"{name}/{weights}".rstrip("/").removeprefix("local-dir:")
        raise ModelError(f"the weights of {what} do not fit the model: {_short(error)}") from None
    if not file:
        raise ModelError(f"{name} has a configuration but no weights; expected both")
    return clip, Path(file)


def _weights_file(name: str) -> str | Path | None:
    """The weights of a directory or hub repository; without them open_clip keeps random ones."""
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
        f"the model {what} is not in the local cache and the hub was not reached; name a run or "
        "checkpoint, or weights on disk (NAME/path/to/weights.safetensors), or connect to the "
        f"network once (the hub: {_short(error)})"
    )


def _short(error: Exception, limit: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + "…"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which logs through the root logger; failures are raised instead."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _load_object(
    model: nn.Module, transform: Transform | None, tokenizer: Tokenizer | None
) -> tuple[Any, ModelRef, Preprocess]:
    """A float32 copy of an open_clip model on the CPU, its reference and its preprocessing."""
    name = type(model).__name__
    if not isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP):
        raise ModelError(f"found a {name}, expected an open_clip CLIP or CustomTextCLIP")
    text = getattr(model, "text", model)
    words, positions = (getattr(text, k, None) for k in ("token_embedding", "positional_embedding"))
    if words is None or positions is None:
        raise _unsuitable(f"the {name}", f"its text tower is a {type(text).__name__}")
    shapes = {"vocab_size": words.num_embeddings, "context_length": positions.shape[0]}
    if reason := why_unsuitable(shapes):
        raise _unsuitable(f"the {name}", reason)
    _require_vectors(f"the {name}", model)
    if tokenizer is not None:
        _check_tokenizer(tokenizer)
    preprocess, facts = _as_preprocess(transform, getattr(model.visual, "preprocess_cfg", None))
    # A copy, because preparing an encoder folds and rounds the weights in place.
    clip = deepcopy(model).cpu().float().eval()
    return clip, ModelRef(name, OBJECT, fingerprint(clip, facts), vector_dim(clip)), preprocess


_PROBE_CAPTIONS = ["a photo of a cat", "It's 12 o'clock: RAINING &amp; naïve", "\U0001f600 !", ""]
_PROBE_CAPTIONS += [f"{'long ' * 90}caption"]


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose ids differ from CLIP's; raises ModelError."""
    wanted = tokenize(_PROBE_CAPTIONS, report=TruncationReport())
    found = np.asarray(tokenizer(list(_PROBE_CAPTIONS)))
    if found.shape != wanted.shape:
        raise ModelError(
            f"the tokenizer returns ids of shape {list(found.shape)} for {len(wanted)} captions, "
            f"expected {list(wanted.shape)}: CLIP's byte-level BPE with a context of 77 tokens"
        )
    different = np.flatnonzero((found != wanted).any(axis=1))
    if len(different):
        raise ModelError(
            f"the tokenizer reads {_PROBE_CAPTIONS[different[0]][:40]!r} differently from CLIP's "
            "byte-level BPE; pass open_clip.get_tokenizer of a CLIP model, or no tokenizer"
        )


@dataclass(frozen=True, kw_only=True)
class CustomPreprocess(Preprocess):
    """A transform other than open_clip's standard one, applied to each image as it is.

    Attributes:
        transform: PIL image to float32 [3, height, width].
    """

    transform: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        """The transformed image, float32 [3, height, width]."""
        return torch.as_tensor(self.transform(image.convert("RGB"))).float()

    def reduction(self, decode: Decode) -> None:
        """None: the transform gets images at full size."""
        del decode

    def pixels(self, image: Image.Image, decode: Decode = "exact") -> NDArray[Any]:
        """The transformed image with channels last, float32 [height, width, 3]."""
        del decode
        return self(image).permute(1, 2, 0).contiguous().numpy()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return the images unchanged, as float32; the transform has normalised them."""
        return pixels.float()


def _as_preprocess(transform: Transform | None, config: Any) -> tuple[Preprocess, dict[str, Any]]:
    """A transform as a ``Preprocess``, and the facts that identify it.

    A transform that equals one of open_clip's bit for bit on probe images becomes a plain
    ``Preprocess``, with the same fingerprint as the same model loaded by name.

    Args:
        transform: from the caller.
        config: the model's own ``preprocess_cfg``, if any.
    """
    if isinstance(transform, Preprocess) and not isinstance(transform, CustomPreprocess):
        return transform, {"mode": "RGB", **vars(transform)}
    if transform is None:
        if config is None:
            raise ModelError(
                "the model object names no preprocessing; pass preprocess=, the last value that "
                "open_clip.create_model_and_transforms returns"
            )
        return Preprocess.of(config), dict(config)
    random = np.random.default_rng(0)
    shapes = ((90, 120), (150, 100), (64, 64), (300, 500))
    probes = [Image.fromarray(random.integers(0, 256, (*s, 3), np.uint8)) for s in shapes]
    wanted = [_transformed(transform, probe) for probe in probes]
    if not torch.equal(wanted[0], _transformed(transform, probes[0])):
        raise ModelError(
            "preprocess returns different values for the same image; pass the inference transform "
            "instead of the training transform"
        )
    if len({tensor.shape for tensor in wanted}) > 1:
        raise ModelError("preprocess returns tensors of different sizes, expected one size")
    size = (wanted[0].shape[1], wanted[0].shape[2])
    for candidate in _candidates(transform, size, config):
        standard = Preprocess.of(candidate)
        if all(torch.equal(standard(p), w) for p, w in zip(probes, wanted, strict=True)):
            return standard, candidate
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in wanted)).hexdigest()
    custom = CustomPreprocess(size=size, mean=(0.0,) * 3, std=(1.0,) * 3, transform=transform)
    return custom, {"transform": digest}


def _candidates(
    transform: Transform, size: tuple[int, int], config: Any
) -> Iterator[dict[str, Any]]:
    """Configurations of open_clip's transform that may equal a given one, likeliest first."""
    if config is not None:
        yield dict(config)
    for step in getattr(transform, "transforms", []):
        if hasattr(step, "mean") and hasattr(step, "std"):
            known = {"size": size, "mode": "RGB", "fill_color": 0}
            known |= {"mean": tuple(step.mean), "std": tuple(step.std)}
            for mode, kind in product(("shortest", "longest", "squash"), ("bicubic", "bilinear")):
                yield known | {"resize_mode": mode, "interpolation": kind}


def _transformed(transform: Transform, image: Image.Image) -> Tensor:
    found = transform(image)
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[0] != 3:
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found)
        raise ModelError(
            f"preprocess returns {what} for an image, expected a float tensor [3, height, width]"
        )
    return found.float()


_TEXT_PARTS = (
    "token_embedding",
    "positional_embedding",
    "transformer",
    "ln_final",
    "text_projection",
)


def _record(model: ModelRef, clip: Any, file: Path) -> None:
    """Record the file for ``load_query_encoder``, if it holds the text tower's weights as loaded.

    Args:
        model: the reference, with the fingerprint of all weights just computed.
        clip: the open_clip model, as loaded.
        file: the file of its weights.
    """
    text = getattr(clip, "text", clip)
    if file.suffix != ".safetensors" or not runs_text_tower(text) or find_text_tower(model):
        return
    blocks = text.transformer.resblocks
    activations = {_activation(block.mlp.gelu) for block in blocks}
    heads = {block.attn.num_heads for block in blocks}
    norms = [m for m in (*blocks.modules(), text.ln_final) if isinstance(m, nn.LayerNorm)]
    plain = None not in activations and all(norm.eps == EPSILON for norm in norms)
    if not plain or len(activations) != 1 or len(heads) != 1:
        return
    try:
        before = file_stamp(file)
        prefix = _prefix(text, file)
        unchanged = file_stamp(file) == before
    except (OSError, SafetensorError):
        return
    if prefix is not None and unchanged:
        activation = str(activations.pop())
        record_text_tower(
            model, TextTowerFile(str(file), before, prefix, heads.pop(), len(blocks), activation)
        )


def _activation(module: nn.Module) -> str | None:
    if type(module) is QuickGELU:
        return "quick_gelu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def _prefix(text: nn.Module, file: Path) -> str | None:
    """The prefix of the tower's weights in a file; None if the file holds other weights."""
    wanted = {
        name: tensor
        for name, tensor in text.state_dict().items()
        if name.partition(".")[0] in _TEXT_PARTS
    }
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
        for prefix in ("", "text."):
            if all(prefix + name in names for name in wanted):
                equal = all(_equal(weights.get_tensor(prefix + n), t) for n, t in wanted.items())
                return prefix if equal else None
    return None


def _equal(saved: Tensor, loaded: Tensor) -> bool:
    # bfloat16 is excluded, because numpy cannot read it.
    return saved.dtype in (torch.float32, torch.float16) and torch.equal(saved.float(), loaded)
