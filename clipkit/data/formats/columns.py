"""Find the columns of a table, and convert its batches to the columns of every source."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.data.captions import clean_captions
from clipkit.data.formats.image_paths import (
    INLINE,
    ImagePaths,
    decode_inline,
    find_image_paths,
    is_url,
)
from clipkit.data.images import Skipped
from clipkit.data.rows import schema
from clipkit.data.source import Notes, Wanted, clean_text, is_damaged
from clipkit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from clipkit.data.formats.metadata import Metadata
    from clipkit.data.formats.nested import Nested


IMAGE = (
    *("filepath", "file_name", "filename", "image", "image_path", "path", "img", "images"),
    *("img_path", "image_filename", "image_file", "image_name"),
)
CAPTION = (
    *("title", "caption", "captions", "text", "sentence", "description", "alt"),
    *("prompt", "comment"),
)
LABEL = ("label", "class", "category")
KEY = ("key", "id", "__key__")
URL = ("url", "image_url", "img_url", "uri")

_NUMBER = re.compile(r"[\s._-]*\d+$")
_DOWNLOADED = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".jsonl": "jsonl"}
_DOWNLOADED |= {".ndjson": "jsonl", ".parquet": "parquet"}
_LONGEST_PATH = 4096  # characters, as Linux has it


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        image, captions, label, key: names of columns.
        classes: names for the numbers of the label column.
        nested: fields of structs and lists that serve as columns of an Arrow table.
    """

    image: str
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    key: str | None = None
    classes: list[str] | None = None
    nested: "Nested | None" = None

    @property
    def used(self) -> list[str]:
        """Every column that needs reading, each once."""
        names = [self.image, *self.captions, self.label, self.key]
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def stored(self) -> list[str]:
        """The columns of the file that ``used`` are read from."""
        return list(dict.fromkeys(self.path(name)[0] for name in self.used))

    def path(self, name: str) -> tuple[str, ...]:
        """The column of the file, and the fields within it, that a column is read from."""
        return self.nested.paths.get(name, (name,)) if self.nested else (name,)

    def plain(self, batch: "pa.RecordBatch", notes: list[str]) -> "pa.RecordBatch":
        """An Arrow batch with each of the columns used, and one image a row.

        Args:
            batch: of the columns stored.
            notes: takes a sentence if rows have further images, which are not used.
        """
        return self.nested.plain(batch, self, notes) if self.nested else batch

    def metadata(
        self, tables: Sequence[Mapping[str, "pa.DataType"]], spec: str, notes: list[str]
    ) -> "Metadata | None":
        """The columns of files, their Arrow types by name, that have no other use."""
        from clipkit.data.formats.metadata import find_metadata

        used = {*self.used, *self.stored}
        kind = tables[0].get(self.image)
        if kind is None or not _holds_bytes(kind):
            used.discard(self.key or "")  # images that are files have their paths as keys
        return find_metadata(tables, used, spec, notes)

    def find_images(
        self, values: Iterable[Any], file: Path, wanted: Wanted, notes: list[str]
    ) -> ImagePaths:
        """Find out where the images are, from the first values of the image column.

        Raises:
            DataError: the values are URLs, or the image root has none of the images.
        """
        texts = [text for value in values if value is not None and (text := clean_text(value))]
        if texts and all(map(is_url, texts)):
            raise url_error(str(file), self.image, self.captions[:1])
        sample = (text for text in texts if decode_inline(text) is None and not _refusal(text))
        return find_image_paths(sample, file.parent, wanted.image_root, notes)


def is_column_name(text: str) -> bool:
    """Whether a text is one of the usual names of columns."""
    return _stem(text) in {*IMAGE, *CAPTION, *LABEL, *KEY, *URL}


def find_columns(
    types: Mapping[str, "pa.DataType | None"], wanted: Wanted, spec: str, notes: list[str]
) -> Columns:
    """Choose the columns by the names given, or by the usual names.

    Args:
        types: the columns found, with their Arrow types (None where a text file has none).
        wanted: the names given.
        spec: the table.
        notes: takes a sentence if there are several caption columns.

    Raises:
        DataError: there is no image column, or nothing that could be a caption or a label.
    """
    found = ", ".join(types) or "none"
    image = _given(wanted.image, types, "image", spec) or _usual_image(types)
    if image is None:
        if (url := _usual(types, URL)) is not None:
            raise url_error(spec, url, [] if wanted.caption == "" else _usual_captions(types)[:1])
        raise DataError(
            f"{spec} has no image column among: {found}; choose one with --image-column (image=)"
        )
    label = _given(wanted.label, types, "label", spec)
    if wanted.label is None:
        label = _usual(types, LABEL)
    key = _usual(types, KEY)
    if wanted.caption is not None:
        given = _given(wanted.caption, types, "caption", spec)
        captions = [given] if given else []
    else:
        captions = _usual_captions(types)
        # Other columns suggest an unusual name, unless they are wanted as metadata.
        further = set() if wanted.metadata else set(types) - {image, key}
        if not captions and not label and further:
            raise DataError(
                f"{spec} has no caption column among: {found}; choose one with --caption-column "
                "(caption=), or '' for none"
            )
        _note_captions(types, captions, spec, notes)
    return Columns(image, captions, label, key)


