"""Encoder: images or captions to unit vectors."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipkit.manifest import ModelRef
from clipkit.model.network import DualEncoder
from clipkit.model.tokenizer import CutReport, tokenize

Vectors = NDArray[np.float32]
"""float32 [n, dim], rows of unit length."""


class Encoder:
    """Images or captions to vectors: float32 [n, dim], rows of unit length.

    Attributes:
        model: which model this is.
        dim: width of the vectors.
        network: the two towers as one torch module.
        preprocess: an RGB image to a float32 tensor [3, height, width], as the model expects it.
    """

    def __init__(
        self,
        network: DualEncoder,
        model: ModelRef,
        preprocess: Callable[[Image.Image], torch.Tensor],
    ) -> None:
        self.network = network
        self.model = model
        self.dim = model.dim
        self.preprocess = preprocess

    @property
    def scale(self) -> float:
        """The learned logit scale: the inverse temperature of its probabilities."""
        return float(self.network.scale.detach())

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def encode_images(
        self, images: Sequence[Image.Image] | torch.Tensor, batch_size: int = 64
    ) -> Vectors:
        """Encode images.

        Args:
            images: RGB pictures, or a float32 tensor [n, 3, height, width] already preprocessed.
            batch_size: how many go through the tower at once; the result does not depend on it.
        """
        vectors = np.empty((len(images), self.dim), np.float32)
        self.network.eval()
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            if not isinstance(part, torch.Tensor):
                part = torch.stack([self.preprocess(image) for image in part])
            encoded = self.network.encode_images(part.to(self.device))
            vectors[start : start + batch_size] = encoded.cpu().numpy()
        return vectors

    @torch.inference_mode()
    def encode_captions(
        self,
        captions: Sequence[str],
        batch_size: int = 256,
        *,
        policy: Literal["cut", "error"] = "cut",
        report: CutReport | None = None,
    ) -> Vectors:
        """Encode captions of at most 77 tokens each.

        Args:
            captions: any texts; what does not fit is cut, with a warning that shows the words lost.
            batch_size: how many go through the tower at once; the result does not depend on it.
            policy: ``"error"`` refuses captions that do not fit.
            report: counts what was cut instead of warning.

        Raises:
            CaptionError: a caption does not fit and the policy is ``"error"``.
        """
        tokens = tokenize(list(captions), policy=policy, report=report)
        # Captions of like length together: a batch costs as much as its longest caption.
        order = np.argsort(tokens.argmax(axis=1), kind="stable")
        vectors = np.empty((len(tokens), self.dim), np.float32)
        self.network.eval()
        for start in range(0, len(tokens), batch_size):
            rows = order[start : start + batch_size]
            part = torch.from_numpy(tokens[rows]).to(self.device)
            vectors[rows] = self.network.encode_tokens(part).cpu().numpy()
        return vectors
