"""What lies where in a WebDataset shard, by its headers alone."""

import tarfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from clipkit.data.images import SUFFIXES
from clipkit.errors import DataError

IMAGE_LIMIT = 256 << 20  # bytes of one member
TEXT_LIMIT = 1 << 20
TEXTS = ("txt", "json", "cls")


class Keys:
    """The keys of a shard's images so far, of which none is taken twice.

    Where reading begins in the middle of a shard, those before are looked up among its headers,
    and only if a key is not the largest yet: mostly they ascend.
    """

    def __init__(self, shard: Path, name: str, offset: int, largest: str, count: int) -> None:
        self._shard, self._name, self._offset = shard, name, offset
        self.largest, self.count = largest, count
        self._known = set[str]()
        self._before = bool(count)  # whether there are such that are not known

    def add(self, key: str) -> bool:
        """Take a key; False where it is taken already."""
        if self._before and key <= self.largest:
            with tarfile.open(self._shard, "r:") as tar:
                found = takewhile(lambda item: item[1].offset < self._offset, images(tar))
                self._known.update(f"{self._name}/{before}" for before, _ in found)
            self._before = False
        if key in self._known:
            return False
        self._known.add(key)
        self.largest = max(self.largest, key)
        self.count += 1
        return True


def find_members(shard: Path) -> dict[str, tuple[int, int]]:
    """Where the image of each item of a shard lies, by ``BASE.SUFFIX``: its offset and bytes.

    The items are those of ``open_tars``; nothing but the headers is read.

    Raises:
        DataError: it is damaged, or not there.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, member in images(tar):
                if not member.issparse():
                    found.setdefault(key, (member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{shard} cannot be read: {error}; put it back as it was") from None
    return found


def images(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The image of each item, by ``BASE.SUFFIX``."""
    current, suffix_of_it = "", ""
    image: tarfile.TarInfo | None = None
    for member in headers(tar):
        base, suffix = parted(member.name)
        if base != current:
            if image:
                yield f"{current}.{suffix_of_it}", image
            current, image = base, None
        fits = counts(member) and member.size <= IMAGE_LIMIT and suffix not in TEXTS
        if fits and (image is None or suffix == suffix_of_it):
            suffix_of_it, image = suffix, member
    if image:
        yield f"{current}.{suffix_of_it}", image


def open_at(stream: BinaryIO, offset: int, told: dict[str, str]) -> tarfile.TarFile:
    """A tar from the header at an offset on, with what global headers before it have told."""
    stream.seek(offset)
    return tarfile.open(fileobj=stream, mode="r:", pax_headers=told)


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, of which it would keep every one; a shard may have a million."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        yield member


def parted(name: str) -> tuple[str, str]:
    """The base name of a member, up to the first dot of its file's name, and its suffix."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def counts(member: tarfile.TarInfo) -> bool:
    """Whether a member belongs to an item at all."""
    base, suffix = parted(member.name)
    known = suffix in TEXTS or f".{suffix}" in SUFFIXES
    return known and member.isreg() and bool(base) and not base.endswith("/")