def _given(
    name: str | None, types: Mapping[str, "pa.DataType | None"], role: str, spec: str
) -> str | None:
    if name and name not in types:
        found = ", ".join(types) or "none"
        raise DataError(f"{spec} has no column {name!r} among: {found}; name another {role} column")
    return name or None


def _usual(names: Mapping[str, Any], usual: tuple[str, ...]) -> str | None:
    lowered = {name.strip().lower(): name for name in reversed(list(names))}
    return next((lowered[name] for name in usual if name in lowered), None)


def _usual_image(types: Mapping[str, "pa.DataType | None"]) -> str | None:
    holding = {name: kind for name, kind in types.items() if kind and _holds_bytes(kind)}
    if len(holding) == 1:
        return next(iter(holding))
    return _usual(holding, IMAGE) or _usual(types, IMAGE)


def _usual_captions(types: Mapping[str, Any]) -> list[str]:
    """The columns of the first usual name, numbered or not: caption, caption2, caption.1."""
    one = _usual(types, CAPTION)
    stems = {name: _stem(name) for name in types}
    stem = next((usual for usual in CAPTION if usual in stems.values()), None)
    stem = stem if one is None else _stem(one)
    return [name for name in types if stems[name] == stem]


def _stem(name: str) -> str:
    return _NUMBER.sub("", name.strip().lower())


def _note_captions(
    types: Mapping[str, Any], captions: list[str], spec: str, notes: list[str]
) -> None:
    table = os.path.basename(spec)
    if len(captions) > 1:
        notes.append(f"{table}: the captions are in the columns {', '.join(captions)}")
    others = [name for name in types if _stem(name) in CAPTION and name not in captions]
    if captions and others:
        notes.append(
            f"{table}: the captions are read from {', '.join(captions)}, not from "
            f"{', '.join(others)}; choose another column with --caption-column (caption=)"
        )


def url_error(spec: str, url: str, captions: Sequence[str], header: str | None = None) -> DataError:
    """The error for a table of image URLs, with the command that downloads them.

    Args:
        spec: the table.
        url: the column of the URLs.
        captions: the column of the captions, if there is one.
        header: the line that the table lacks, if it has no header.
    """
    stem, suffix = os.path.splitext(spec)
    options = {"--url_list": spec, "--input_format": _DOWNLOADED.get(suffix.lower(), "csv")}
    first = ""
    if header == url:  # one URL a line
        options["--input_format"] = "txt"
    else:
        options["--url_col"] = url
        if captions:
            options["--caption_col"] = captions[0]
        if header is not None:
            line = header.replace("\t", "\\t")
            first = f"sed -i {shlex.quote(f'1i {line}')} {shlex.quote(spec)} && "
    folder = f"{stem}-images"
    options |= {"--output_format": "webdataset", "--output_folder": folder}
    options["--resize_mode"] = "keep_ratio"
    command = " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items())
    return DataError(
        f"{spec} has URLs in the column {url!r}, expected image files; download them with "
        f"`{first}img2dataset {command}` and name '{folder}/*.tar'"
    )


