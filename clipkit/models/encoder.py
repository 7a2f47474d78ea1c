"""Encode images and captions to unit vectors."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipkit.arguments import require_integer, require_size
from clipkit.artifacts import ModelRef
from clipkit.data.images import read_image
from clipkit.data.transforms import Pixels, Preprocess, as_batch
from clipkit.display.html import card
from clipkit.errors import ImageError, ModelError
from clipkit.models.dual_encoder import DualEncoder, is_convolutional
from clipkit.models.tokenizer import (
    CONTEXT,
    TruncationReport,
    caption_list,
    tokenize,
    warn_truncated,
)
from clipkit.progress import print_status
from clipkit.shapes import Float32, Int64

Vectors = Float32[NDArray[np.float32], "n dim"]
"""Unit rows."""
Vector = Float32[NDArray[np.float32], " dim"]
ImageLike = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor
"""One image: a file, a PIL image, a uint8 array [height, width, 3], or a tensor [3, height, width]
that is uint8 or already normalised float."""

CAPTION_WINDOW = 8192
"""Captions are sorted by length within windows of this size, which bounds the memory for tokens."""
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens per pass through the text tower, by device type."""
CONVOLUTION_PIXELS = 2**18
"""Pixels per pass through a convolutional tower on a CPU (at least one image per thread).
Activations of so few pixels stay in the cache: open_clip encodes images of 260 pixels 2.5 times as
fast in batches of 4 as in batches of 64."""

_MOST_NORMALISED = 10.0
"""Normalised images are within ±3; pixels from 0 to 255 are not."""
_EXPECTED = (
    "expected a path, a PIL image, a uint8 array [height, width, 3], a tensor [3, height, width], "
    "or a sequence of them"
)


