"""Encode text queries in numpy, without importing torch.

Importing torch and open_clip and building a model take seconds; the words of one query take
milliseconds. So the cold start of a text search is 5.3 times as fast as with the whole model
(`python -m scripts.benchmarks.search.startup`). The function is that of ``transformer``, checked by
value in the tests.

A fingerprint requires reading all weights. When a model is loaded whole, ``record_text_tower``
therefore stores which file holds its text tower, in the user's cache directory. The file counts as
unchanged while its size, inode and times stay the same; the kernel sets one of these times itself.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from clipkit.artifacts import ModelRef, write_json
from clipkit.errors import ModelError
from clipkit.models.tokenizer import caption_list, tokenize
from clipkit.user_cache import cache_folder

Array = NDArray[np.float32]

EPSILON = 1e-5
"""Epsilon of the layer norms; towers with another one are not recorded."""
_PARTS = ("positional_embedding", "transformer.", "ln_final.", "text_projection")
# The error function to 1.5e-7, which numpy lacks: Abramowitz and Stegun 1964, "Handbook of
# Mathematical Functions", equation 7.1.26.
_ERF_SCALE = 0.3275911
_ERF_POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0)


@dataclass(frozen=True)
class TextTowerFile:
    """A text tower on disk, with the settings that its weights do not show.

    Attributes:
        file: a .safetensors file.
        stamp: its ``file_stamp`` when it was read.
        prefix: prefix of the names of the tower's weights.
        heads: attention heads per block.
        layers: number of blocks.
        activation: "gelu" or "quick_gelu".
    """

    file: str
    stamp: list[int]
    prefix: str
    heads: int
    layers: int
    activation: str


def file_stamp(file: str | Path) -> list[int]:
    """Size, times, inode and device of a file; raises OSError if it does not exist."""
    status = os.stat(file)
    return [
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    ]


def record_text_tower(model: ModelRef, tower: TextTowerFile) -> None:
    """Store where a model's text tower is; does nothing without a writable cache directory."""
    file = _record_file(model)
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"model": [model.name, model.weights], "tower": asdict(tower)})


def find_text_tower(model: ModelRef) -> TextTowerFile | None:
    """The file of a model's text tower; None if it is unknown or has changed."""
    file = _record_file(model)
    if file is None or not re.fullmatch("[0-9a-f]{64}", model.fingerprint):
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        tower = TextTowerFile(**record["tower"])
        same = record["model"] == [model.name, model.weights]
        same = same and file_stamp(tower.file) == tower.stamp
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tower if same else None


def _record_file(model: ModelRef) -> Path | None:
    folder = cache_folder()
    return folder / "models" / f"{model.fingerprint}.json" if folder else None


def load_query_encoder(model: ModelRef) -> "QueryEncoder | None":
    """The text tower of a model that was loaded whole on this machine before.

    Args:
        model: the reference in an artifact's manifest.

    Returns:
        None if its file is unknown, changed or unreadable; use ``load_model_ref`` then.
    """
    tower = find_text_tower(model)
    try:
        return None if tower is None else QueryEncoder(model, tower)
    except (OSError, SafetensorError, KeyError):
        return None


class QueryEncoder:
    """Captions to vectors, float32 [n, dim], unit rows; the text half of an ``Encoder``.

    Attributes:
        model: which model this is.
        dim: width of the vectors.
    """

    def __init__(self, model: ModelRef, tower: TextTowerFile) -> None:
        self.model, self.dim, self._tower = model, model.dim, tower
        file: Any = safe_open(tower.file, "np")
        # A slice is read row by row: a query needs few of the 49,408 rows.
        self._words = file.get_slice(f"{tower.prefix}token_embedding.weight")
        wanted = tuple(tower.prefix + part for part in _PARTS)
        self._weights: dict[str, Array] = {
            name.removeprefix(tower.prefix): file.get_tensor(name).astype(np.float32, copy=False)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(wanted)
        }

    def encode_text(self, captions: str | Iterable[str]) -> Array:
        """Encode one caption or many, each cut to 77 tokens with a warning.

        Returns:
            float32 [dim] for a ``str``, float32 [n, dim] for a sequence; unit rows.

        Raises:
            TypeError: neither a string nor a sequence of strings.
        """
        rows = tokenize(caption_list(captions))
        vectors = [self._encode(row[: row.argmax() + 1].tolist()) for row in rows]
        if isinstance(captions, str):
            return vectors[0]
        return np.stack(vectors) if vectors else np.empty((0, self.dim), np.float32)

    def encode_images(self, images: Any) -> Any:
        """Raise ModelError; the image tower is not loaded."""
        del images
        return self.preprocess

    @property
    def preprocess(self) -> Any:
        """Raise ModelError; the image tower is not loaded."""
        raise ModelError(
            f"the image tower of {self.model} is not loaded; load the model with clipkit.load_model"
        )

    def _encode(self, ids: list[int]) -> Array:
        words = np.concatenate([self._words[i : i + 1] for i in ids]).astype(np.float32)
        x = words + self._weights["positional_embedding"][: len(ids)]
        for number in range(self._tower.layers):
            x = self._block(x, f"transformer.resblocks.{number}.")
        x = self._norm(x[-1:], "ln_final")
        if "text_projection" in self._weights:
            x = x @ self._weights["text_projection"]
        elif "text_projection.weight" in self._weights:
            x = self._linear(x, "text_projection.")
        vector: Array = x[0] / np.linalg.norm(x[0])
        return vector

    def _block(self, x: Array, name: str) -> Array:
        """One residual block, float32 [tokens, width] to the same."""
        h = self._linear(self._norm(x, f"{name}ln_1"), f"{name}attn.in_proj_")
        h = self._linear(_attend(h, self._tower.heads), f"{name}attn.out_proj.")
        x = x + self._scaled(h, f"{name}ls_1.gamma")
        h = self._linear(self._norm(x, f"{name}ln_2"), f"{name}mlp.c_fc.")
        h = _gelu(h) if self._tower.activation == "gelu" else _quick_gelu(h)
        h = self._linear(h, f"{name}mlp.c_proj.")
        return x + self._scaled(h, f"{name}ls_2.gamma")

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled: Array = centred / np.sqrt(variance + np.float32(EPSILON))
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def _linear(self, x: Array, name: str) -> Array:
        out: Array = x @ self._weights[f"{name}weight"].T
        return out + self._weights[f"{name}bias"] if f"{name}bias" in self._weights else out

    def _scaled(self, x: Array, name: str) -> Array:
        return x * self._weights[name] if name in self._weights else x


def _attend(qkv: Array, heads: int) -> Array:
    """Causal self-attention: [tokens, 3 · width] to [tokens, width]."""
    length, width = len(qkv), qkv.shape[1] // 3
    q, k, v = qkv.reshape(length, 3, heads, width // heads).transpose(1, 2, 0, 3)
    scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(width // heads))
    scores[:, ~np.tri(length, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended: Array = (weights @ v).transpose(1, 0, 2).reshape(length, width)
    return attended


def _gelu(x: Array) -> Array:
    """Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", equation 2."""
    z = np.abs(x) * np.sqrt(0.5)
    t = 1 / (1 + _ERF_SCALE * z)
    tail: Any = np.polyval(_ERF_POLYNOMIAL, t) * np.exp(-z * z)  # 1 - erf(z)
    out: Array = (x * np.where(x < 0, tail, 2 - tail) / 2).astype(np.float32)
    return out


def _quick_gelu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp overflows for large negative x, where the result is 0
        out: Array = x / (1 + np.exp(-1.702 * x))
    return out