def _holds_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in {part.name for part in kind}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass(frozen=True)
class Common:
    """Converts record batches of one table to the common columns.

    Attributes:
        columns: of the table.
        paths: where the image files are.
        skipped: takes the rows and captions that cannot be used.
        width: digits of a row number that serves as key; ``prefix`` precedes it.
        metadata: further columns that the rows keep.
        notes: takes sentences about how values were read.
    """

    columns: Columns
    paths: ImagePaths
    skipped: list[Skipped]
    width: int = 1
    prefix: str = ""
    metadata: "Metadata | None" = None
    notes: list[str] = field(default_factory=Notes)

    @property
    def used(self) -> list[str]:
        """Every column that needs reading, each once."""
        more = self.metadata.types if self.metadata else ()
        return list(dict.fromkeys([*self.columns.stored, *more]))

    @property
    def metadata_schema(self) -> "pa.Schema | None":
        """Names and types of the metadata in the rows."""
        return self.metadata.schema if self.metadata else None

    def batch(self, batch: "pa.RecordBatch", first: int) -> "pa.RecordBatch":
        """The rows of ``batch`` that name or contain an image; ``first`` numbers its first row."""
        import pyarrow as pa

        batch = self.columns.plain(batch, self.notes)
        data, paths = _image_parts(batch.column(self.columns.image), self.columns.image)
        has_bytes = data.is_valid().to_pylist()
        texts = [batch.column(name).to_pylist() for name in self.columns.captions]
        nothing = [None] * len(batch)
        labels = batch.column(self.columns.label).to_pylist() if self.columns.label else nothing
        keys = batch.column(self.columns.key).to_pylist() if self.columns.key else nothing
        rows: list[tuple[str, str | None, list[str], str | None]] = []
        good = []
        for index, path in enumerate(paths):
            number = f"{self.prefix}{first + index:0{self.width}d}"
            place = self._place(path, has_bytes[index], keys[index], number)
            good.append(place is not None)
            if place is not None:
                caption = [text for column in texts for text in _listed(column[index])]
                captions = clean_captions(caption, place[0], self.skipped, self.notes)
                rows.append((*place, captions, self._label(labels[index])))
        # A filter copies the bytes, so it is only applied if rows are left out.
        data = data if all(good) else data.filter(pa.array(good))
        more = (
            self.metadata.read(batch).filter(pa.array(good, pa.bool_())) if self.metadata else None
        )
        return _assemble(data, rows, more, self.metadata_schema)

    def _place(
        self, path: str | None, has_bytes: bool, key: Any, number: str
    ) -> tuple[str, str | None] | None:
        """Key and absolute path of a row; None, and reported, if it has no usable image."""
        if has_bytes:
            return (number if key is None else clean_text(key), None)
        text = clean_text(path or "")
        reason = _refusal(text)
        if reason:
            name = text if 0 < len(text) <= _LONGEST_PATH else f"row {number}"
            self.skipped.append(Skipped(name, reason))
            return None
        return self.paths.locate(text)

    def _label(self, value: Any) -> str | None:
        if value is None:
            return None
        if self.columns.classes is not None and isinstance(value, int):
            return self.columns.classes[value] if value >= 0 else None
        return clean_text(value) or None


def _assemble(
    data: "pa.Array",
    rows: list[tuple[str, str | None, list[str], str | None]],
    more: "pa.Array | None",
    metadata: "pa.Schema | None",
) -> "pa.RecordBatch":
    import pyarrow as pa

    columns = schema(metadata)
    key, path, captions, label = zip(*rows, strict=True) if rows else ([], [], [], [])
    parts = [data, pa.array(path, pa.string())]
    image = pa.StructArray.from_arrays(parts, fields=list(columns.field("image").type))
    rest = [pa.array(captions, columns.field("captions").type), pa.array(label, pa.string())]
    rest += [] if more is None else [more]
    return pa.record_batch([pa.array(key, pa.string()), image, *rest], schema=columns)


def _refusal(text: str) -> str | None:
    if not text:
        return "names no image"
    if is_url(text):
        return "is a URL, not a file; download it first"
    if len(text) > _LONGEST_PATH:
        return "has neither a path nor an image in base64"
    if is_damaged(text):
        return "its path is not UTF-8"
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _image_parts(
    column: "pa.Array", name: str
) -> tuple["pa.Array", Iterator[str | None] | list[Any]]:
    """Bytes (binary array) and paths of an image column: a struct, raw bytes, or paths."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    nothing = pa.nulls(len(column), pa.binary())
    if pa.types.is_struct(kind):
        parts = {part.name: pc.struct_field(column, part.name) for part in kind}
        if "bytes" in parts or "path" in parts:
            path = parts["path"].to_pylist() if "path" in parts else [None] * len(column)
            return parts.get("bytes", nothing).cast(pa.binary()), path
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return _inline_images(column)
    if _holds_bytes(kind):
        return column.cast(pa.binary()), [None] * len(column)
    raise DataError(
        f"the column {name!r} holds {kind}, expected paths, or images as the bytes of JPEG or PNG "
        "files; store such bytes, or choose another column with --image-column (image=)"
    )


def _inline_images(column: "pa.Array") -> tuple["pa.Array", list[Any]]:
    """The same for a column of strings: paths, or images in base64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = column.to_pylist()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.binary()), texts
    inline = pc.match_substring_regex(column, INLINE)
    if not pc.any(inline).as_py():
        return pa.nulls(len(column), pa.binary()), texts
    data = [decode_inline(text.strip()) if text else None for text in texts]
    paths = [None if found is not None else text for text, found in zip(texts, data, strict=True)]
    return pa.array(data, pa.binary()), paths
