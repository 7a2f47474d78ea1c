"""WebDataset tars: the files of one item share their name up to the first dot.

What lies where in a WebDataset shard, by its headers alone.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from clipkit.data.captions import clean_captions
from clipkit.data.formats.columns import CAPTION, LABEL
from clipkit.data.images import SUFFIXES, Skipped, is_utf8, printable
from clipkit.data.source import (
    Notes,
    Row,
    Skips,
    Source,
    Wanted,
    chunks,
    clean_text,
    features,
    fingerprint_of,
    in_memory,
)
from clipkit.data.streaming import Position, Stream
from clipkit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from clipkit.data.formats.metadata import Metadata


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


def open_at(stream: BinaryIO, offset: int, pax_headers: dict[str, str]) -> tarfile.TarFile:
    """Open a tar at the header at ``offset``, given the global PAX headers that precede it."""
    stream.seek(offset)
    return tarfile.open(fileobj=stream, mode="r:", pax_headers=pax_headers)


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


MAX_SHARDS = 1_000_000
_CHUNK = 16  # rows, images and all, held at a time
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: ``a-{000..012}.tar``, ``{train,val}.tar``.

    Raises:
        DataError: that would be more than a million names.
    """
    start, end = pattern.find("{"), pattern.find("}")
    if not 0 <= start < end:
        return [pattern]
    body = pattern[start + 1 : end]
    if numbers := _RANGE.fullmatch(body):
        first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
        if last - first >= MAX_SHARDS:
            raise DataError(f"{pattern} means more than {MAX_SHARDS} files; name fewer at a time")
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = body.split(",")
    tails = expand(pattern[end + 1 :])
    if len(choices) * len(tails) > MAX_SHARDS:
        raise DataError(f"{pattern} means more than {MAX_SHARDS} files; name fewer at a time")
    return [pattern[:start] + choice + tail for choice in choices for tail in tails]


