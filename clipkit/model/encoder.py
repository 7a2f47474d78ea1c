"""Encoder: images or captions to unit vectors."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.preprocess import Preprocess, as_batch
from clipkit.manifest import ModelRef
from clipkit.model.network import DualEncoder, is_convolutional
from clipkit.model.tokenizer import CONTEXT, CutReport, tokenize, warn_of_cuts
from clipkit.pages.cards import card

Vectors = NDArray[np.float32]
"""float32 [n, dim], rows of unit length."""

WINDOW = 8192
"""Captions that are sorted by length together, which bounds what is held of them at a time."""
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens that go through the text tower at once, by the kind of device."""

PIXELS = 2**18
"""Of the pictures that go through a convolutional tower at once on a CPU, at least one a thread.
What is made of so few stays in the cache, and the system is not asked for memory anew: open_clip
encodes pictures of 260 pixels 2.5 times as fast by fours as it does by 64."""


class Encoder:
    """Images or captions to vectors: float32 [n, dim], rows of unit length.

    Attributes:
        model: which model this is.
        dim: width of the vectors.
        network: the two towers as one torch module.
        preprocess: an RGB image to a float32 tensor [3, height, width], as the model expects it.
    """

    def __init__(self, network: DualEncoder, model: ModelRef, preprocess: Preprocess) -> None:
        self.network = network
        self.model = model
        self.dim = model.dim
        self.preprocess = preprocess
        self._convolutional = is_convolutional(network.clip)

    def _repr_html_(self) -> str:
        weights = sum(parameter.numel() for parameter in self.network.parameters())
        facts = [
            ("vectors of", f"{self.dim} dimensions"),
            ("weights", f"{weights / 1e6:.1f} million, on {self.device}"),
            ("temperature", f"{1 / self.scale:.4f}"),
        ]
        return card(f"encoder {self.model}", facts)

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
        """Encode images; safe to call from several threads at a time.

        Args:
            images: RGB pictures; or a tensor [n, 3, height, width], uint8 as ``preprocess.pixels``
                gives it or float32 already normalised.
            batch_size: how many go through the tower at once, at most; the result depends on it by
                rounding alone.
        """
        batch_size = self._at_once(batch_size)
        layout = torch.channels_last if self._convolutional else torch.contiguous_format
        vectors = np.empty((len(images), self.dim), np.float32)
        self.network.eval()
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            if not isinstance(part, torch.Tensor):
                part = as_batch([self.preprocess.pixels(image) for image in part])
            part = part.to(self.device, non_blocking=True)
            if part.dtype == torch.uint8:
                part = self.preprocess.normalise(part)
            part = part.contiguous(memory_format=layout)
            encoded = self.network.encode_images(part)
            vectors[start : start + batch_size] = encoded.cpu().numpy()
        return vectors

    def _at_once(self, batch_size: int) -> int:
        if not self._convolutional or self.device.type != "cpu":
            return batch_size
        height, width = np.broadcast_to(self.network.clip.visual.image_size, 2)
        fitting = max(PIXELS // int(height * width), torch.get_num_threads())
        return min(batch_size, fitting)

    @torch.inference_mode()
    def encode_captions(
        self,
        captions: Sequence[str],
        batch_tokens: int | None = None,
        *,
        policy: Literal["cut", "error"] = "cut",
        report: CutReport | None = None,
    ) -> Vectors:
        """Encode captions of at most 77 tokens each; safe to call from several threads at a time.

        Captions of like length go through the tower together, without padding, equal ones once.

        Args:
            captions: any texts; what does not fit is cut, with a warning that shows the words lost.
            batch_tokens: how many tokens go through the tower at once, None: ``BATCH_TOKENS``; the
                result depends on it by rounding alone.
            policy: ``"error"`` refuses captions that do not fit.
            report: counts what was cut instead of warning.

        Raises:
            CaptionError: a caption does not fit and the policy is ``"error"``.
        """
        most = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        counted = CutReport() if report is None else report
        vectors = np.empty((len(captions), self.dim), np.float32)
        self.network.eval()
        for start in range(0, len(captions), WINDOW):
            window = list(captions[start : start + WINDOW])
            tokens = tokenize(window, policy=policy, report=counted)
            distinct, places = np.unique(tokens, axis=0, return_inverse=True)
            vectors[start : start + len(window)] = self._encode_rows(distinct, most)[places.ravel()]
        if report is None:
            warn_of_cuts(counted, stacklevel=4)  # the decorator is a frame of its own
        return vectors

    def _encode_rows(self, tokens: NDArray[np.int64], most: int) -> Vectors:
        """int64 [n, 77] to vectors, about ``most`` tokens at a time."""
        lengths = tokens.argmax(axis=1) + 1
        order = np.argsort(lengths, kind="stable")
        run = lengths[order] if self.network.runs_texts else np.full(len(order), CONTEXT)
        cuts = np.flatnonzero(np.diff((np.cumsum(run) - 1) // most)) + 1
        vectors = np.empty((len(tokens), self.dim), np.float32)
        for rows in np.split(order, cuts):
            part = self.network.encode_tokens(torch.from_numpy(tokens[rows]))
            vectors[rows] = part.cpu().numpy()
        return vectors
