"""WebDataset tars: one image and its captions per item, in members that follow each other.

Members belong to one item if their names agree up to the first dot of the file name:
``0000.jpg`` and ``0000.txt``, or ``0000.image.jpg`` and ``0000.caption.txt``. If several images
agree that far and none is named by it alone (``photo.0000.jpg``, ``photo.0001.jpg``), each is an
item of its own.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

from clipkit.data.formats.columns import CAPTION, LABEL
from clipkit.data.formats.sidecars import (
    ENDINGS,
    SIDECAR_LIMIT,
    is_usual,
    parse_json,
    read_texts,
)
from clipkit.data.images import SUFFIXES, Skipped, is_junk, is_utf8, printable
from clipkit.data.rows import Position, Stream, schema
from clipkit.data.source import (
    Notes,
    RowDict,
    Skips,
    Source,
    Wanted,
    fingerprint_of,
    in_memory,
)
from clipkit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from clipkit.data.formats.metadata import Metadata


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_LIMIT = 256 << 20
"""Bytes of the largest image that is read."""
MAX_SHARDS = 1_000_000
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What reading a damaged, truncated or missing archive raises."""

_CHUNK = 16  # rows, with their images, held at a time
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_IMAGES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
_MAX_IMAGES, _MAX_MEMBERS = 16, 64  # held of names that agree up to the first dot
_MAX_LINKS = 8  # followed one after another
_OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_WORD = re.compile(r"[A-Za-z_-]{1,20}")


def is_tar(path: str | Path) -> bool:
    """Whether a path is named like a tar, compressed or not."""
    return os.fspath(path).lower().endswith(TAR_SUFFIXES)


@dataclass(slots=True)
class Member:
    """An image or sidecar in a tar.

    Attributes:
        base, stem, ending: its name up to the first and the last dot of the file name, and the
            rest, in lower case.
        offset: of its header, in bytes.
        header: its own, or that of the member it is a link to.
        data: its content; None if it was not asked for.
    """

    base: str
    stem: str
    ending: str
    offset: int
    header: tarfile.TarInfo
    data: bytes | None = None

    @property
    def name(self) -> str:
        """The name, with its ending in lower case."""
        return f"{self.stem}.{self.ending}"

    @property
    def is_image(self) -> bool:
        """Whether it is an image, by its ending."""
        return self.ending in _IMAGES


@dataclass(frozen=True)
class Item:
    """An image in a tar with its sidecars; its key within the tar is ``image.name``."""

    image: Member
    sidecars: list[Member]


@dataclass
class Seen:
    """What a pass over one tar met.

    Attributes:
        images, captions: how many of each became rows.
        unused: members that no row was made of, by their endings.
        names: those of the first members.
    """

    images: int = 0
    captions: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)


