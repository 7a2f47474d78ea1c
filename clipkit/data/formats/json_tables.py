"""JSON tables of images and captions.

They are JSON lines, a list of objects, captions in COCO's format, Karpathy's splits, or an object
from image paths to captions. All are read piece by piece: memory does not depend on the size of the
file, but for the captions of COCO's format, which stand apart from their images.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from clipkit.data.formats.nested import Nested, json_leaves
from clipkit.data.images import SUFFIXES, Skipped
from clipkit.data.source import RowDict
from clipkit.errors import DataError

if TYPE_CHECKING:
    from clipkit.data.formats.columns import Columns

_HEAD = 1000
"""Records in which the names of fields are looked for, ..."""
_HEAD_BYTES = 4 << 20
"""... or fewer, if they are longer: they may hold images."""
_CHUNK = 1 << 20  # bytes
_LIMIT = 256 << 20  # characters of one value
_EXPECTED = (
    "expected one object a line, a list of objects, COCO captions (images and annotations), a "
    "Karpathy split (images with sentences), or an object of captions by image path"
)


_FLAT = Nested({}, {}, frozenset())


@dataclass(frozen=True)
class JsonTable:
    """The records of a JSON file, from its start or from a position on.

    Attributes:
        file: the file.
        offset: bytes before the first record; None for JSON lines.
        captions: COCO's, by the number of their image.
        splits: those whose records are wanted; None is all.
        nested: names for fields of objects within records.
    """

    file: Path
    offset: int | None = None
    captions: dict[Any, list[str]] | None = None
    splits: frozenset[str] | None = None
    nested: Nested = _FLAT

    @classmethod
    def open(cls, file: Path, split: str | None, notes: list[str]) -> "JsonTable":
        """Find out the format of a file and the fields of its records.

        Args:
            file: the file.
            split: the split wanted, several joined by ``+``, or ``all``.
            notes: takes what was assumed or left out.

        Raises:
            DataError: it holds nothing of the formats known, or not that split, or several splits
                in Karpathy's format and none was named.
        """
        table = _open_document(file, notes) if _is_document(file) else cls(file)
        head = table._head()
        if not head:
            raise DataError(f"{file} holds no objects; {_EXPECTED}")
        if split is not None or (
            table.offset is not None and {"sentences", "split"} <= set(head[0])
        ):
            table = replace(table, splits=table._choose(split))
        leaves = (path for record in head for path in json_leaves(record))
        return replace(table, nested=Nested.find(leaves, notes))

    def names(self) -> list[str]:
        """The fields of the first records."""
        return list(dict.fromkeys(name for record in self._head() for name in record))

    def using(self, columns: "Columns") -> "JsonTable":
        """The same, without names for other fields within objects."""
        return replace(self, nested=self.nested.only(columns.used))

    def records(
        self, skipped: list[Skipped], start: Sequence[int] = (0, 0)
    ) -> Iterator[tuple[RowDict, list[int]]]:
        """The records, each with the position after it.

        Args:
            skipped: takes what is not an object.
            start: where to begin: bytes and records (or lines) before.

        Raises:
            DataError: the file is damaged (but of JSON lines only the line is skipped).
        """
        if self.offset is None:
            found = _lines(self.file, skipped, start)
        else:
            found = _entries(self.file, skipped, start if start[0] else (self.offset, 0))
        for record, place in found:
            if self.splits is not None and record.get("split") not in self.splits:
                continue
            if "sentences" in record and "filepath" in record:  # Karpathy's of COCO
                record["filepath"] = f"{record['filepath']}/{record.get('filename', '')}"
            if self.captions is not None:
                record["captions"] = self.captions.get(str(record.get("id")), [])
            yield self.nested.flatten(record), place

    def _head(self) -> list[RowDict]:
        head: list[RowDict] = []
        for record, (offset, _) in self.records([]):
            head.append(record)
            if len(head) == _HEAD or offset - (self.offset or 0) > _HEAD_BYTES:
                break
        return head

    def _choose(self, split: str | None) -> frozenset[str] | None:
        counts = Counter(str(record.get("split")) for record, _ in self.records([]))
        shown = ", ".join(f"{name} ({count})" for name, count in counts.items())
        first = next(iter(counts))
        if split is None and len(counts) > 1:
            raise DataError(
                f"{self.file} holds the splits {shown}; name one, as {self.file}:{first}, several "
                f"joined by +, or all, as {self.file}:all"
            )
        if split in (None, "all"):
            return None
        chosen = frozenset(str(split).split("+"))
        if missing := chosen - counts.keys():
            raise DataError(f"{self.file} holds no split {min(missing)!r}, it has: {shown}")
        return chosen


def _is_document(file: Path) -> bool:
    """Whether a file is one JSON value rather than one a line."""
    with file.open("rb") as stream:
        text = _Text(stream, file)
        opening = text.peek()
        if opening != "{" or file.suffix.lower() != ".json":
            return opening == "["
        stream.seek(text.offset)
        line = stream.readline(_CHUNK)
        if not line.endswith(b"\n"):  # too long for a line, or the only one
            return True
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return True
        return not stream.read(_CHUNK).strip()


def _open_document(file: Path, notes: list[str]) -> JsonTable:
    """Find the records in a file that is one JSON value, which is read to its end if need be."""
    with file.open("rb") as stream:
        text = _Text(stream, file)
        if text.take() == "[":
            return JsonTable(file, text.offset)
        start, images = text.offset, set[str]()
        lists: dict[str, int] = {}  # of objects; where they begin
        captions: dict[str, list[str]] = {}
        fields = []
        while text.has_next():
            fields.append(name := str(text.value()))
            text.take()  # the colon
            if text.peek() != "[":
                text.value()
                continue
            text.take()
            at = text.offset
            while text.has_next():
                item = text.value()
                if not isinstance(item, dict):
                    continue
                lists.setdefault(name, at)
                if name == "images":
                    images.add(str(item.get("id")))
                elif name == "annotations" and "caption" in item:
                    captions.setdefault(str(item.get("image_id")), []).append(item["caption"])
            text.take()
    if "images" in lists and captions:
        if lost := sum(len(texts) for image, texts in captions.items() if image not in images):
            notes.append(f"{lost} captions in {file} are of images that it does not list")
        return JsonTable(file, lists["images"], captions)
    if len(lists) == 1:
        return JsonTable(file, next(iter(lists.values())))
    if fields and all(Path(name).suffix.lower() in SUFFIXES for name in fields):
        return JsonTable(file, start)
    shown = ", ".join(fields[:10]) or "none"
    raise DataError(f"{file} is a JSON object with the fields {shown}; {_EXPECTED}")


def _lines(
    file: Path, skipped: list[Skipped], start: Sequence[int]
) -> Iterator[tuple[RowDict, list[int]]]:
    offset, number = start
    with file.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            offset, number = offset + len(line), number + 1
            text = line.decode("utf-8", "replace")
            text = (text.removeprefix("\ufeff") if number == 1 else text).strip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                skipped.append(Skipped(f"{file.name}:{number}", f"is not JSON: {error}"))
                continue
            if isinstance(record, dict):
                yield record, [offset, number]
            else:
                skipped.append(Skipped(f"{file.name}:{number}", "is not a JSON object"))


def _entries(
    file: Path, skipped: list[Skipped], start: Sequence[int]
) -> Iterator[tuple[RowDict, list[int]]]:
    """The items of a list, or the members of an object as captions by image path."""
    offset, number = start
    with file.open("rb") as stream:
        text = _Text(stream, file, offset)
        while text.has_next():
            record = text.value()
            if isinstance(record, str) and text.peek() == ":":
                text.take()
                record = {"image": record, "captions": text.value()}
            number += 1
            if isinstance(record, dict):
                yield record, [text.offset, number]
            else:
                skipped.append(Skipped(f"{file.name}, item {number}", "is not a JSON object"))


_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


class _Text:
    """Reads the values of a JSON text one after another, in memory for the largest of them.

    Args:
        stream: of the file.
        file: its path, for errors.
        offset: bytes before the first value.

    Attributes:
        offset: bytes before the next one.
    """

    def __init__(self, stream: BinaryIO, file: Path, offset: int = 0) -> None:
        self._stream, self._file = stream, file
        stream.seek(offset)
        if not offset and stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        self.offset = stream.tell()
        # Surrogates stand for bytes that are not UTF-8, so that offsets can be counted.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def take(self) -> str:
        """Step over the next character that is not a space."""
        character = self.peek()
        self._advance(self._at + len(character))
        return character

    def has_next(self) -> bool:
        """Whether a list or object goes on; steps over a comma, but not over its end."""
        while (character := self.peek()) == ",":
            self.take()
        if not character:
            raise self._error("it ends within a list or object")
        return character not in "]}"

    def value(self) -> Any:
        """Read one value; raises DataError if there is none, or one of more than 256 MiB."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at > _LIMIT:
                    raise self._error(f"a value has more than {_LIMIT >> 20} MiB") from None
                if not self._fill():
                    raise self._error(getattr(error, "msg", str(error))) from None
                continue
            # A number may go on.
            if end < len(self._text) or isinstance(value, str | list | dict) or not self._fill():
                self._advance(end)
                return value

    def _advance(self, end: int) -> None:
        passed = self._text[self._at : end]
        more = passed if passed.isascii() else passed.encode("utf-8", "surrogateescape")
        self.offset, self._at = self.offset + len(more), end

    def _fill(self) -> bool:
        """Read on; False at the end of the file."""
        # Twice as much each time, so that a large value is not parsed in vain too often.
        data = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        self._text = self._text[self._at :] + self._decode(data, not data)
        self._at = 0
        return bool(data)

    def _error(self, reason: str) -> DataError:
        return DataError(
            f"{self._file} is not intact JSON from byte {self.offset} on ({reason}); write it "
            "again, or store one object a line in a .jsonl file, of which good lines are read"
        )
