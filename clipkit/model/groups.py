"""Which pairs of a batch say the same: those with the same image or the same caption."""

from collections.abc import Sequence
from functools import cache
from hashlib import blake2b

import torch
from torch import Tensor

from clipkit.model.bpe import WORD_END, vocabulary
from clipkit.model.tokenizer import CONTEXT


def pair_groups(keys: Sequence[str], tokens: Tensor) -> Tensor:
    """Hashes of images and captions, equal in every process: int64 [n, 2].

    Two pairs are duplicates where they agree in either column: then one's caption is known to be
    right for the other's image. That is not carried on: if a and b share a caption, and b and c an
    image, nobody has said that a's image shows what c's caption tells.

    Args:
        keys: of the n images; the same key is the same image.
        tokens: int64 [n, 77], of their captions.
    """
    return torch.stack([image_groups(keys), caption_groups(tokens)], dim=1)


def image_groups(keys: Sequence[str]) -> Tensor:
    """64-bit hashes of keys, int64 [n]."""
    digests = (blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys)
    numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.int64)


def caption_groups(tokens: Tensor) -> Tensor:
    """64-bit hashes of captions, int64 [n]; what punctuation stands at their end does not count.

    Case, spacing, HTML and damaged Unicode are gone already: the tokenizer sees to that.

    Args:
        tokens: int64 [n, 77].
    """
    positions = torch.arange(CONTEXT)
    inside = positions < tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
    words = inside & ~_endings()[tokens]
    last = (words * positions).amax(dim=1, keepdim=True)
    return ((tokens + 1) * (positions <= last) * _factors()).sum(dim=1)


@cache
def _endings() -> Tensor:
    """Whether a token may end a sentence: bool [vocabulary]."""
    pieces = (piece.removesuffix(WORD_END.encode()) for piece in vocabulary().pieces)
    return torch.tensor([bool(piece) and not piece.strip(b".!?;:,") for piece in pieces])


@cache
def _factors() -> Tensor:
    """An odd factor for each position: int64 [77].

    Sums of products with random factors, modulo 2**64, are a universal hash: two captions collide
    with a probability of at most 2**-48, whatever they say, for ids differ by less than 2**16.
    """
    generator = torch.Generator().manual_seed(77)
    return 2 * torch.randint(-(2**62), 2**62, (CONTEXT,), generator=generator) + 1
