"""A classifier at rest: a directory with its arrays, its labels and the model it was made for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.data.label_set import Label, path_of
from clipkit.errors import ArtifactError
from clipkit.manifest import ArtifactWriter, Manifest, is_complete, read_manifest
from clipkit.model.classifier import Classifier, ZeroShotClassifier
from clipkit.model.heads import LinearHead, NeighbourHead, TipAdapterHead

ARRAYS = "classifier.safetensors"
_KINDS = {
    kind.kind: kind for kind in (ZeroShotClassifier, LinearHead, NeighbourHead, TipAdapterHead)
}


def save_classifier(
    classifier: Classifier, path: Path, source: Mapping[str, Any] | None = None
) -> None:
    """Write a classifier as a directory; one that stands there is replaced.

    Args:
        classifier: of any kind.
        path: where it shall stand.
        source: what it was made from, for the manifest.

    Raises:
        ArtifactError: ``path`` is taken by something else, or cannot be written.
    """
    from safetensors.numpy import save_file

    detail = {
        "type": classifier.kind,
        "labels": [list(path_of(label)) for label in classifier.labels],
        "settings": classifier.settings(),
    }
    manifest = Manifest(
        "classifier",
        classifier.model,
        len(classifier.labels),
        source=dict(source or {}),
        detail=detail,
    )
    with ArtifactWriter(path, "classifier", replace=True) as writer:
        save_file(classifier.arrays(), writer.temp / ARRAYS)
        writer.finish(manifest)


def is_classifier(path: Path) -> bool:
    """Whether a directory holds a classifier."""
    return is_complete(path) and read_manifest(path).kind == "classifier"


def open_classifier(path: Path) -> Classifier:
    """Read a classifier.

    Raises:
        ArtifactError: none, half-written, damaged, or of a kind that this clipkit does not know.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    manifest = read_manifest(path, "classifier")
    model, detail = manifest.require_model(), manifest.detail
    if detail.get("type") not in _KINDS:
        raise ArtifactError(
            f"{path} holds a classifier of type {detail.get('type')!r}, expected one of "
            f"{', '.join(_KINDS)}; upgrade clipkit to at least {manifest.clipkit}"
        )
    try:
        arrays = load_file(path / ARRAYS)
        labels = [Label(parts) for parts in detail["labels"]]
        kind: Any = _KINDS[detail["type"]]
        classifier: Classifier = kind.restore(labels, model, arrays, detail["settings"])
    except (OSError, SafetensorError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); make the classifier again") from None
    return classifier
