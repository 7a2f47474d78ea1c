"""Pictures that people hand in: bounded, never written to disk, forgotten after a while."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from PIL import Image

from clipkit.data.images import Reduction, read_image
from clipkit.errors import ImageError
from clipkit.web.pictures import as_jpeg, shrink
from clipkit.web.problems import RequestError
from clipkit.web.vectors import Vector

MAX_PIXELS = 50_000_000
"""More than most cameras make; decoded it takes 150 MB, and two are decoded at a time."""
KEPT = 64
"""Pictures remembered, so that paging and going back need not send them again."""


@dataclass(frozen=True)
class Upload:
    """A picture handed in, as far as it is remembered.

    Attributes:
        vector: of the picture as it came.
        model: fingerprint of the model that encoded it.
        jpeg: a thumbnail of it.
    """

    vector: Vector
    model: str
    jpeg: bytes


class _TooManyError(ImageError):
    """More pixels than are read."""


def read_upload(data: bytes, reduction: Reduction | None = None) -> tuple[Image.Image, bytes]:
    """The picture that was handed in, and a thumbnail of it, a JPEG.

    Args:
        data: a picture file's content.
        reduction: how much smaller it may be read; None: not at all.

    Raises:
        RequestError: it is no picture that can be read (415), or has too many pixels (413).
    """

    def checked(width: int, height: int) -> int:
        """Told the size before any pixel is decoded, which is when to refuse."""
        if width * height > MAX_PIXELS:
            raise _TooManyError(
                f"has {width} x {height} pixels, at most {MAX_PIXELS // 10**6} million are read; "
                "make it smaller"
            )
        return reduction(width, height) if reduction else 1

    try:
        picture = read_image(data, checked)
    except ImageError as error:
        status = 413 if isinstance(error, _TooManyError) else 415
        raise RequestError(status, f"the picture cannot be searched with, it {error}") from None
    return picture, as_jpeg(shrink(picture))


class Uploads:
    """The last pictures handed in, by a name made from their bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Upload] = OrderedDict()

    def keep(self, data: bytes, upload: Upload) -> str:
        """Remember one, forget the oldest, and return its name."""
        name = hashlib.sha256(data).hexdigest()[:32]
        self._kept[name] = upload
        self._kept.move_to_end(name)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str, model: str) -> Upload:
        """One by its name; raises RequestError (404) where it is forgotten, or of another model."""
        upload = self._kept.get(name)
        if upload is None or upload.model != model:
            raise RequestError(404, "this picture is not held any more; hand it in again")
        self._kept.move_to_end(name)
        return upload
