"""Images inside tables and tars: read one by its key, without holding the others in memory."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from clipkit.data.formats.folders import ZIP_DAMAGE, Zip, find_shards, split_shard
from clipkit.data.formats.huggingface import is_saved
from clipkit.data.formats.tables import Group, ParquetRows
from clipkit.data.formats.webdataset import find_members, is_tar, read_member, root_of_tars
from clipkit.data.open_source import find_files, open_source
from clipkit.data.source import Wanted, clean_text
from clipkit.errors import DataError

ROWS = 16
"""Rows of a Parquet file read at a time, images and all, on the way to the one that is wanted."""
SHARDS = 16
"""Tars whose contents are remembered: with 10,000 images each they take about 40 MiB."""


class ImageReader(Protocol):
    """What gives images by key; safe to ask from several threads."""

    def read(self, key: str) -> bytes | None:
        """The content of one, as its file would hold it; None where there is none of that key.

        Raises:
            DataError: the source is not there any more, or damaged.
        """


def holds_images(where: str) -> bool:
    """Whether a source, by its absolute path, is of a kind that holds images inside."""
    named = is_tar(where) or Path(where).suffix.lower() in (".parquet", ".zip")
    # A folder that is not one of images consists of tables, tars or zip archives.
    return os.path.isabs(where) and (named or _is_saved(where) or os.path.isdir(where))


def open_image_reader(where: str) -> ImageReader:
    """The images of a source by its absolute path, as ``open_source`` would find its keys.

    Raises:
        DataError: it is not there any more, damaged, or its images' column has no usual name.
    """
    if _is_saved(where):
        return _SavedReader(where)
    files = find_shards(Path(where)) if os.path.isdir(where) else find_files(Path(where))
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{where} is not there any more; put it back")
    if is_tar(files[0]):
        return _TarReader(files)
    if files[0].suffix.lower() == ".zip":
        return _ZipReader(files)
    return _TableReader(files)


def _is_saved(where: str) -> bool:
    path, _, _ = where.rpartition(":")
    return is_saved(Path(where)) or bool(path and is_saved(Path(path)))


class _Places:
    """Numbers by key, held as hashes: 16 bytes a key, however long; the wrong ones are few.

    Args:
        keys: each with its number.
    """

    def __init__(self, keys: Iterable[tuple[str, int]]) -> None:
        flat = np.fromiter((n for key, at in keys for n in (hash(key), at)), np.int64)
        order = np.argsort(flat[::2], kind="stable")
        self._hashes, self._numbers = flat[::2][order], flat[1::2][order]

    def find(self, key: str) -> list[int]:
        """The numbers of a key, in order, and perhaps that of another one."""
        low = np.searchsorted(self._hashes, hash(key), side="left")
        high = np.searchsorted(self._hashes, hash(key), side="right")
        found: list[int] = np.unique(self._numbers[low:high]).tolist()
        return found


class _TableReader:
    """Of Parquet files: the rows of a group before an image are read on the way to it."""

    def __init__(self, files: list[Path]) -> None:
        self._rows = ParquetRows.open(files, Wanted(caption="", label=""), [], [])
        self._starts = [group.first for group in self._rows.groups]
        self._lock = Lock()

    def read(self, key: str) -> bytes | None:
        import pyarrow as pa

        try:
            for group in self._groups_of(key):
                for batch, _ in self._rows.batches(group, ROWS):
                    keys = batch.column("key").to_pylist()
                    if key in keys:
                        image = batch.column("image")[keys.index(key)].as_py()
                        data: bytes | None = image["bytes"]
                        return data
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"the table cannot be read: {error}; put it back as it was") from None
        return None

    def _groups_of(self, key: str) -> list[Group]:
        groups, common = self._rows.groups, self._rows.common
        if common.columns.key is None:
            if not (key.isascii() and key.isdigit() and len(key) == common.width and groups):
                return []
            return [groups[bisect_right(self._starts, int(key)) - 1]]
        with self._lock:
            return [groups[number] for number in self._places.find(key)]

    @cached_property
    def _places(self) -> _Places:
        return _Places(self._keys())

    def _keys(self) -> Iterator[tuple[str, int]]:
        import pyarrow.parquet as pq

        name = self._rows.common.columns.key
        for number, group in enumerate(self._rows.groups):
            with pq.ParquetFile(group.file) as table:
                for batch in table.iter_batches(row_groups=[group.number], columns=[name]):
                    keys = batch.column(0).to_pylist()
                    yield from ((clean_text(key), number) for key in keys if key is not None)


class _TarReader:
    """Images in WebDataset shards: the headers of a shard are read once, its images one by one."""

    def __init__(self, files: list[Path]) -> None:
        root = root_of_tars(files)
        self._files = {file.relative_to(root).as_posix(): file for file in files}
        self._members: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
        self._lock = Lock()

    def read(self, key: str) -> bytes | None:
        shard, name = split_shard(key, self._files)
        place = self._members_of(shard).get(name) if shard else None
        return read_member(self._files[shard], place) if place else None

    def _members_of(self, shard: str) -> dict[str, tuple[int, int]]:
        with self._lock:
            if shard not in self._members:
                self._members[shard] = find_members(self._files[shard])
                if len(self._members) > SHARDS:
                    self._members.popitem(last=False)
            self._members.move_to_end(shard)
            return self._members[shard]


class _ZipReader:
    """Images in zip archives, each of which stays open."""

    def __init__(self, files: list[Path]) -> None:
        root = root_of_tars(files)
        self._files = {file.relative_to(root).as_posix(): file for file in files}
        self._open: dict[str, Zip] = {}
        self._lock = Lock()

    def read(self, key: str) -> bytes | None:
        shard, name = split_shard(key, self._files)
        if not shard:
            return None
        try:
            with self._lock:
                if shard not in self._open:
                    self._open[shard] = Zip(self._files[shard])
                archive = self._open[shard]
                return archive.read(name) if archive.has_image(name) else None
        except ZIP_DAMAGE as error:
            raise DataError(
                f"cannot read {self._files[shard]}: {error}; restore the file"
            ) from None


class _SavedReader:
    """Of a saved ``datasets`` directory, whose rows stay on disk, mapped into memory."""

    def __init__(self, where: str) -> None:
        self._rows = open_source(os.fspath(where), caption="", label="", streaming=False).table
        self._places = _Places((row.key, n) for n, row in enumerate(self._rows.texts()))

    def read(self, key: str) -> bytes | None:
        for number in self._places.find(key):
            if self._rows.text(number).key == key:
                return self._rows.image(number).data
        return None
