"""Recall of a model where an equal caption of another image counts as right, and where not.

python scripts/recipes/recall_of_equal_captions.py DATA MODEL
"""

import sys

import numpy as np

import clipkit
from clipkit.data.sources import open_source
from clipkit.metrics import Floats, Integers, retrieval_recall
from clipkit.model.encode_pairs import encode_pairs


def recall_of_equal(
    images: Floats, captions: Floats, owners: Integers, groups: Integers
) -> dict[str, float]:
    """Recall@k in both directions; any caption equal to one of an image's own is right for it.

    Args:
        images: float32 [n, dim].
        captions: float32 [m, dim].
        owners: int64 [m], the row of each caption's image.
        groups: int64 [m], equal for equal captions.
    """
    own = np.zeros((len(images), groups.max() + 1), bool)
    own[owners, groups] = True
    right = own[:, groups]  # [images, captions]
    scores = images @ captions.T
    found = {}
    for name, table, truth in (
        ("text_to_image", scores.T, right.T),
        ("image_to_text", scores, right),
    ):
        best = np.where(truth, table, -np.inf).max(axis=1)
        ahead = ((table >= best[:, None]) & ~truth).sum(axis=1)
        for k in (1, 5, 10):
            found[f"{name}_r{k}"] = float((ahead < k).mean())
    return found


def main() -> None:
    data, model = sys.argv[1:]
    pairs = encode_pairs(clipkit.load(model), open_source(data), workers=2, progress=False)
    said = [text.lower().rstrip(" .") for text in pairs.texts]
    groups = np.unique(said, return_inverse=True)[1]
    plain = retrieval_recall(pairs.images, pairs.captions, pairs.owners)
    equal = recall_of_equal(pairs.images, pairs.captions, pairs.owners, groups)
    print(f"{model}: {groups.max() + 1} distinct captions of {len(groups)}")
    for name, value in plain.items():
        print(f"{name:18} {value:.3f}  equal captions right: {equal[name]:.3f}")


if __name__ == "__main__":
    main()