class Encoder:
    """Images and captions to vectors: float32 [n, dim], unit rows.

    Attributes:
        model: which model this is.
        dim: width of the vectors.
        network: the two towers as one torch module.
        preprocess: turns an RGB image into the float32 tensor [3, height, width] that the image
            tower takes.
    """

    def __init__(self, network: DualEncoder, model: ModelRef, preprocess: Preprocess) -> None:
        self.network = network
        self.model = model
        self.dim = model.dim
        self.preprocess = preprocess
        self._convolutional = is_convolutional(network.clip)

    def __repr__(self) -> str:
        return f"Encoder({str(self.model)!r}, dim={self.dim}, device={str(self.device)!r})"

    def _repr_html_(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        facts = [
            ("vectors", f"{self.dim} dimensions"),
            ("parameters", f"{parameters / 1e6:.1f} million, on {self.device}"),
            ("temperature", f"{1 / self.logit_scale:.4f}"),
        ]
        return card(f"encoder {self.model}", facts)

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature: logits are ``logit_scale`` times inner products."""
        return float(self.network.scale.detach())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def encode_images(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 64
    ) -> Vector | Vectors:
        """Encode one image or many. Thread-safe.

        Args:
            images: one image or a sequence of images. An image is a path, a PIL image, a uint8
                array [height, width, 3], a uint8 tensor [3, height, width], or a float tensor
                [3, height, width] that ``preprocess`` returned. An array or tensor with one more
                dimension is a batch.
            batch_size: maximum number of images per forward pass. It changes the result by
                rounding only.

        Returns:
            float32 [dim] for one image, float32 [n, dim] for a sequence or batch; unit rows.

        Raises:
            TypeError: an item of another type or dtype.
            ImageError: a file that cannot be read, an array of another shape, or a float tensor
                that is not normalised.
            ArgumentError: ``batch_size`` is below 1.
        """
        batch_size = require_integer("batch_size", batch_size)
        single = _is_single(images)
        if single:
            batch: Sequence[ImageLike] | Tensor = [images]  # type: ignore[list-item]
        elif isinstance(images, Tensor) and self._is_ready(images):
            if images.is_floating_point():
                _check_normalised(images)
            batch = images
        else:
            batch = list(images)  # type: ignore[arg-type]
        vectors = self._encode_batches(batch, batch_size)
        return vectors[0] if single else vectors

    def _is_ready(self, batch: Tensor) -> bool:
        """Whether a 4-D tensor needs no resizing, so that slices of it can be encoded."""
        of_model = tuple(batch.shape[1:]) == (3, *self.preprocess.size)
        return of_model and (batch.dtype == torch.uint8 or batch.is_floating_point())

    def _encode_batches(self, images: Sequence[ImageLike] | Tensor, batch_size: int) -> Vectors:
        if self._convolutional and self.device.type == "cpu":
            height, width = self.preprocess.size
            fitting = max(CONVOLUTION_PIXELS // (height * width), torch.get_num_threads())
            batch_size = min(batch_size, fitting)
        layout = torch.channels_last if self._convolutional else torch.contiguous_format
        vectors = np.empty((len(images), self.dim), np.float32)
        self.network.eval()
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            if not isinstance(part, Tensor):
                part = self._batch(part)
            part = part.to(self.device, non_blocking=True)
            if part.dtype == torch.uint8:
                part = self.preprocess.normalise(part)
            part = part.float().contiguous(memory_format=layout)
            encoded = self.network.encode_images(part)
            vectors[start : start + batch_size] = encoded.cpu().numpy()
        return vectors

    def _batch(self, images: Sequence[ImageLike]) -> Tensor:
        """Images of any kind as [n, 3, height, width]: uint8 if all are pixels, else float32."""
        prepared = [self._prepare(image) for image in images]
        pixels = [image for image in prepared if isinstance(image, np.ndarray)]
        if len(pixels) == len(prepared):
            return as_batch(pixels)
        return torch.stack(
            [
                image.float().cpu()
                if isinstance(image, Tensor)
                else self.preprocess.normalise(as_batch([image]))[0]
                for image in prepared
            ]
        )

    def _prepare(self, image: ImageLike) -> Pixels | Tensor:
        """One image as pixels of the model's size, or as the normalised tensor it already is."""
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            try:
                image = read_image(path)
            except ImageError as error:
                raise ImageError(f"{path} {error}") from None
        if isinstance(image, Tensor):
            if image.is_floating_point():
                wanted = (3, *self.preprocess.size)
                if tuple(image.shape) != wanted:
                    raise ImageError(
                        f"found a float tensor {list(image.shape)}, expected {list(wanted)} as "
                        "encoder.preprocess(image) returns it"
                    )
                _check_normalised(image[None])
                return image
            if image.ndim != 3 or image.shape[0] != 3:
                raise ImageError(
                    f"found a tensor {list(image.shape)}, expected [3, height, width] (channels "
                    "first)"
                )
            image = image.permute(1, 2, 0).cpu().numpy()
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"found {_kind(image)} as an image, {_EXPECTED}")
        return self.preprocess.pixels(image)

    @torch.inference_mode()
    def encode_text(
        self,
        captions: str | Iterable[str],
        batch_tokens: int | None = None,
        *,
        policy: Literal["cut", "error"] = "cut",
        report: TruncationReport | None = None,
    ) -> Vector | Vectors:
        """Encode one caption or many, of at most 77 tokens each. Thread-safe.

        Captions of similar length share a batch without padding; equal ones are encoded once.

        Args:
            captions: one text or a sequence of texts. A longer text is cut, with a warning that
                shows the words lost.
            batch_tokens: tokens per forward pass, by default ``BATCH_TOKENS``. It changes the
                result by rounding only.
            policy: ``"error"`` refuses captions that do not fit.
            report: counts the cut captions; no warning is given then.

        Returns:
            float32 [dim] for a ``str``, float32 [n, dim] for a sequence; unit rows.

        Raises:
            TypeError: neither a string nor a sequence of strings.
            CaptionError: a caption does not fit and ``policy`` is ``"error"``.
        """
        texts = caption_list(captions)
        most = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        counted = TruncationReport() if report is None else report
        vectors = np.empty((len(texts), self.dim), np.float32)
        self.network.eval()
        for start in range(0, len(texts), CAPTION_WINDOW):
            window = texts[start : start + CAPTION_WINDOW]
            tokens = tokenize(window, policy=policy, report=counted)
            distinct, places = np.unique(tokens, axis=0, return_inverse=True)
            vectors[start : start + len(window)] = self._encode_rows(distinct, most)[places.ravel()]
        if report is None:
            warn_truncated(counted, stacklevel=4)  # torch's decorator adds a frame
        return vectors[0] if isinstance(captions, str) else vectors

    def _encode_rows(self, tokens: Int64[NDArray[np.int64], "n 77"], most: int) -> Vectors:
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


