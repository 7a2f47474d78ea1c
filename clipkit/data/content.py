"""What a file holds, as a number by which it is found again under another name."""

from pathlib import Path

import xxhash

from clipkit.data.images import open_regular
from clipkit.errors import ImageError

_CHUNK = 1 << 20  # bytes read at a time


def content_hash(source: Path | bytes) -> str:
    """XXH3 of a file or its content: 128 bits as 32 hexadecimal digits.

    It takes 0.2 ms for the JPEG of a 12-megapixel photo, where SHA-256 takes 2. Someone who forges
    two files with one hash gains that the second is found by the vector of the first.

    Raises:
        ImageError: the file is empty, irregular or cannot be read; the message is the reason alone.
    """
    digest = xxhash.xxh3_128()
    with open_regular(source) as stream:
        try:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
