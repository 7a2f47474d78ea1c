"""A checkpoint directory that open_clip itself can load.

``open_clip_config.json`` and ``open_clip_model.safetensors`` are the names open_clip looks for in
``local-dir:PATH``; ``training_state.pt`` beside them holds what a run needs to resume.
"""

import hashlib
import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from clipkit.artifacts import (
    MANIFEST,
    ArtifactWriter,
    Manifest,
    ModelRef,
    is_complete,
    read_manifest,
    write_json,
)
from clipkit.data.transforms import Preprocess
from clipkit.errors import ArtifactError, ModelError
from clipkit.models.dual_encoder import DualEncoder, LockedTower, activations, heads, vector_dim
from clipkit.models.encoder import Encoder
from clipkit.models.tokenizer import CONTEXT, VOCAB

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
STATE = "training_state.pt"


@dataclass(frozen=True)
class Towers:
    """An open_clip model and the configuration to build it again.

    Attributes:
        clip: the open_clip model.
        model_config: the arguments of its constructor, open_clip's ``model_cfg``.
        preprocess: its ``preprocess_cfg`` (size, mean, std, interpolation, resize mode).
        locked: the frozen towers, by "image" or "text".
    """

    clip: Any
    model_config: dict[str, Any]
    preprocess: dict[str, Any]
    locked: dict[str, LockedTower] = field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, int]:
        """Input height and width, in pixels."""
        size = self.preprocess["size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def encoder(self, network: DualEncoder) -> Encoder:
        """An Encoder over a network in training, for evaluation but not for artifacts.

        It has no fingerprint: computing one reads all weights, and the next step changes it.
        """
        model = ModelRef("a network in training", "", "", vector_dim(self.clip))
        return Encoder(network, model, Preprocess.of(self.preprocess))


def fingerprint(clip: nn.Module, preprocess: dict[str, Any]) -> str:
    """SHA-256 of what determines a vector: weights, activations, preprocessing, tokenizer.

    Args:
        clip: an open_clip model.
        preprocess: its ``preprocess_cfg``, or other facts that identify its preprocessing.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        array = tensor.detach().float().cpu().contiguous().numpy()
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    facts = {
        "activations": activations(clip),
        "heads": heads(clip.modules()),
        "preprocess": {key: preprocess[key] for key in sorted(preprocess)},
        "tokenizer": f"CLIP byte-level BPE, {VOCAB} entries, context {CONTEXT}",
    }
    digest.update(json.dumps(facts, sort_keys=True, default=list).encode())
    return digest.hexdigest()


def save_checkpoint(
    path: Path, towers: Towers, state: dict[str, Any], detail: dict[str, Any]
) -> ModelRef:
    """Write a checkpoint directory atomically.

    Args:
        path: the directory, ``RUN/step-N``.
        towers: the model to save and its configuration.
        state: what training needs to resume: tensors, numbers, strings and containers of them.
        detail: further entries of the manifest: ``step`` and held-out metrics.

    Raises:
        ArtifactError: it cannot be written, for example on a full disk; nothing is left behind.
    """
    clip, preprocess = towers.clip, towers.preprocess
    model = ModelRef(str(path), "", fingerprint(clip, preprocess), vector_dim(clip))
    with ArtifactWriter(path, "checkpoint", replace=True) as writer:
        config = {"model_cfg": towers.model_config, "preprocess_cfg": preprocess}
        write_json(writer.temp / CONFIG, config)
        tensors = {name: t.detach().contiguous().clone() for name, t in clip.state_dict().items()}
        try:
            save_file(tensors, writer.temp / WEIGHTS, metadata={"format": "pt"})
            torch.save(state, writer.temp / STATE)
            writer.finish(Manifest("checkpoint", model, int(detail["step"]), detail=detail))
        # Neither library raises an OSError for a full or missing disk.
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ArtifactError(_cannot_save(path, error)) from None
    return model


def _cannot_save(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120].rstrip(".")
    if shutil.disk_usage(path.parent).free < 2**20:  # torch itself only says "unexpected pos"
        reason = "its disk is full"
    return (
        f"the checkpoint {path} cannot be saved ({reason}); make room and go on from the last one "
        "with --resume"
    )


def load_training_state(path: Path) -> dict[str, Any]:
    """The ``training_state.pt`` of a checkpoint; raises ArtifactError if it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise damaged(path / STATE, "it would run code, or is cut short") from None
    except Exception as error:  # damaged files raise nearly any exception
        raise damaged(path / STATE, error) from None
    return state


def damaged(file: Path, error: object) -> ArtifactError:
    """The error for a damaged file of a checkpoint."""
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ArtifactError(
        f"{file} cannot be read ({reason}); remove {file.parent} to go on from the checkpoint "
        "before it"
    )


def is_step(path: Path) -> bool:
    """Whether a path is named like a checkpoint, ``step-N``."""
    return path.name.removeprefix("step-").isdecimal()


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, ordered by step."""
    found = [p for p in run.glob("step-*") if is_step(p) and (p / MANIFEST).is_file()]
    return sorted(found, key=checkpoint_step)


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the best held-out recall so far.

    Raises:
        ModelError: no recall was measured, or the checkpoint is gone.
    """
    best = read_manifest(run_checkpoints(run)[-1], "checkpoint").detail.get("best")
    if best and is_complete(run / f"step-{best['step']}"):
        return run / f"step-{best['step']}"
    raise ModelError(
        f"{run} has no best checkpoint, which requires a held-out set and train.best_metric; "
        f"use {run} for the last checkpoint"
    )


def checkpoint_directory(path: Path) -> Path:
    """The directory that holds the weights: ``path`` itself, or the last checkpoint of a run.

    Raises:
        ModelError: ``path`` holds no model.
    """
    path = path.absolute()
    if (path / CONFIG).is_file():
        return path
    steps = run_checkpoints(path)
    if steps:
        return steps[-1]
    found = "no clipkit artifact"
    if is_complete(path):
        found = f"a clipkit {read_manifest(path).kind}"
    elif (path / "config.toml").is_file():
        found = "a run without a finished checkpoint"
    raise ModelError(
        f"{path} holds {found}, expected a run, a checkpoint or a directory with {CONFIG}"
    )