def _is_single(images: object) -> bool:
    """Whether this is one image; raises TypeError unless it is one or iterable."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return True
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim == 1 and isinstance(images, np.ndarray) and images.dtype.kind in "OU":
            return False  # an array of paths
        if images.ndim not in (3, 4):
            raise ImageError(
                f"found {_kind(images)} of {images.ndim} dimensions, expected 3 (one image) or 4 "
                "(a batch)"
            )
        return images.ndim == 3
    if not isinstance(images, Iterable) or isinstance(images, bytes | Mapping | Set):
        raise TypeError(f"found {_kind(images)} as images, {_EXPECTED}")
    return False


def _check_normalised(images: Tensor) -> None:
    """Refuse float images [n, 3, height, width] that ``preprocess`` cannot have returned."""
    if not len(images):
        return
    flat = images.detach().flatten(1)
    low, high = (side.float().cpu().numpy() for side in (flat.amin(1), flat.amax(1)))
    if not np.isfinite([low, high]).all():
        raise ImageError("found a float tensor with NaN or infinite values, expected an image")
    if max(-low.min(), high.max()) > _MOST_NORMALISED:
        raise ImageError(
            f"found a float tensor with values from {low.min():.4g} to {high.max():.4g}, expected "
            "the normalised values that encoder.preprocess(image) returns; pass pixels as uint8"
        )
    if ((low >= 0) & (high <= 1) & (low < high)).any():
        warnings.warn(
            "a float tensor has values from 0 to 1 only, as before normalisation; expected what "
            "encoder.preprocess(image) returns",
            stacklevel=4,
        )


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        raise TypeError(
            f"found an image array of {array.dtype}, expected uint8 from 0 to 255; for floats "
            "from 0 to 1 pass (255 * image).round().astype('uint8')"
        )
    if array.ndim != 3 or array.shape[2] != 3:
        first = array.ndim == 3 and array.shape[0] == 3
        hint = "; move the channels last with image.transpose(1, 2, 0)" if first else ""
        raise ImageError(
            f"found an image array {list(array.shape)}, expected [height, width, 3]{hint}"
        )
    if 0 in array.shape:
        raise ImageError(f"found an image array {list(array.shape)} without pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return "an array"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


BatchSize = int | Literal["auto"]

_CPU_BATCH = 64
_LARGEST_BATCH = 1024  # a current GPU is fully used by then, and larger batches only wait in memory
_TRIAL_BATCH = 16  # images by which the memory per image is measured
_MEMORY_SHARE = 0.7  # of the free memory; the allocator loses some to fragmentation


class AdaptiveBatcher:
    """Encode pixels in batches that shrink when the device runs out of memory.

    Args:
        encoder: the model.
        size: initial batch size. ``"auto"`` is 64 on a CPU; on a CUDA device it is the largest
            power of two up to 1,024 that fits the free memory, estimated from a small batch.

    Attributes:
        size: the current batch size.
    """

    def __init__(self, encoder: Encoder, size: BatchSize) -> None:
        self.encoder = encoder
        self._cuda = encoder.device.type == "cuda"
        chosen = require_size("batch_size", size)
        self.size = self._fitting() if isinstance(chosen, str) else chosen

    def encode(self, images: Sequence[Pixels]) -> Vectors:
        """Encode images.

        Args:
            images: uint8 [height, width, 3] each, as ``preprocess.pixels`` returns them.

        Returns:
            float32 [n, dim], unit rows.

        Raises:
            ModelError: a single image does not fit into memory.
        """
        vectors: list[Vectors] = []
        start = 0
        while start < len(images):
            part = images[start : start + self.size]
            try:
                vectors.append(self._encode(part))
            except torch.OutOfMemoryError as error:
                reason = error
            else:
                start += len(part)
                continue
            # Outside the handler, whose traceback would keep the failed batch alive.
            self._halve(len(part), reason)
        return np.concatenate(vectors)

    def _encode(self, images: Sequence[Pixels]) -> Vectors:
        batch = as_batch(images, pinned=self._cuda)
        return self.encoder.encode_images(batch, batch_size=len(batch))

    def _halve(self, tried: int, reason: Exception) -> None:
        if tried == 1:
            found = str(reason).split("\n")[0][:150]
            raise ModelError(
                f"a single image does not fit into the memory of {self.encoder.device} ({found}); "
                "free some memory or use another device"
            ) from None
        self.size = tried // 2
        if self._cuda:
            torch.cuda.empty_cache()
        print_status(f"out of memory: continuing with batches of {self.size} images")

    def _fitting(self) -> int:
        if not self._cuda:
            return _CPU_BATCH
        device = self.encoder.device
        blank = np.zeros((*self.encoder.preprocess.size, 3), np.uint8)
        self._encode([blank])  # one-time set-up must not count as memory per image
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._encode([blank] * _TRIAL_BATCH)
        need = (torch.cuda.max_memory_allocated(device) - before) / _TRIAL_BATCH
        return largest_batch(torch.cuda.mem_get_info(device)[0], need)


def largest_batch(free: int, need: float) -> int:
    """The largest power of two, 1 to 1,024, of images that fit.

    Args:
        free: free memory, in bytes.
        need: memory per image, in bytes.
    """
    fitting = int(min(_MEMORY_SHARE * free / max(need, 1.0), _LARGEST_BATCH))
    return 1 << max(fitting, 1).bit_length() - 1