class Tar:
    """A tar from a member on, read front to back; gzip, bzip2 and xz are recognised by content.

    A compressed tar is decompressed from its start to reach an offset.

    Args:
        shard: the file.
        offset: where the header of the first member is, in bytes (of the decompressed tar).
        pax_headers: the global PAX headers that precede it.

    Attributes:
        seen: what was met so far.
        skipped: names and reasons of members that cannot be used.
    """

    def __init__(
        self, shard: Path, offset: int = 0, pax_headers: Mapping[str, str] | None = None
    ) -> None:
        self._shard, self._offset = shard, offset
        self._pax_headers = dict(pax_headers or {})
        self._close = ExitStack()
        self._links: tuple[dict[str, tarfile.TarInfo], BinaryIO] | None = None
        self.seen = Seen()
        self.skipped: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        try:
            self._stream = self._close.enter_context(_open_stream(self._shard))
            self._stream.seek(self._offset)
            self._tar = self._close.enter_context(
                tarfile.open(fileobj=self._stream, mode="r:", pax_headers=self._pax_headers)
            )
        except BaseException:
            self._close.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    @property
    def pax_headers(self) -> dict[str, str]:
        """The global PAX headers so far."""
        return dict(self._tar.pax_headers)

    def is_complete(self) -> bool:
        """Whether the members read so far are followed by the end mark of a tar.

        That is a block of zeros (POSIX ustar). Without one, what followed is lost or damaged.
        """
        self._stream.seek(self._tar.offset)
        block = self._stream.read(tarfile.BLOCKSIZE)
        return len(block) == tarfile.BLOCKSIZE and not any(block)

    def items(self, endings: Collection[str] = ()) -> Iterator[tuple[list[Item], int]]:
        """The items in order, some at a time, each time with the offset of what follows.

        What comes after such an offset does not depend on what came before it.

        Args:
            endings: those of members whose content is read.
        """
        group: list[Member] = []
        for header in _headers(self._tar):
            member = self._member(header)
            if member is None:
                continue
            if group and (member.base != group[0].base or _has(group, member)):
                yield self._items(group), member.offset
                group = []
            elif len(group) >= _MAX_MEMBERS or _is_dotted(group):
                # Keep the members of the last name, which may have more to come.
                last, cut = group[-1].stem, 0
                if not _plain(group):
                    cut = next(n for n, other in enumerate(group) if other.stem == last)
                cut = cut or len(group)
                rest = group[cut:]
                yield self._items(group[:cut]), rest[0].offset if rest else member.offset
                group = rest
            # A second image of an item whose image is known is not read.
            if member.ending in endings and not (member.is_image and _plain(group)):
                member.data = self._read(header, member.header)
            group.append(member)
        if group:
            yield self._items(group), self._tar.offset

    def _member(self, header: tarfile.TarInfo) -> Member | None:
        """A member that may belong to an item; None for others, which are counted."""
        name = header.name
        if header.isdir() or is_junk(name):
            return None
        if len(self.seen.names) < 3:
            self.seen.names.append(name)
        base, stem, ending = _parted(name)
        is_image = ending in _IMAGES
        if not is_image and ending not in ENDINGS:
            self.seen.unused[_shown(base, stem, ending)] += 1
            return None
        target = self._target(header)
        if target is None:
            what = f"is a link to {header.linkname}, which is not" if header.linkname else "is not"
            self.skipped.append((name, f"{what} a file in the tar"))
            return None
        limit = IMAGE_LIMIT if is_image else SIDECAR_LIMIT
        if target.size > limit:
            self.skipped.append((name, f"has {target.size} bytes, over {limit}"))
            return None
        return Member(base, stem, ending, header.offset, target)

    def _read(self, header: tarfile.TarInfo, target: tarfile.TarInfo) -> bytes:
        if target.issparse():
            content = self._tar.extractfile(target)
            return content.read() if content else b""
        stream = self._stream if target is header else self._links_of()[1]
        stream.seek(target.offset_data)
        data = stream.read(target.size)
        if len(data) < target.size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _target(self, header: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """The member that holds the content of a member; None for links that lead elsewhere."""
        found: tarfile.TarInfo | None = header
        for _ in range(_MAX_LINKS):
            if found is None or found.isreg():
                return found
            if not found.linkname:
                return None
            folder = posixpath.dirname(found.name) if found.issym() else ""
            path = posixpath.normpath(posixpath.join(folder, found.linkname))
            found = self._links_of()[0].get(path)
        return None

    def _links_of(self) -> tuple[dict[str, tarfile.TarInfo], BinaryIO]:
        """All members by name, and a second stream to read them from; only if there are links."""
        if self._links is None:
            stream = self._close.enter_context(_open_stream(self._shard))
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                members = {posixpath.normpath(header.name): header for header in _headers(tar)}
            self._links = members, stream
        return self._links

    def _items(self, group: list[Member]) -> list[Item]:
        """The items among members whose names agree up to the first dot."""
        plain = _plain(group)
        images = [plain] if plain else []
        if not plain:
            stems: dict[str, Member] = {}
            for member in group:
                if member.is_image:
                    stems.setdefault(member.stem, member)
            images = list(stems.values())
        if not images:
            self.skipped.append(
                (group[0].base, "has no image right beside it in the tar; sort its members by name")
            )
            return []
        used = {id(image) for image in images}
        items = []
        for image in images:
            sidecars = [
                member
                for member in group
                if not member.is_image and _belongs(member, image, alone=len(images) == 1)
            ]
            used |= {id(member) for member in sidecars}
            items.append(Item(image, sidecars))
        self.seen.unused.update(
            _shown(member.base, member.stem, member.ending)
            for member in group
            if id(member) not in used
        )
        return items


def _parted(name: str) -> tuple[str, str, str]:
    """A name up to the first and the last dot of the file name, and the ending in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.rpartition(".")
    if not dot:
        return name, name, ""
    return folder + slash + file.partition(".")[0], folder + slash + stem, ending.lower()


def _plain(group: list[Member]) -> Member | None:
    """The first image with no dot in its name but that of the ending."""
    return next(
        (member for member in group if member.is_image and member.stem == member.base), None
    )


def _has(group: list[Member], member: Member) -> bool:
    return any(other.stem == member.stem and other.ending == member.ending for other in group)


def _is_dotted(group: list[Member]) -> bool:
    """Whether too many images share a name up to the first dot for it to separate the items."""
    if len(group) < _MAX_IMAGES or _plain(group):
        return False
    return len({member.stem for member in group if member.is_image}) >= _MAX_IMAGES


def _belongs(sidecar: Member, image: Member, *, alone: bool) -> bool:
    """Whether a sidecar is that of an image; ``alone``: the only one of their common base."""
    if sidecar.stem.startswith(image.stem):
        rest = sidecar.stem[len(image.stem) :]
        if not rest or (rest[0] == "." and (is_usual(rest[1:]) or _is_ending(rest[1:], image))):
            return True
    if not alone:
        return sidecar.stem == sidecar.base
    return is_usual(sidecar.stem[len(sidecar.base) + 1 :])


def _is_ending(text: str, image: Member) -> bool:
    return text.lower() == image.ending


def _shown(base: str, stem: str, ending: str) -> str:
    """The ending of a member as notes name it."""
    between = stem[len(base) + 1 :]
    if _WORD.fullmatch(between):
        return f".{between}.{ending}"
    return f".{ending}" if ending else "no ending"


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, which would keep every one; a shard may have a million."""
    while (header := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        yield header


@contextmanager
def _open_stream(shard: Path) -> Iterator[BinaryIO]:
    """The bytes of a tar, decompressed if it is compressed."""
    with shard.open("rb") as file:
        head = file.peek(8)
        opener = next(
            (opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None
        )
        if opener is None:
            yield file
            return
        with opener(file) as stream:
            yield cast(BinaryIO, stream)


class Keys:
    """The keys of a shard's images so far, each of which is used once.

    If reading begins in the middle of a shard, the earlier keys are read from its headers, and
    only when a key is not larger than all before: mostly they ascend.
    """

    def __init__(self, shard: Path, offset: int, largest: str, count: int) -> None:
        self._shard, self._offset = shard, offset
        self.largest, self.count = largest, count
        self._known = set[str]()
        self._before = bool(count)  # whether there are earlier keys that are not known

    def add(self, key: str) -> bool:
        """Take the key of an image in its shard; False if an earlier image has it."""
        if self._before and key <= self.largest:
            earlier = takewhile(lambda image: image.offset < self._offset, images(self._shard))
            self._known.update(image.name for image in earlier)
            self._before = False
        if key in self._known:
            return False
        self._known.add(key)
        self.largest = max(self.largest, key)
        self.count += 1
        return True


def images(shard: Path) -> Iterator[Member]:
    """The image of each item, in order, by the headers alone."""
    with Tar(shard) as tar:
        for items, _ in tar.items():
            yield from (item.image for item in items)


def find_members(shard: Path) -> dict[str, tuple[int, int]]:
    """Find where the image of each item of a shard is: offset and size in bytes, by key.

    Only headers are read. The offsets of a compressed shard are those of the tar within it.

    Raises:
        DataError: the shard is damaged or missing.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        for image in images(shard):
            if not image.header.issparse():
                found.setdefault(image.name, (image.header.offset_data, image.header.size))
    except DAMAGE as error:
        raise DataError(f"cannot read {shard}: {error}; restore the file") from None
    return found


def read_member(shard: Path, place: tuple[int, int]) -> bytes:
    """The content of a member that ``find_members`` found.

    Raises:
        DataError: the shard is damaged or missing.
    """
    offset, size = place
    try:
        with _open_stream(shard) as stream:
            stream.seek(offset)
            return stream.read(size)
    except DAMAGE as error:
        raise DataError(f"cannot read {shard}: {error}; restore the file") from None


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
    """Open WebDataset shards, as a stream unless ``streaming`` is False.

    An item is an image with its sidecars: captions, a label, and JSON whose other fields are
    metadata; their types are inferred from all shards before anything else is read. Members that
    belong to no item are counted in a note at the end of the first full pass.

    A pass over a plain tar resumes anywhere at once; a compressed one is decompressed up to there.

    Raises:
        DataError: no shard holds an image; when the first pass ends, if they are streamed.
    """
    root, skipped, notes = root_of_tars(files), Skips(), Notes()
    reader = _Reader(root, files, wanted, skipped, notes)
    prints = fingerprint_of([(file.name, file) for file in files], wanted)
    more = _find_metadata(files, wanted, notes) if wanted.metadata else None

    def read(shard: Path, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
        rows: list[RowDict] = []
        for some, after in reader.rows(shard, at):
            rows += some
            if len(rows) >= _CHUNK:
                yield _to_batch(rows, more), after
                rows = []
        if rows:
            yield _to_batch(rows, more), after
        reader.finish()

    rows: Any = Stream(read, files)
    if streaming is False:
        rows = in_memory(rows.batches(), skipped, more and more.schema)
    return Source(str(files[0]), "tars", rows, root, prints, skipped, notes)


def root_of_tars(files: list[Path]) -> Path:
    """The folder that keys of these shards are relative to."""
    return Path(os.path.commonpath([file.parent for file in files]))


@dataclass(frozen=True)
class _Reader:
    root: Path
    files: list[Path]
    wanted: Wanted
    skipped: list[Skipped]
    notes: list[str]
    seen: dict[Path, Seen] = field(default_factory=dict)

    def rows(self, shard: Path, at: Position) -> Iterator[tuple[list[RowDict], Position]]:
        """The rows of one shard from a position on, as far as it can be read.

        They come some at a time, with the position after them: the offset of the next item's
        header, the largest of the keys so far and how many they are, and the global PAX headers.
        """
        name = shard.relative_to(self.root).as_posix()
        offset, largest, count, pax_headers = at or (0, "", 0, {})
        keys = Keys(shard, offset, largest, count)
        tar = Tar(shard, offset, pax_headers)
        try:
            with tar:
                for items, end in tar.items(_IMAGES.union(ENDINGS)):
                    rows = [row for item in items if (row := self._row(name, item, keys))]
                    self._report(name, tar)
                    tar.seen.images += len(rows)
                    tar.seen.captions += sum(len(row["captions"]) for row in rows)
                    if rows:
                        yield rows, [end, keys.largest, keys.count, tar.pax_headers]
                if not tar.is_complete():
                    reason = "has no end mark and may be truncated or damaged"
                    self._skip(name, f"{reason}; {keys.count} images of it were read")
        except DAMAGE as error:
            state = "is damaged or truncated" if shard.is_file() else "does not exist"
            self._skip(name, f"{state}, {keys.count} images of it were read: {error}")
        self._report(name, tar)
        if at is None:
            self.seen[shard] = tar.seen

    def finish(self) -> None:
        """After the last shard of a full pass, report what was not used.

        Raises:
            DataError: nothing was.
        """
        if len(self.seen) < len(set(self.files)):
            return
        passed = list(self.seen.values())
        self.seen.clear()  # the next pass may meet other errors
        unused = sum((seen.unused for seen in passed), Counter[str]())
        names = [name for seen in passed for name in seen.names]
        shards = f"{len(passed)} tars" if len(passed) > 1 else str(self.files[0])
        if not any(seen.images for seen in passed):
            skipped = self.skipped[0] if self.skipped else None
            what = f"{skipped.key} {skipped.reason}" if skipped else "there are no members"
            if names:
                what = f"members are named like {', '.join(map(printable, names[:3]))} ({what})"
            raise DataError(
                f"{shards}: no image that can be used was found; {what}, expected an image such as "
                "0000.jpg with its captions in 0000.txt right beside it"
            )
        if unused:
            self.notes.append(f"{shards}: members that were not used: {_counted(unused)}")
        if not any(seen.captions for seen in passed) and self.wanted.caption != "":
            self.notes.append(
                f"{shards}: no captions were found; they are read from members such as 0000.txt, "
                f"0000.caption and 0000.json beside 0000.jpg; members are named like "
                f"{', '.join(map(printable, names[:3]))}"
            )

    def _report(self, name: str, tar: Tar) -> None:
        for member, reason in tar.skipped:
            self._skip(f"{name}/{member}", reason)
        tar.skipped.clear()

    def _skip(self, key: str, reason: str) -> None:
        self.skipped.append(Skipped(printable(key), reason))

    def _row(self, shard: str, item: Item, keys: Keys) -> RowDict | None:
        key = f"{shard}/{item.image.name}"
        if not is_utf8(key):
            self._skip(key, "its name is not UTF-8; rename it")
            return None
        if not keys.add(item.image.name):
            place = f"at byte {item.image.offset}"
            self._skip(key, f"repeats the name of an earlier image in the tar ({place})")
            return None
        sidecars = [(member.ending, member.data or b"") for member in item.sidecars]
        texts = read_texts(sidecars, key, self.wanted, self.skipped, self.notes)
        return {
            "key": key,
            "image": {"bytes": item.image.data, "path": None},
            "captions": texts.captions,
            "label": texts.label,
            "fields": texts.fields,
        }


def _counted(endings: Counter[str]) -> str:
    shown = [f"{count} {ending}" for ending, count in endings.most_common(8)]
    return ", ".join(shown) + (", …" if len(endings) > 8 else "")


def _find_metadata(files: list[Path], wanted: Wanted, notes: list[str]) -> "Metadata | None":
    from clipkit.data.formats.metadata import find_metadata, infer_types

    types = infer_types((fields for file in files for fields in _json_of(file)), typed=True)
    used = [
        given or next((name for name in usual if name in types), "")
        for given, usual in ((wanted.caption, CAPTION), (wanted.label, LABEL))
    ]
    return find_metadata([types], used, str(files[0]), notes)


def _json_of(shard: Path) -> Iterator[dict[str, Any]]:
    """The fields beside the images of a shard; the images are not read."""
    try:
        with Tar(shard) as tar:
            for items, _ in tar.items(("json",)):
                for member in (member for item in items for member in item.sidecars):
                    try:
                        value = parse_json(member.data or b"{}")
                    except (ValueError, RecursionError):
                        continue  # reported when the shard is read
                    if isinstance(value, dict):
                        yield value
    except DAMAGE:
        return  # reported when the shard is read


def _to_batch(rows: list[RowDict], metadata: "Metadata | None") -> "pa.RecordBatch":
    """Rows in the common columns, with their metadata if there is any."""
    import pyarrow as pa

    if metadata is None:
        return pa.RecordBatch.from_pylist(rows, schema())
    texts = metadata.texts([row["fields"] for row in rows])
    read = metadata.read(pa.RecordBatch.from_pydict(texts)).to_pylist()
    whole = [{**row, "metadata": one} for row, one in zip(rows, read, strict=True)]
    return pa.RecordBatch.from_pylist(whole, schema(metadata.schema))
