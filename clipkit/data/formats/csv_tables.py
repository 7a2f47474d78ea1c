"""Text tables: CSV and TSV in any encoding, quoted in several ways or not at all, with or without
a header.

``read_dialect`` decides once, from the first lines, how a table is written; ``CsvTable`` reads its
records from any position on.
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from clipkit.data.formats.columns import Columns, is_column_name, url_error
from clipkit.data.formats.image_paths import decode_inline, has_image_suffix, is_url
from clipkit.data.images import Skipped
from clipkit.data.source import RowDict
from clipkit.errors import DataError

SEPARATORS = ",;\t|"
Quoting = Literal["doubled", "escaped", "none"]
Position = Sequence[int]
"""Bytes and lines before a line."""

_FIELD_LIMIT = 64 << 20  # characters of a field: an image in base64
_HEAD_LINES, _HEAD_BYTES = 200, 1 << 20  # read to decide on the dialect, and 3 lines at least
_SCANNED = 256 << 20  # bytes searched for bytes that are not UTF-8, and for quotes
_BLOCK = 1 << 20
_EVIDENCE = 1000  # lines with quotes, or with bytes beyond ASCII, that decide
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of utf-16-le
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = {name for _, name in _BOMS[1:]}
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_CHOOSE = "choose another encoding with --encoding (encoding=)"


@dataclass(frozen=True)
class Dialect:
    """How a text table is written.

    Attributes:
        encoding: of its bytes, by Python's name.
        separator: between fields.
        quoting: how a quote is written inside a quoted field: doubled or escaped with a backslash;
            or "none", if quotes are plain characters.
        spaces: whether spaces stand between a separator and a quoted field.
        columns: names of the columns, each once.
        start: position of the first record.
    """

    encoding: str
    separator: str
    quoting: Quoting
    spaces: bool
    columns: tuple[str, ...]
    start: tuple[int, int]

    @property
    def options(self) -> dict[str, Any]:
        """The same for ``csv.reader``."""
        return _options(self.separator, self.quoting, self.spaces)


def _options(separator: str, quoting: Quoting, spaces: bool = False) -> dict[str, Any]:
    escaped = quoting == "escaped"
    return {
        "delimiter": separator,
        "quoting": csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL,
        "doublequote": not escaped,
        "escapechar": "\\" if escaped else None,
        "skipinitialspace": spaces,
    }


class _Lines:
    """The lines of a text file from a position on, split as ``open`` splits them with newline="".

    Bytes that the encoding does not have become U+FFFD.

    Attributes:
        position: of the next line.
    """

    def __init__(self, stream: BinaryIO, encoding: str, start: Position = (0, 0)) -> None:
        self._stream, self._encoding = stream, encoding
        self._wide = encoding in _WIDE
        self.seek(start)

    def seek(self, position: Position) -> None:
        """Continue at a position where a line begins."""
        self._stream.seek(position[0])
        self.position = list(position)
        self._parts = iter(list[bytes]())
        self._wide_lines = self._split_wide() if self._wide else iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        offset, number = self.position
        if self._wide:
            text = next(self._wide_lines)
            size = len(text.encode(self._encoding, "surrogatepass"))
        else:
            line = next(self._parts, None)
            if line is None:
                self._parts = iter(next(self._stream).splitlines(keepends=True))
                line = next(self._parts)
            text, size = line.decode(self._encoding, "replace"), len(line)
        self.position = [offset + size, number + 1]
        return text if offset else text.removeprefix("\ufeff")

    def _split_wide(self) -> Iterator[str]:
        """Lines of UTF-16 or UTF-32, where the byte of a newline may belong to any character."""
        decoder = codecs.getincrementaldecoder(self._encoding)("replace")
        rest = ""
        while block := self._stream.read(_BLOCK):
            # The last line may go on in the next block, or its "\r" be followed by "\n".
            *lines, rest = io.StringIO(rest + decoder.decode(block), newline="")
            yield from lines
        if rest:
            yield rest


def read_dialect(file: Path, notes: list[str], encoding: str | None = None) -> Dialect:
    """Find out how a text table is written.

    Args:
        file: the table.
        notes: gets sentences about what is not obvious: the encoding, a missing header.
        encoding: of the table, by Python's name; None finds it.

    Raises:
        DataError: the table is empty or has URLs and no header, or the encoding is unknown.
    """
    # The limit is the process's own: raising it does no harm to others.
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    encoding = _check_encoding(file, encoding) if encoding else _find_encoding(file, notes)
    with file.open("rb") as stream:
        lines = _Lines(stream, encoding)
        head = list(_head(lines))
        texts = [text for text, _ in head]
        separator = None
        if texts and (match := _SEPARATOR_LINE.fullmatch(texts[0])):  # from Excel
            separator = match[1]
            del head[0], texts[0]
        comments = next((n for n, text in enumerate(texts) if text[0] != "#"), len(texts))
        body = texts[comments:] or texts
        if not body:
            raise DataError(f"{file} holds no rows, expected a table of images")
        separator = separator or _find_separator(body)
        first = _split(body[0], separator)
        cut = next(lines, None) is not None
        quoting, spaces = _find_quoting(file, encoding, body, cut, separator, len(first))
        dialect = Dialect(encoding, separator, quoting, spaces, (), (0, 0))
        if comments and body is not texts:
            named = _split(texts[comments - 1].lstrip("# "), separator)
            if len(named) == len(first) and any(map(is_column_name, named)):
                position = head[comments][1]
                return replace(dialect, columns=_unique(named), start=(position[0], position[1]))
        start = head[comments if body is not texts else 0][1]
        lines.seek(start)
        reader = csv.reader(lines, **dialect.options)
        try:
            fields = [name.strip() for name in next(reader)]
        except csv.Error as error:
            raise DataError(f"{file} is not CSV: its header cannot be read ({error})") from None
        if _is_data(fields, file.parent):
            rows = [_split(text, separator) for text in body]
            columns = _name_columns(fields, rows)
            if "url" in columns:
                captions = [name for name in columns if name == "caption"]
                raise url_error(str(file), "url", captions, separator.join(columns))
            notes.append(f"{file.name} has no header; its columns are read as {', '.join(columns)}")
            return replace(dialect, columns=columns, start=(start[0], start[1]))
        after = lines.position
        return replace(dialect, columns=_unique(fields), start=(after[0], after[1]))


def _head(lines: _Lines) -> Iterator[tuple[str, Position]]:
    """The first lines that are not blank, each with its position."""
    count = 0
    while True:
        position = lines.position
        if count >= 3 and (count >= _HEAD_LINES or position[0] >= _HEAD_BYTES):
            return
        text = next(lines, None)
        if text is None:
            return
        if text.strip():
            count += 1
            yield text, position


def _check_encoding(file: Path, name: str) -> str:
    try:
        found = codecs.lookup(name).name
        "".encode(found)
    except LookupError:  # also: not a text encoding
        raise DataError(
            f"{name!r} is not an encoding that Python knows; name one such as utf-8, cp1252 or "
            "gb18030"
        ) from None
    if found in ("utf-16", "utf-32"):
        mark = _mark(file)
        return mark if mark is not None and mark.startswith(found) else f"{found}-le"
    return found.removesuffix("-sig")


def _mark(file: Path) -> str | None:
    """The encoding that a byte order mark names."""
    with file.open("rb") as stream:
        head = stream.read(4)
    return next((name for mark, name in _BOMS if head.startswith(mark)), None)


def _find_encoding(file: Path, notes: list[str]) -> str:
    found = _mark(file) or _wide_without_mark(file)
    if found is None:
        if _is_utf8(file):
            return "utf-8"
        good, bad = _beyond_ascii(file)
        if good >= len(bad):
            return "utf-8"  # with a few damaged rows, which are reported as they are read
        if not _is_western(bad):
            notes.append(
                f"{file.name} is neither UTF-8 nor cp1252; name its encoding with --encoding "
                "(encoding=), such as gb18030, shift_jis or cp1251"
            )
            return "utf-8"
        notes.append(f"{file.name} is not UTF-8 and is read as cp1252 (Western); {_CHOOSE}")
        return "cp1252"
    if found != "utf-8":
        notes.append(f"{file.name} is read as {found}; {_CHOOSE}")
    return found


def _wide_without_mark(file: Path) -> str | None:
    with file.open("rb") as stream:
        head = stream.read(4096)
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) * 4 > len(head) and min(even, odd) * 20 < len(head):
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _is_utf8(file: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as stream:
        try:
            for _ in range(_SCANNED // _BLOCK):
                block = stream.read(_BLOCK)
                decoder.decode(block, final=not block)
                if not block:
                    break
        except UnicodeDecodeError:
            return False
    return True


def _beyond_ascii(file: Path) -> tuple[int, list[bytes]]:
    """Of the lines beyond ASCII: how many are UTF-8, and those that are not."""
    good, bad = 0, []
    with file.open("rb") as stream:
        for line in islice((line for line in stream if not line.isascii()), _EVIDENCE):
            try:
                line.decode()
                good += 1
            except UnicodeDecodeError:
                bad.append(line)
    return good, bad


def _is_western(lines: list[bytes]) -> bool:
    """Whether bytes beyond ASCII stand alone between letters, as they do in cp1252 and not in
    encodings of other scripts."""
    runs = [len(run) for line in lines for run in re.findall(rb"[\x80-\xff]+", line)]
    single = sum(run == 1 for run in runs)
    undefined = any(re.search(rb"[\x81\x8d\x8f\x90\x9d]", line) for line in lines)
    return not undefined and 2 * single > sum(runs)


def _split(text: str, separator: str) -> list[str]:
    """The fields of a line, quoted or not."""
    try:
        return [field.strip() for field in next(csv.reader([text], delimiter=separator), [])]
    except csv.Error:  # a field beyond the limit
        return text.strip().split(separator)


def _find_separator(lines: list[str]) -> str:
    """The separator that the first line has, and after which most lines have as many fields."""
    best, found = (0.0, 0), ","
    for mark in SEPARATORS:
        counts = [len(_split(line, mark)) for line in lines[:50]]
        score = (counts.count(counts[0]) / len(counts), counts[0])
        if counts[0] > 1 and score > best:
            best, found = score, mark
    return found


def _find_quoting(
    file: Path, encoding: str, head: list[str], cut: bool, separator: str, count: int
) -> tuple[Quoting, bool]:
    """How quotes are used: as the first lines are intact records, or as most lines are that have a
    field beginning with a quote.

    In tables separated by tabs or bars, quotes are plain characters unless the first lines show
    that they are not.

    Args:
        file, encoding, separator: of the table.
        head: its first lines.
        cut: whether further lines follow.
        count: of its columns.
    """
    begins = re.compile(rf'(^|{re.escape(separator)}) *"')
    first = [line for line in head if begins.search(line)]
    lines = first + [line for line in _quote_lines(file, encoding) if begins.search(line)]
    plain = separator in "\t|"
    if not lines:
        return "none" if plain else "doubled", False
    ways = [_Way(separator, count, quoting, n) for quoting in _QUOTED for n in (False, True)]
    intact = next((way for way in ways if first and way.reads(head, cut)), None)
    best = intact or max(ways, key=lambda way: sum(way.fields(line) == count for line in lines))
    found = [best.fields(line) for line in lines]
    good, broken = found.count(count), found.count(_BROKEN)
    if intact is not None:  # inside records that span lines, lines may seem broken
        none = plain and cut and broken > good
    elif plain:
        none = good < len(lines)
    else:
        none = broken == len(lines)
    # Programs that quote every field quote the header, too.
    names = head[0].strip().split(separator)
    none = none and not all(re.fullmatch('".+"', name) for name in names)
    return ("none", False) if none else (best.quoting, best.spaces)


_QUOTED: tuple[Quoting, ...] = ("doubled", "escaped")
_OPEN, _BROKEN = -1, -2


@dataclass(frozen=True)
class _Way:
    """A way to quote, with which lines may agree or not."""

    separator: str
    count: int
    quoting: Quoting
    spaces: bool

    def _strict(self, lines: Iterable[str]) -> Any:
        if self.quoting == "escaped":  # csv.reader is not strict then
            lines = (re.sub(r"\\.", "x", line) for line in lines)
        options = _options(self.separator, "doubled", self.spaces)
        return csv.reader(lines, strict=True, **options)

    def fields(self, line: str) -> int:
        """The number of fields; _OPEN if a quote is not closed, _BROKEN if text follows one."""
        try:
            return len(next(self._strict([line]), []))
        except csv.Error as error:
            return _OPEN if "unexpected end" in str(error) else _BROKEN

    def reads(self, lines: list[str], cut: bool) -> bool:
        """Whether all lines are records with as many fields, none of which spans a row; if ``cut``,
        the last may be incomplete."""
        reader, done = self._strict(lines), 0
        try:
            for record in reader:
                inside = lines[done + 1 : reader.line_num - 1]
                if len(record) != self.count or any(map(self._is_row, inside)):
                    return False
                done = reader.line_num
        except csv.Error as error:
            if not cut or "unexpected end" not in str(error):
                return False
        return not any(map(self._is_row, lines[done + 1 :]))

    def _is_row(self, line: str) -> bool:
        return line.count(self.separator) >= self.count - 1


def _quote_lines(file: Path, encoding: str) -> list[str]:
    """Lines with quotes from the whole table, as far as it is searched."""
    found: list[str] = []
    if encoding in _WIDE:
        return found
    with file.open("rb") as stream:
        for _ in range(_SCANNED // _BLOCK):
            block = stream.read(_BLOCK)
            if not block or len(found) >= _EVIDENCE:
                break
            if b'"' in block:
                lines = block.splitlines()[1:-1]  # the first and last may be cut off
                found += [line.decode(encoding, "replace") for line in lines if b'"' in line]
    return found[:_EVIDENCE]


def _is_data(fields: list[str], folder: Path) -> bool:
    """Whether the first line of a table is a row: it names an image, and no usual column."""
    if any(map(is_column_name, fields)):
        return False
    return any(map(_is_image, fields)) or any(
        0 < len(text) < 1000 and "\0" not in text and os.path.isfile(folder / text)
        for text in fields
    )


def _is_image(text: str) -> bool:
    return has_image_suffix(text) or is_url(text) or decode_inline(text) is not None


def _name_columns(first: list[str], rows: list[list[str]]) -> tuple[str, ...]:
    """Names for the columns of a table without header, of which the caption has the most words."""
    names = [f"column_{number}" for number in range(1, len(first) + 1)]
    image = next((n for n, text in enumerate(first) if _is_image(text)), 0)
    names[image] = "url" if is_url(first[image]) else "image"
    words = [0] * len(first)
    for row in rows:
        if len(row) == len(first):
            words = [sum(pair) for pair in zip(words, (len(t.split()) for t in row), strict=True)]
    others = [number for number in range(len(first)) if number != image]
    if others:
        caption = max(others, key=lambda number: words[number])
        if len(others) == 1 or words[caption] > len(rows):
            names[caption] = "caption"
    return tuple(names)


def _unique(names: list[str]) -> tuple[str, ...]:
    """The names, with .1, .2 and so on after repeated ones, as pandas has it."""
    found: list[str] = []
    for name in (name.strip() for name in names):
        numbers = (f"{name}.{number}" for number in range(1, len(names) + 1))
        found.append(name if name not in found else next(n for n in numbers if n not in found))
    return tuple(found)


@dataclass(frozen=True)
class CsvTable:
    """The records of a text table, from its start or from a position on.

    Attributes:
        file: the table.
        dialect: how it is written.
        notes: takes sentences about quotes and separators that were read as text.
        image: number of the image column.
        text: number of the caption column, if it is the only one.
    """

    file: Path
    dialect: Dialect
    notes: list[str]
    image: int = 0
    text: int | None = None

    @classmethod
    def open(cls, file: Path, notes: list[str], encoding: str | None = None) -> Self:
        """Find out how a table is written; see ``read_dialect``."""
        return cls(file, read_dialect(file, notes, encoding), notes)

    def names(self) -> list[str]:
        """The columns."""
        return list(self.dialect.columns)

    def using(self, columns: Columns) -> Self:
        """The same, knowing what its columns hold."""
        names = self.names()
        text = names.index(columns.captions[0]) if len(columns.captions) == 1 else None
        return replace(self, image=names.index(columns.image), text=text)

    def records(
        self, skipped: list[Skipped], start: Position = (0, 0)
    ) -> Iterator[tuple[RowDict, Position]]:
        """The records, each with the position after it.

        A quote that is not closed before the next row is a plain character. More fields than the
        header has belong to the last column if that is the caption.

        Args:
            skipped: takes the lines that are not records.
            start: the position after a record; (0, 0) is that of the first one.
        """
        columns, count = self.dialect.columns, len(self.dialect.columns)
        with self.file.open("rb") as stream:
            lines = _Lines(stream, self.dialect.encoding, start if start[0] else self.dialect.start)
            reader = csv.reader(lines, **self.dialect.options)
            while True:
                before = lines.position
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error:  # a field beyond the limit: its quote is never closed
                    record = self._close_quotes(lines, before, [])
                if lines.position[1] - before[1] > 1:
                    record = self._close_quotes(lines, before, record)
                if len(record) == count:
                    yield dict(zip(columns, record, strict=True)), lines.position
                elif fitted := self._fit(record):
                    yield dict(zip(columns, fitted, strict=True)), lines.position
                elif record:
                    reason = f"has {len(record)} fields, its header has {count}"
                    reason = "is a comment" if record[0].startswith("#") else reason
                    skipped.append(Skipped(f"{self.file.name}:{lines.position[1]}", reason))

    def _close_quotes(self, lines: _Lines, start: Position, record: list[str]) -> list[str]:
        """A record of several lines, unless a row begins in one of them: then the first line, read
        with quotes as plain characters.

        Args:
            lines: at the end of the record as it was read, and then at that of what is returned.
            start: where the record begins.
            record: as it was read; empty if it is too long.
        """
        end = lines.position
        lines.seek(start)
        plain = _options(self.dialect.separator, "none")
        if record:
            # The line that the image of the record is in says nothing: the first, if the image
            # comes before the text that spans lines, or else the last.
            later = any("\n" in text or "\r" in text for text in record[self.image :])
            own = islice(lines, int(later), end[1] - start[1] - int(not later))
            if not self._has_row(record, own, plain):
                lines.seek(end)
                return record
            lines.seek(start)
        first = next(csv.reader([next(lines)], **plain), [])
        self.notes.append(f"{self.file.name}: quotes that are not closed are plain characters")
        return first

    def _has_row(self, record: list[str], lines: Iterable[str], plain: dict[str, Any]) -> bool:
        """Whether one of the lines is a row: it has as many fields, and names an image as the
        record does."""
        suffixes = self.image < len(record) and _is_image(record[self.image].strip(' "'))
        for fields in csv.reader(lines, **plain):
            if len(fields) >= len(self.dialect.columns):
                name = fields[self.image].strip(' "')
                if _is_image(name) if suffixes else len(name.split()) == 1:
                    return True
        return False

    def _fit(self, record: list[str]) -> list[str] | None:
        """A record with more fields than columns, without the blank ones at its end or with the
        others joined; None if neither makes it fit."""
        count = len(self.dialect.columns)
        extra = record[count:]
        if not extra:
            return None
        if not any(field.strip() for field in extra):
            return record[:count]
        if self.text != count - 1:
            return None
        column = self.dialect.columns[-1]
        self.notes.append(
            f"{self.file.name}: separators in {column!r} that are not quoted are read as part of it"
        )
        separator = self.dialect.separator + (" " if self.dialect.spaces else "")
        return [*record[: count - 1], separator.join(record[count - 1 :])]
