"""What every source of images and captions boils down to, and how its readers build it."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from clipkit.data.images import Skipped
from clipkit.data.rows import Mixture, Rows, Stream, Table, schema
from clipkit.errors import ConfigError, DataError
from clipkit.progress import is_main_process, print_status

if TYPE_CHECKING:
    import pyarrow as pa


RowDict = dict[str, Any]
"""A row as readers of files build it: the values of the columns of ``schema`` by name."""
Item = TypeVar("Item")
MEMORY_LIMIT = 2 << 30  # bytes; what is larger streams unless told otherwise
_LOST = "\ufffd"  # what stands where bytes were not UTF-8


@dataclass(frozen=True)
class Wanted:
    """How to read a table.

    Attributes:
        image, caption, label: column names; None finds the usual names, an empty one is absent.
        metadata: read the other columns as well; it changes neither pairs nor fingerprints.
        image_root: the folder that image paths start from; None finds it.
        encoding: of text tables; None finds it.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    metadata: bool = field(default=False, repr=False)
    image_root: str | Path | None = None
    encoding: str | None = None


class Skips(list[Skipped]):
    """A list that takes each entry once: a stream meets the same bad rows at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[Skipped] = set()

    def append(self, item: Skipped) -> None:
        """Add an entry, unless it is there."""
        if item not in self._known:
            self._known.add(item)
            super().append(item)


class Notes(list[str]):
    """Sentences about how a source was read: what was assumed, combined or not used.

    Each is kept once, and printed on stderr when it is added.
    """

    def append(self, sentence: str) -> None:
        """Add and print a sentence, unless it is there."""
        if sentence not in self:
            super().append(sentence)
            if is_main_process():
                print_status(f"note: {sentence}")


class _JoinedSkips(list[Skipped]):
    """What the parts of a mixture have left out; streams among them still add to it."""

    def __init__(self, parts: "Sequence[Part]") -> None:
        super().__init__()
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part.source.skipped) for part in self._parts)

    def __iter__(self) -> Iterator[Skipped]:
        for part in self._parts:
            for item in part.source.skipped:
                yield Skipped(part.prefix + item.key, item.reason)

    def __getitem__(self, number: Any) -> Any:
        return list(self)[number]


@dataclass(frozen=True)
class Part:
    """A source in a mixture.

    Attributes:
        name: a short name, which no other part has.
        source: the source by itself.
        weight: how often each of its pairs is drawn in an epoch of training.
        prefix: what its keys start with in the mixture; empty if no keys clash.
    """

    name: str
    source: "Source"
    weight: float
    prefix: str = ""

    @property
    def rows(self) -> "Table | Stream":
        """Its rows, with the keys of the mixture."""
        rows = self.source.table if self.source.count is not None else self.source.stream
        return rows.with_prefix(self.prefix) if self.prefix else rows


@dataclass(frozen=True)
class Source:
    """A data source, opened.

    Attributes:
        spec: what was asked for.
        kind: image, folder, sidecars, classes, metadata, csv, json, jsonl, parquet, tars, zip,
            saved, hub or mixture.
        rows: a ``Table``, in memory, or a ``Stream`` (or ``Mixture``), which can only be read front
            to back.
        root: the directory that paths and keys are relative to; None for the hub.
        fingerprint: changes when the content does; made from names, sizes and times alone.
        skipped: items that were left out; of a stream, so far.
        notes: how the source was read, if that is not obvious, and what in it was not used; of a
            stream, so far.
        listed: the paths and patterns that were named, if not all of a folder or a single file;
            those of images and folders are relative to ``root``, others absolute.
        columns: the columns that were named, as "image", "caption" and "label", and the
            "encoding".
        parts: the sources of a mixture.
    """

    spec: str
    kind: str
    rows: Rows
    root: Path | None
    fingerprint: str
    skipped: list[Skipped]
    notes: list[str] = field(default_factory=Notes)
    listed: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    @property
    def origin(self) -> dict[str, Any]:
        """How to open it again, as plain data for a manifest."""
        origin: dict[str, Any] = {"spec": self.spec, "kind": self.kind}
        origin["root"] = None if self.root is None else str(self.root)
        origin["fingerprint"] = self.fingerprint
        table = Path(os.path.abspath(self.spec))
        if self.root not in (None, table.parent) and table.is_file():
            origin["table"] = str(table)  # its images are in another folder
        more = {"listed": list(self.listed), "columns": self.columns}
        return origin | {name: value for name, value in more.items() if value}

    @property
    def streaming(self) -> bool:
        """Whether ``rows`` can only be read in order and have no length."""
        return not isinstance(self.rows, Table)

    @property
    def count(self) -> int | None:
        """The number of rows; None for a stream, where it is not known."""
        return len(self.rows) if isinstance(self.rows, Table) else None

    @property
    def table(self) -> Table:
        """The rows, by number; raises TypeError for a stream."""
        if not isinstance(self.rows, Table):
            raise TypeError(f"{self.spec} is a stream, expected a table")
        return self.rows

    @property
    def stream(self) -> Stream:
        """The rows, front to back; raises TypeError for a table or a mixture."""
        if not isinstance(self.rows, Stream):
            raise TypeError(f"{self.spec} is not a single stream, expected one")
        return self.rows


def mix(sources: Sequence[Source], weights: Sequence[float] = ()) -> Source:
    """Several sources as one.

    A key keeps its form if it is certain that no two sources have the same; otherwise all keys
    start with the name of their source and a slash.

    Args:
        sources: at least one; the parts of mixtures become parts of this one.
        weights: how often to draw each pair of a source in an epoch of training, one for each
            source; empty: all once.

    Raises:
        ConfigError: there is not one weight for each source.
    """
    if weights and len(weights) != len(sources):
        specs = ", ".join(source.spec for source in sources)
        raise ConfigError(
            f"there are {len(weights)} weights for {len(sources)} sources ({specs}), expected one "
            "for each; set data.weights accordingly"
        )
    parts: list[Part] = []
    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        for part in source.parts or [Part("", source, 1.0)]:
            parts.append(Part("", part.source, part.weight * weight))
    names = _names([part.source for part in parts])
    clash = _may_clash([part.source for part in parts])
    named = tuple(
        replace(part, name=name, prefix=f"{name}/" if clash else "")
        for name, part in zip(names, parts, strict=True)
    )
    rows = [part.rows for part in named]
    tables = [part for part in rows if isinstance(part, Table)]
    notes = Notes()
    for part in named:
        list.extend(notes, [note for note in part.source.notes if note not in notes])  # printed
    return Source(
        "::".join(source.spec for source in sources),
        "mixture",
        Table.concat(tables) if len(tables) == len(rows) else Mixture(rows),
        None,
        fingerprint_of([], *((part.source.fingerprint, part.weight) for part in named)),
        _JoinedSkips(named),
        notes,
        parts=named,
    )


def _names(sources: Sequence[Source]) -> list[str]:
    """Short names: the last part of the path, with a number if two are the same."""
    names: list[str] = []
    for source in sources:
        name = free = PurePath(source.spec).name or source.spec
        number = 1
        while free in names:
            number += 1
            free = f"{name}-{number}"
        names.append(free)
    return names


def _may_clash(sources: Sequence[Source]) -> bool:
    """Whether two sources may have the same key. The keys of streams are not known, but those of
    tars start with the name of a tar.
    """
    seen: set[str] = set()
    tables = [source for source in sources if not source.streaming]
    for source in tables:
        keys = set(source.table.keys)
        if seen & keys:
            return True
        seen |= keys
    streams = [source for source in sources if source.streaming]
    tars = [Path(shard).name for s in streams if s.kind == "tars" for shard in s.stream.shards]
    if any(source.kind != "tars" for source in streams):
        return len(sources) > 1
    heads = {key.partition("/")[0] for key in seen} if streams else set()
    return len(set(tars)) < len(tars) or not heads.isdisjoint(tars)


Data = str | Path | Source | Iterable[Any]
"""What ``open_source`` opens: a path, a pattern, a Source, several paths, or pairs."""


def no_captions(source: Source) -> DataError:
    """The error for a source of which captions are wanted and which has none."""
    return DataError(
        f"{source.spec} has no captions; expected sidecar texts, a caption column or metadata"
    )


def to_batches(rows: Iterable[RowDict], size: int) -> Iterator["pa.RecordBatch"]:
    """Rows as Arrow record batches of the common columns, ``size`` rows each."""
    import pyarrow as pa

    for chunk in chunks(rows, size):
        yield pa.RecordBatch.from_pylist(chunk, schema())


def chunks(rows: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Rows, ``size`` of them at a time."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def in_memory(
    batches: Iterable["pa.RecordBatch"],
    skipped: list[Skipped],
    metadata: "pa.Schema | None" = None,
) -> Table:
    """One table of all batches, with every key once.

    Further rows of an image, which have the same path or the same key and bytes, add their captions
    to its first row, whose metadata stay. Another image under a key that is taken is skipped.
    """
    import pyarrow as pa

    columns = schema(metadata)
    place: dict[str, int] = {}
    captions: list[list[str]] = []
    labels: list[str | None] = []
    chunk_of, index_of = array("L"), array("L")  # where the image of each key is in ``kept``
    kept: list[pa.StructArray] = []
    told: list[pa.StructArray] = []
    taken: list[Skipped] = []
    for batch in batches:
        images = batch.column("image")
        has_bytes = images.field("bytes").is_valid().to_pylist()
        fresh = []
        rows: list[int] = []  # of the batch that are kept
        texts = batch.column("captions").to_pylist()
        known = batch.column("label").to_pylist()
        for index, key in enumerate(batch.column("key").to_pylist()):
            at = place.setdefault(key, len(captions))
            fresh.append(at == len(captions))
            if fresh[-1]:
                captions.append(texts[index])
                labels.append(known[index])
                chunk_of.append(len(kept))
                index_of.append(len(rows))
                rows.append(index)
                continue
            here = chunk_of[at] == len(kept)
            first = images[rows[index_of[at]]] if here else kept[chunk_of[at]][index_of[at]]
            if has_bytes[index] and first["bytes"] != images[index]["bytes"]:
                taken.append(Skipped(key, "its key is taken by an earlier image"))
            else:
                if bool(captions[at]) != bool(texts[index]):
                    skipped.append(Skipped(key, "one of its rows has no caption"))
                captions[at] += texts[index]
                labels[at] = labels[at] or known[index]
        kept.append(images if all(fresh) else images.filter(pa.array(fresh)))
        if metadata is not None:
            told.append(batch.column("metadata").filter(pa.array(fresh, pa.bool_())))
    skipped.extend(taken)  # every row counts, although ``Skips.append`` takes an entry once
    arrays = [
        pa.array(list(place), pa.string()),
        pa.chunked_array(kept, columns.field("image").type),
        pa.array(captions, columns.field("captions").type),
        pa.array(labels, pa.string()),
    ]
    if metadata is not None:
        arrays.append(pa.chunked_array(told, columns.field("metadata").type))
    return Table(pa.table(arrays, schema=columns))


def usable(captions: Iterable[str | None]) -> list[str]:
    """The captions that hold any text."""
    return [caption for caption in captions if caption and caption.strip()]


def clean_text(value: Any) -> str:
    """A value as stripped text that can be encoded: what is not UTF-8 becomes U+FFFD."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = text.strip()
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def is_damaged(text: str) -> bool:
    """Whether bytes of a text were lost in decoding."""
    return _LOST in text


def fingerprint_of(files: Iterable[tuple[str, Path]], *more: object) -> str:
    """A hash over names, sizes and modification times of files, and whatever else counts."""
    digest = hashlib.blake2b(repr(more).encode("utf-8", "surrogateescape"), digest_size=16)
    for name, path in files:
        try:
            status = os.stat(path)
            line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:
            line = f"{name}\0absent\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
