"""Encoder: images or captions to unit vectors.

Pictures through an image tower in batches as large as its device takes.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipkit.artifacts import ModelRef
from clipkit.data.transforms import Pixels, Preprocess, as_batch
from clipkit.display.html import card
from clipkit.errors import ModelError
from clipkit.models.dual_encoder import DualEncoder, is_convolutional
from clipkit.models.tokenizer import CONTEXT, TruncationReport, tokenize, warn_truncated
from clipkit.progress import print_status

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
    def encode_text(
        self,
        captions: Sequence[str],
        batch_tokens: int | None = None,
        *,
        policy: Literal["cut", "error"] = "cut",
        report: TruncationReport | None = None,
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
        counted = TruncationReport() if report is None else report
        vectors = np.empty((len(captions), self.dim), np.float32)
        self.network.eval()
        for start in range(0, len(captions), WINDOW):
            window = list(captions[start : start + WINDOW])
            tokens = tokenize(window, policy=policy, report=counted)
            distinct, places = np.unique(tokens, axis=0, return_inverse=True)
            vectors[start : start + len(window)] = self._encode_rows(distinct, most)[places.ravel()]
        if report is None:
            warn_truncated(counted, stacklevel=4)  # the decorator is a frame of its own
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


BatchSize = int | Literal["auto"]

_ON_CPU = 64
_MOST = 1024  # beyond, a card of today is busy in any case, and more pictures would wait in memory
_TRIAL = 16  # pictures by which a card's need is measured
_SHARE = 0.7  # of the free memory, for the allocator loses some between its blocks


class Batcher:
    """Encodes pictures, in smaller batches from the time on that the device's memory is full.

    Attributes:
        size: pictures encoded at once.

    Args:
        encoder: the model.
        size: to begin with; ``"auto"`` is 64 on a CPU, and on a CUDA device the power of two up to
            1,024 for which its free memory suffices, by what a small batch needs.
    """

    def __init__(self, encoder: "Encoder", size: BatchSize) -> None:
        self.encoder = encoder
        self._cuda = encoder.device.type == "cuda"
        self.size = self._fitting() if size == "auto" else size

    def encode(self, pictures: Sequence[Pixels]) -> "Vectors":
        """Encode pictures.

        Args:
            pictures: uint8 [height, width, 3] each, as ``preprocess.pixels`` makes them.

        Returns:
            float32 [n, dim], rows of unit length.

        Raises:
            ModelError: the memory does not suffice for a single one.
        """
        vectors: list[Vectors] = []
        start = 0
        while start < len(pictures):
            part = pictures[start : start + self.size]
            try:
                vectors.append(self._encode(part))
            except torch.OutOfMemoryError as error:
                reason = error
            else:
                start += len(part)
                continue
            # Only now: within the handler, the failed batch is still held by the traceback.
            self._halve(len(part), reason)
        return np.concatenate(vectors)

    def _encode(self, pictures: Sequence[Pixels]) -> "Vectors":
        batch = as_batch(pictures, pinned=self._cuda)
        return self.encoder.encode_images(batch, batch_size=len(batch))

    def _halve(self, tried: int, reason: Exception) -> None:
        if tried == 1:
            found = str(reason).split("\n")[0][:150]
            raise ModelError(
                f"a single image does not fit into the memory of {self.encoder.device} ({found}); "
                "free some, or use another device"
            ) from None
        self.size = tried // 2
        if self._cuda:
            torch.cuda.empty_cache()
        print_status(f"out of memory: going on with batches of {self.size} images")

    def _fitting(self) -> int:
        if not self._cuda:
            return _ON_CPU
        device = self.encoder.device
        blank = np.zeros((*self.encoder.preprocess.size, 3), np.uint8)
        self._encode([blank])  # what is set up once, at the first batch, is no picture's need
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._encode([blank] * _TRIAL)
        need = (torch.cuda.max_memory_allocated(device) - before) / _TRIAL
        return largest_batch(torch.cuda.mem_get_info(device)[0], need)


def largest_batch(free: int, need: float) -> int:
    """The power of two, 1 to 1,024, of pictures that need so many bytes each of the free ones."""
    fitting = int(min(_SHARE * free / max(need, 1.0), _MOST))
    return 1 << max(fitting, 1).bit_length() - 1
