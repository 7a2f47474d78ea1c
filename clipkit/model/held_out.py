"""The pairs that a run is measured on, and what its locked towers have made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipkit.data.features import Features
from clipkit.data.sources import Row, Source
from clipkit.errors import ImageError
from clipkit.model.encode_pairs import EncodedPairs, encode_pairs
from clipkit.model.encoder import Encoder, Vectors
from clipkit.model.stored import CaptionFeatures
from clipkit.model.tokenizer import CutReport, tokenize

ROWS = 4096
"""Images whose features are read at a time."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs. Where a locked tower's features are stored, only what is above them is run.

    Attributes:
        source: where the pairs come from.
        workers: decoding threads.
        images: stored features of the images; None: the whole image tower is run.
        captions: stored features of the captions; None: the whole text tower is run.
    """

    source: Source
    workers: int
    images: Features | None = None
    captions: CaptionFeatures | None = None

    def encode(self, encoder: Encoder) -> EncodedPairs:
        """The pairs as vectors of the model as it is; raises what ``encode_pairs`` raises."""
        return encode_pairs(
            encoder,
            self.source,
            workers=self.workers,
            progress=False,
            known=_images(encoder, self.images) if self.images else None,
            known_captions=_captions(encoder, self.captions) if self.captions else None,
        )


def _images(encoder: Encoder, features: Features) -> Callable[[Row], Vectors]:
    views = features.values[:, 0]
    parts = (np.array(views[start : start + ROWS]) for start in range(0, len(views), ROWS))
    vectors = np.concatenate([_vectors(encoder, "image", torch.from_numpy(x)) for x in parts])

    def known(row: Row) -> Vectors:
        key = row["key"]
        if key in features.skipped:
            raise ImageError(features.skipped[key])
        row_number = features.rows[key]
        return vectors[row_number : row_number + 1]

    return known


def _captions(
    encoder: Encoder, features: CaptionFeatures
) -> Callable[[Sequence[str], CutReport], Vectors]:
    def known(texts: Sequence[str], report: CutReport) -> Vectors:
        tokens = torch.from_numpy(tokenize(texts, report=report))
        return _vectors(encoder, "text", features.of(tokens))

    return known


@torch.inference_mode()
def _vectors(encoder: Encoder, tower: str, features: Tensor) -> Vectors:
    network = encoder.network.eval()
    vectors: Vectors = network.encode_features(tower, features.to(encoder.device)).cpu().numpy()
    return vectors