def open_tars(files: list[Path], wanted: Wanted, streaming: bool | None) -> Source:
    """Open WebDataset shards, as a stream unless told otherwise.

    An item is an image member with a caption in ``.txt`` (one a line) or in a field of ``.json``,
    and a label in ``.cls`` or in ``.json``; a caption or label name given means such a field. Other
    fields are metadata, whose types are found in all shards before anything else is read.
    """
    root, skipped, notes = root_of_tars(files), Skips(), Notes()
    reader = _Reader(root, wanted, skipped, notes)
    prints = fingerprint_of([(file.name, file) for file in files], wanted)
    more = _find_metadata(files, wanted) if wanted.metadata else None

    def read(shard: Path, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
        for chunk in chunks(reader.rows(shard, at), _CHUNK):
            yield _to_batch([row for row, _ in chunk], more), chunk[-1][1]

    rows: Any = Stream(read, files)
    if streaming is False:
        rows = in_memory(rows.batches(), prints, skipped, more and more.schema)
    return Source(str(files[0]), "tars", rows, root, prints, skipped, notes)


def root_of_tars(files: list[Path]) -> Path:
    """The folder that keys of these shards are relative to."""
    return Path(os.path.commonpath([file.parent for file in files]))


@dataclass(frozen=True)
class _Reader:
    root: Path
    wanted: Wanted
    skipped: list[Skipped]
    notes: list[str]

    def rows(self, shard: Path, at: Position) -> Iterator[tuple[Row, Position]]:
        """The rows of one shard from a position on, as far as it can be read.

        Each comes with the position after it: the offset of the next item's header, the largest of
        the keys so far and how many they are, and what global headers say (POSIX pax).
        """
        name = shard.relative_to(self.root).as_posix()
        offset, largest, count, told = at or (0, "", 0, {})
        keys = Keys(shard, name, offset, largest, count)
        try:
            with shard.open("rb") as stream, open_at(stream, offset, told) as tar:
                for base, parts, end in self._items(tar, name):
                    row = self._row(f"{name}/{base}", parts)
                    if row is None:
                        continue
                    if not keys.add(row["key"]):
                        self._skip(row["key"], "its key is taken by an earlier image")
                        continue
                    yield row, [end, keys.largest, keys.count, dict(tar.pax_headers)]
            if not _has_end_mark(shard):
                self._skip(name, "has no end mark and may be truncated; all in it was read")
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            state = "is damaged or truncated" if shard.is_file() else "does not exist"
            self._skip(name, f"{state}, {keys.count} images of it were read: {error}")

    def _skip(self, key: str, reason: str) -> None:
        self.skipped.append(Skipped(printable(key), reason))

    def _items(
        self, tar: tarfile.TarFile, name: str
    ) -> Iterator[tuple[str, dict[str, bytes], int]]:
        """Base name, members by suffix, and end; members of one item follow each other."""
        current, parts = "", dict[str, bytes]()
        for member in headers(tar):
            base, suffix = parted(member.name)
            if base != current and parts:
                yield current, parts, member.offset
            if base != current:
                current, parts = base, {}
            if not counts(member):
                continue
            limit = TEXT_LIMIT if suffix in TEXTS else IMAGE_LIMIT
            if member.size > limit:
                self._skip(f"{name}/{member.name}", f"has {member.size} bytes, over {limit}")
                continue
            content = tar.extractfile(member)
            parts[suffix] = content.read() if content else b""
        if parts:
            yield current, parts, tar.offset

    def _row(self, base: str, parts: dict[str, bytes]) -> Row | None:
        suffix = next((suffix for suffix in parts if suffix not in TEXTS), None)
        if suffix is None:
            self._skip(base, "has no image beside it")
            return None
        key = f"{base}.{suffix}"
        if not is_utf8(key):
            self._skip(key, "its name is not UTF-8; rename it")
            return None
        fields = self._fields(key, parts.get("json"))
        captions: Any = _field(fields, self.wanted.caption, CAPTION)
        if "txt" in parts and self.wanted.caption is None:
            lines = parts["txt"].decode("utf-8", "replace").splitlines()
            captions = [line for line in lines if line.strip()]
        label = _field(fields, self.wanted.label, LABEL)
        if "cls" in parts and self.wanted.label is None:
            label = parts["cls"].decode("utf-8", "replace")
        return {
            "key": key,
            "image": {"bytes": parts[suffix], "path": None},
            "captions": clean_captions(captions, key, self.skipped, self.notes),
            "label": None if label is None else clean_text(label) or None,
            "fields": fields,
        }

    def _fields(self, key: str, text: bytes | None) -> dict[str, Any]:
        try:
            return _parsed(text or b"{}")
        except (ValueError, RecursionError) as error:
            self._skip(key, f"the JSON beside it is damaged and left out: {error}")
            return {}


def _parsed(text: bytes) -> dict[str, Any]:
    fields = json.loads(text.decode("utf-8", "replace"))
    return fields if isinstance(fields, dict) else {}


def _find_metadata(files: list[Path], wanted: Wanted) -> "Metadata | None":
    from clipkit.data.formats.metadata import find_metadata, infer_types

    types = infer_types((fields for file in files for fields in _json_of(file)), typed=True)
    used = [
        given or next((name for name in usual if name in types), "")
        for given, usual in ((wanted.caption, CAPTION), (wanted.label, LABEL))
    ]
    return find_metadata([types], used, str(files[0]))


def _json_of(shard: Path) -> Iterator[dict[str, Any]]:
    """The fields beside the images of a shard, past whose images is only stepped."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in headers(tar):
                fits = parted(member.name)[1] == "json" and member.size <= TEXT_LIMIT
                if fits and counts(member) and (content := tar.extractfile(member)):
                    try:
                        yield _parsed(content.read())
                    except (ValueError, RecursionError):
                        continue  # told when the shard is read
    except (tarfile.TarError, OSError, EOFError, ValueError):
        return  # the same


def _to_batch(rows: list[Row], metadata: "Metadata | None") -> "pa.RecordBatch":
    """Rows in the common columns, with their metadata if any is wanted."""
    import pyarrow as pa

    if metadata is None:
        return pa.RecordBatch.from_pylist(rows, features().arrow_schema)
    texts = metadata.texts([row["fields"] for row in rows])
    told = metadata.read(pa.RecordBatch.from_pydict(texts)).to_pylist()
    whole = [{**row, "metadata": one} for row, one in zip(rows, told, strict=True)]
    return pa.RecordBatch.from_pylist(whole, features(metadata.schema).arrow_schema)


def _field(fields: dict[str, Any], given: str | None, usual: tuple[str, ...]) -> Any:
    if given is not None:
        return fields.get(given)
    return next((fields[name] for name in usual if name in fields), None)


def _has_end_mark(shard: Path) -> bool:
    # A tar ends in blocks of zeros (POSIX ustar); without one, what follows was cut away.
    with shard.open("rb") as stream:
        stream.seek(-512, os.SEEK_END)
        return not any(stream.read())
