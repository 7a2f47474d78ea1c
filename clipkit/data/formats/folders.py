"""Folders of images, on disk or zipped: with sidecar captions, by class, or plain."""

import os
import posixpath
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.artifacts import is_complete, read_manifest
from clipkit.data.formats.huggingface import is_saved
from clipkit.data.formats.sidecars import ENDINGS, SIDECAR_LIMIT, Texts, is_usual, read_texts
from clipkit.data.formats.tables import TABLES, open_table
from clipkit.data.formats.webdataset import IMAGE_LIMIT, is_tar
from clipkit.data.images import SUFFIXES, Skipped, is_image, is_junk, is_utf8, list_files, printable
from clipkit.data.rows import Position, Row, Rows, Stream
from clipkit.data.source import (
    Notes,
    RowDict,
    Skips,
    Source,
    Wanted,
    fingerprint_of,
    in_memory,
    to_batches,
)
from clipkit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


FOLDER_KINDS = ("sidecars", "classes", "folder")
SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")
)
"""Names of folders that part a dataset into splits and are not labels, in lower case."""

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MAX_TABLES = 8  # beside images; more are hardly about all of them
_ROWS = 20  # of a table beside images that are looked up to see if it is about them
_CHUNK = 16  # rows of a zip archive held at a time, with their images
_SHOWN = 8  # endings in a note
_HINT = "; captions are read from a.txt, a.caption or a.json in the folder of a.jpg"
ZIP_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, zlib.error)
"""What reading a damaged or missing file, in a zip archive or not, raises."""


@dataclass(frozen=True)
class _Sorted:
    """What is in a folder or zip archive.

    Attributes:
        kind: one of ``FOLDER_KINDS``.
        images: keys.
        sidecars: keys of sidecars, by the key of their image.
        labels: by the key of the image.
        unused: keys of all other files.
    """

    kind: str
    images: Sequence[str]
    sidecars: dict[str, list[str]]
    labels: dict[str, str]
    unused: list[str]

    @classmethod
    def of(cls, images: Sequence[str], others: Iterable[str], top: str = "") -> "_Sorted":
        """Find the sidecars of images, or else their labels in the folders below ``top``."""
        stems: dict[str, list[str]] = {}
        for key in images:
            stems.setdefault(posixpath.splitext(key)[0], []).append(key)
        known = set(images)
        sidecars: dict[str, list[str]] = {}
        unused = []
        for key in others:
            owners = _owners(key, known, stems)
            for owner in owners:
                sidecars.setdefault(owner, []).append(key)
            if not owners:
                unused.append(key)
        labels = {} if sidecars else _class_folders(images, top)
        kind = "sidecars" if sidecars else "classes" if labels else "folder"
        return cls(kind, images, sidecars, labels, unused)


@dataclass(frozen=True)
class Shards:
    """A folder that consists of tars, zip archives or tables.

    Attributes:
        files: of one kind, in order.
        unused: keys of all other files.
    """

    files: list[Path]
    unused: list[str]


def _owners(key: str, images: set[str], stems: Mapping[str, list[str]]) -> list[str]:
    """The images that a file is a sidecar of."""
    stem, ending = posixpath.splitext(key)
    if ending[1:].lower() not in ENDINGS:
        return []
    if stem in images:  # a.jpg.txt, or of an image without an ending
        return [stem]
    if stem not in stems:  # a.0.txt, a.caption.txt
        stem, between = posixpath.splitext(stem)
        if not between or not is_usual(between[1:]):
            return []
    return stems.get(stem, [])


def _class_folders(images: Sequence[str], top: str) -> dict[str, str]:
    """Labels: the first-level folders, or the second-level ones if the first are splits."""
    parts = {key: key.removeprefix(top).split("/") for key in images}
    level = int(bool(images) and all(part[0].lower() in SPLITS for part in parts.values()))
    if any(len(part) < level + 2 for part in parts.values()):
        return {}
    return {key: part[level] for key, part in parts.items()}


def open_image(path: Path) -> Source:
    """A single image file as a source of one row."""
    row = _file_row(path.parent, path.name)
    prints = fingerprint_of([(path.name, path)])
    rows = in_memory(to_batches([row], 1), [])
    return Source(str(path), "image", rows, path.parent, prints, [])


def open_directory(path: Path, wanted: Wanted, streaming: bool | None) -> Source | Shards:
    """A folder as people have them; the tars, zip archives or tables in it if it has no images.

    Images are searched to any depth. Their captions are read from ``metadata.csv``, ``.jsonl`` or
    ``.parquet``, from sidecars (see ``sidecars``), or from the one table that names them, such as
    ``captions.csv``. Without captions, the first-level sub-folders are labels if every image is in
    one; those named like splits (``train``, ``val``) are not labels. Images without an ending are
    recognised by their content if there are no others. Files that are not used are counted in a
    note.

    Raises:
        DataError: there is no usable image, or two tables name the images.
    """
    tables = [name for name in _METADATA if (path / name).is_file()]
    if len(tables) > 1:
        raise DataError(_which_table(path, tables))
    found = list_files(path)
    if tables:
        table = open_table([path / tables[0]], wanted, True, kind="metadata")
        return _open_tables(path, {tables[0]: table}, found.images, found.others, streaming)
    images, skipped, notes = found.images, found.skipped, Notes()
    if not images:
        if is_complete(path):
            kind = read_manifest(path).kind
            raise DataError(f"{path} is a clipkit {kind}, expected images or a table of images")
        shards = _shards_among(path, found.others)
        if shards.files:
            return shards
        images = [key for key in found.others if _may_be_image(key) and is_image(path / key)]
    others = found.others if found.images else sorted(set(found.others).difference(images))
    content = _Sorted.of(images, others)
    if not content.sidecars and images:
        found_tables = _find_tables(path, content.unused, wanted, notes)
        if len(found_tables) > 1:
            raise DataError(_which_table(path, list(found_tables)))
        for name, table in found_tables.items():
            table.notes.extend(notes)
            table.notes.append(f"{path}: captions are read from {name}")
        found_tables = found_tables or _split_tables(path, content.unused, wanted)
        if found_tables:
            return _open_tables(path, found_tables, images, content.unused, streaming)
    if not images:
        raise DataError(_nothing_in(path, found.others, skipped))
    if not found.images:
        notes.append(f"{path}: {len(images)} images were recognised by their content")
    _note_splits(path, images, notes)
    return _open_content(path, content, wanted, skipped, notes)


def open_images(paths: Sequence[Path], root: Path, wanted: Wanted) -> Source:
    """Several image files and folders below ``root`` as one source, with keys relative to it.

    Raises:
        DataError: a path does not exist or is neither an image nor a folder.
    """
    keys: set[str] = set()
    others: set[str] = set()
    skipped: list[Skipped] = []
    for path in paths:
        place = path.relative_to(root).as_posix()
        if path.is_dir():
            below = "" if place == "." else f"{place}/"
            found = list_files(path)
            keys |= {below + key for key in found.images}
            others |= {below + key for key in found.others}
            skipped += [Skipped(below + item.key, item.reason) for item in found.skipped]
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            keys.add(place)
        else:
            what = "is not an image" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}; several DATA must be image files or folders of images")
    alone = {path.parent for path in paths if not path.is_dir()}
    beside = {
        file.relative_to(root).as_posix()
        for folder in alone
        for file in folder.iterdir()
        if file.suffix[1:].lower() in ENDINGS and file.is_file()
    }
    images = sorted(keys)
    content = _Sorted.of(images, sorted(others | beside))
    # What lies beside images that were named one by one was not asked for.
    unused = [key for key in content.unused if key in others]
    content = _Sorted(content.kind, images, content.sidecars, content.labels, unused)
    return _open_content(root, content, wanted, skipped, Notes())


def texts_without_image(root: Path) -> list[str]:
    """Text files that lie among images like captions, with no image of their name beside them."""
    found = list_files(root)
    folders = {posixpath.dirname(key) for key in found.images}
    unused = _Sorted.of(found.images, found.others).unused
    return [
        key
        for key in unused
        if key.lower().endswith((".txt", ".caption")) and posixpath.dirname(key) in folders
    ]


def _open_content(
    root: Path, content: _Sorted, wanted: Wanted, skipped: list[Skipped], notes: list[str]
) -> Source:
    def sidecar_bytes(key: str) -> bytes:
        file = root / key
        size = file.stat().st_size
        if size > SIDECAR_LIMIT:
            raise ValueError(f"it has {size} bytes, over {SIDECAR_LIMIT}")
        return file.read_bytes()

    texts = _TextReader(sidecar_bytes, wanted, skipped, notes)
    rows = (_file_row(root, key, texts.of(key, content)) for key in content.images)
    files = [(key, root / key) for key in content.images]
    files += [
        (f"{key}{posixpath.splitext(sidecar)[1]}", root / sidecar)
        for key, sidecars in content.sidecars.items()
        for sidecar in sidecars
    ]
    prints = fingerprint_of(files, content.kind)
    table = in_memory(to_batches(rows, 4096), skipped)
    texts.finish(str(root), content.unused)
    return Source(str(root), content.kind, table, root, prints, skipped, notes)


class _TextReader:
    """Reads the sidecars of images; counts those that say nothing."""

    def __init__(
        self,
        read: Callable[[str], bytes],
        wanted: Wanted,
        skipped: list[Skipped],
        notes: list[str],
        prefix: str = "",
    ) -> None:
        self._read, self._wanted, self._skipped, self._notes = read, wanted, skipped, notes
        self._prefix = prefix
        self._captions = self._blank = 0
        self._fields: list[str] = []

    def of(self, key: str, content: _Sorted) -> Texts:
        """Captions and label of an image; what cannot be read is skipped, but not the image."""
        sidecars = content.sidecars.get(key, [])
        key, texts = self._prefix + key, []
        for sidecar in sidecars:
            try:
                texts.append((posixpath.splitext(sidecar)[1][1:].lower(), self._read(sidecar)))
            except ZIP_DAMAGE as error:
                why = getattr(error, "strerror", None) or error
                self._skipped.append(Skipped(key, f"its sidecar cannot be read: {why}"))
        found = read_texts(texts, key, self._wanted, self._skipped, self._notes)
        self._captions += len(found.captions)
        if self._wanted.caption != "":
            self._blank += bool(sidecars and not found.captions and found.label is None)
        self._fields = self._fields or list(found.fields)
        label = content.labels.get(key[len(self._prefix) :]) if found.label is None else found.label
        return Texts(found.captions, label, found.fields)

    def _seeks(self) -> bool:
        """Whether captions are wanted and none was found."""
        return not self._captions and self._wanted.caption != ""

    def finish(self, where: str, unused: Sequence[str]) -> None:
        """After the last image, say what was not used and which sidecars hold nothing."""
        note_unused(where, unused, self._notes, _HINT if self._seeks() else "")
        if self._blank:
            names = (
                f"; the fields of the JSON are {', '.join(self._fields)}" if self._fields else ""
            )
            self._notes.append(
                f"{where}: the sidecars of {self._blank} images hold no caption{names}"
            )


def _file_row(root: Path, key: str, texts: Texts | None = None) -> RowDict:
    captions, label = (texts.captions, texts.label) if texts else ([], None)
    image = {"bytes": None, "path": str(root / key)}
    return {"key": key, "image": image, "captions": captions, "label": label}


def note_unused(where: str, unused: Sequence[str], notes: list[str], hint: str = "") -> None:
    """Count the files that were not used, with a hint if they may hold captions."""
    if unused:
        endings = Counter(posixpath.splitext(key)[1].lower() or "without ending" for key in unused)
        shown = [f"{count} {ending}" for ending, count in endings.most_common(_SHOWN)]
        more = ", …" if len(endings) > _SHOWN else ""
        hint = hint if any(f".{ending}" in endings for ending in ENDINGS) else ""
        notes.append(f"{where}: files that were not used: {', '.join(shown)}{more}{hint}")


def _note_splits(path: Path, images: Sequence[str], notes: list[str]) -> None:
    splits = Counter(key.partition("/")[0] for key in images)
    if len(splits) > 1 and all(name.lower() in SPLITS for name in splits):
        shown = ", ".join(f"{name} ({count} images)" for name, count in splits.items())
        notes.append(
            f"{path}: all splits are read, {shown}; name one as {path}:{next(iter(splits))}"
        )


def _which_table(path: Path, names: Sequence[str]) -> str:
    shown, suffixes = " and ".join(names), {Path(name).suffix for name in names}
    all_of_them = f", or all, as '{path}/*{suffixes.pop()}'" if len(suffixes) == 1 else ""
    return (
        f"{path} holds several tables of its images, {shown}; name one, as {path / names[0]}"
        f"{all_of_them}"
    )


def _find_tables(
    path: Path, unused: Sequence[str], wanted: Wanted, notes: list[str]
) -> dict[str, Source]:
    """The tables at the top of a folder whose first rows name images that exist, by name."""
    names = [key for key in unused if "/" not in key and _may_be_table(key)]
    tables = {}
    for name in names if len(names) <= _MAX_TABLES else ():
        try:
            table = open_table([path / name], wanted, True, kind="metadata")
            batch = next(table.stream.batches(), None)
        except DataError as error:
            notes.append(f"{error} (the file is not used as a table of the images beside it)")
            continue
        first = [] if batch is None else _paths(batch)[:_ROWS]
        if any(file and os.path.isfile(file) for file in first):
            tables[name] = table
    return tables


def _may_be_table(key: str) -> bool:
    name = key.lower()
    if posixpath.splitext(name)[1] not in TABLES:
        return False
    return not name.endswith(".txt") or "caption" in name or name.endswith(".token.txt")


def _split_tables(path: Path, unused: Sequence[str], wanted: Wanted) -> dict[str, Source]:
    """The metadata tables of sub-folders, by their keys."""
    return {
        key: open_table([path / key], wanted, True, kind="metadata")
        for key in unused
        if key.count("/") == 1 and posixpath.basename(key) in _METADATA
    }


def _open_tables(
    path: Path,
    tables: Mapping[str, Source],
    images: Sequence[str],
    others: Sequence[str],
    streaming: bool | None,
) -> Source:
    """A folder with a table of its images, or with one in each sub-folder, as one source.

    Args:
        path: the folder.
        tables: opened as streams, by the keys of their files.
        images, others: keys of the images and of the other files in the folder.
        streaming: of a single table.

    Raises:
        DataError: the tables have different columns.
    """
    import pyarrow as pa

    first, joined = next(iter(tables.values())), len(tables) > 1
    roots = [table.root or path for table in tables.values()]
    # Keys are those that the images have without a table, unless they are not in the folder.
    root = path if all(one.is_relative_to(path) for one in roots) else roots[0]
    if streaming and not joined:
        prefix = os.path.relpath(roots[0], root)
        keyed = first.stream if prefix == "." else first.stream.map(partial(_prefixed_row, prefix))
        return replace(first, rows=keyed, root=root)
    skipped, notes = first.skipped, first.notes
    batches: list[pa.RecordBatch] = []
    named: set[str | None] = set()
    for file, table in tables.items():
        prefix = os.path.relpath(table.root or path, root)
        for batch in table.stream.batches():
            named.update(_paths(batch))
            batches.append(_prefixed(batch, prefix))
            if batch.schema != batches[0].schema:
                raise DataError(
                    f"{path / file} and {path / next(iter(tables))} have different columns; open "
                    f"the sub-folders one by one, as {path}:{posixpath.dirname(file)}"
                )
        if table is not first:
            for item in table.skipped:
                skipped.append(item)
            notes.extend(table.notes)  # they are printed already
    schema = batches[0].schema if batches else None
    metadata = None
    if schema is not None and "metadata" in schema.names:
        metadata = pa.schema(list(schema.field("metadata").type))
    prints = fingerprint_of([], [table.fingerprint for table in tables.values()])
    prints = prints if joined else first.fingerprint
    rows = in_memory(batches, skipped, metadata)
    rest = [key for key in images if str(path / key) not in named]
    if rest:
        names = " and ".join(tables)
        notes.append(
            f"{path}: {len(rest)} images are not in {names} and were not used, such as "
            f"{printable(rest[0])}"
        )
    note_unused(str(path), [key for key in others if key not in tables], notes)
    if joined:
        _note_splits(path, images, notes)
    return Source(str(path), "metadata", rows, root, prints, skipped, notes)


def _paths(batch: "pa.RecordBatch") -> list[str | None]:
    paths: list[str | None] = batch.column("image").field("path").to_pylist()
    return paths


def _prefixed_row(prefix: str, row: Row) -> Row:
    return replace(row, key=f"{prefix}/{row.key}")


def _prefixed(batch: "pa.RecordBatch", prefix: str) -> "pa.RecordBatch":
    import pyarrow as pa

    if prefix == ".":
        return batch
    keys = [f"{prefix}/{key}" for key in batch.column("key").to_pylist()]
    return batch.set_column(batch.schema.get_field_index("key"), "key", pa.array(keys, pa.string()))


def split_folder(text: str) -> str | None:
    """The path of ``train`` in ``FOLDER:train``; None if there is no such folder."""
    stem, _, split = text.rpartition(":")
    if not stem or not split or "/" in split or os.path.exists(text) or is_saved(Path(stem)):
        return None
    folder = os.path.join(stem, split)
    return folder if os.path.isdir(folder) else None


def find_shards(path: Path) -> list[Path]:
    """The tars, zip archives or tables that a folder without images consists of.

    Raises:
        DataError: they are of several kinds, or those of several splits.
    """
    return _shards_among(path, list_files(path).others).files


def split_shard(key: str, shards: Collection[str]) -> tuple[str, str]:
    """The shard that a key begins with, and the rest; empty if there is no such shard."""
    slashes = (place for place, letter in enumerate(key) if letter == "/")
    shard = next((key[:place] for place in slashes if key[:place] in shards), "")
    return shard, key[len(shard) + 1 :] if shard else ""


def _shards_among(path: Path, keys: Sequence[str]) -> Shards:
    forms: dict[str, list[str]] = {}
    for key in keys:
        if form := _container(key):
            forms.setdefault(form, []).append(key)
    if not forms:
        return Shards([], list(keys))
    # img2dataset writes a Parquet file and a JSON file beside each tar.
    form = next((form for form in ("tar", "zip") if form in forms), next(iter(forms)))
    if form not in ("tar", "zip") and len(forms) > 1:
        names = " and ".join(f"{len(keys)} {form}" for form, keys in forms.items())
        raise DataError(
            f"{path} holds no images but tables of several kinds, {names}; name those to read, as "
            f"'{path / '*'}{posixpath.splitext(forms[form][0])[1]}'"
        )
    shards = forms[form]
    splits = {_split_of(key) for key in shards}
    if len(splits) > 1 and "" not in splits:
        first = next(key for key in shards)
        one = f"{path}:{first.partition('/')[0]}" if "/" in first else _pattern(path / first)
        raise DataError(f"{path} holds the splits {', '.join(sorted(splits))}; name one, as {one}")
    unused = set(keys).difference(shards)
    return Shards([path / key for key in shards], sorted(unused))


def _container(key: str) -> str | None:
    suffix = posixpath.splitext(key)[1].lower()
    if is_tar(key):
        return "tar"
    if suffix == ".zip":
        return "zip"
    # A text file is a table only if someone says so, and JSON mostly describes other files.
    return TABLES.get(suffix) if suffix not in (".txt", ".json") else None


def _split_of(key: str) -> str:
    """The split that a file belongs to, by its folder or the first word of its name; or ''."""
    folder, slash, _ = key.partition("/")
    word = folder if slash else posixpath.splitext(key)[0].replace("_", "-").partition("-")[0]
    return word if word.lower() in SPLITS else ""


def _pattern(file: Path) -> str:
    word = file.name.replace("_", "-").partition("-")[0]
    return f"'{file.with_name(file.name[: len(word)])}*{file.suffix}'"


def _may_be_image(key: str) -> bool:
    return not _container(key) and posixpath.splitext(key)[1][1:].lower() not in ENDINGS


def _nothing_in(root: Path, others: Sequence[str], skipped: list[Skipped]) -> str:
    expected = "expected a folder of images, of tars, of zip archives or of tables"
    if skipped:
        first = f"{skipped[0].key} {skipped[0].reason}"
        return f"{root} holds no image that can be used ({first}, and {len(skipped) - 1} more)"
    if others:
        shown = ", ".join(map(printable, others[:3]))
        return f"{root} holds {len(others)} files but no images ({shown}), {expected}"
    return f"{root} holds no images, {expected}"


def open_zips(files: list[Path], wanted: Wanted, streaming: bool | None) -> Source:
    """Zip archives of images, read as folders are, but one image at a time.

    Nothing is unpacked to disk. Keys are ``NAME.zip/PATH``. As archives can be read in any order,
    a pass resumes anywhere at once.

    Raises:
        DataError: an archive is damaged, encrypted, or holds no image.
    """
    root = Path(os.path.commonpath([file.parent for file in files]))
    skipped, notes = Skips(), Notes()
    prints = fingerprint_of([(file.name, file) for file in files], "zip", wanted)

    def read(file: Path, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
        prefix = f"{file.relative_to(root).as_posix()}/"
        try:
            with Zip(file) as archive:
                for key, reason in archive.skipped:
                    skipped.append(Skipped(prefix + key, reason))
                content = _Sorted.of(archive.images, archive.others, _top(archive.images))
                texts = _TextReader(
                    partial(archive.read, limit=SIDECAR_LIMIT), wanted, skipped, notes, prefix
                )
                start = at or 0
                for first in range(start, len(content.images), _CHUNK):
                    keys = content.images[first : first + _CHUNK]
                    rows = _zip_rows(archive, keys, content, texts, skipped, prefix)
                    if rows:
                        [batch] = to_batches(rows, _CHUNK)
                        yield batch, first + len(keys)
                if not start:
                    texts.finish(str(file), content.unused)
                    if any(map(_may_be_table, content.unused)):
                        notes.append(f"{file}: tables in archives are not read; unpack it first")
        except ZIP_DAMAGE as error:
            skipped.append(Skipped(prefix[:-1], f"is damaged or missing: {error}"))

    stream = Stream(read, files)
    rows: Rows = in_memory(stream.batches(), skipped) if streaming is False else stream
    return Source(str(files[0]), "zip", rows, root, prints, skipped, notes)


def _top(keys: Sequence[str]) -> str:
    """The folder that an archive was made of, with its slash; '' if there are several."""
    tops = {key.partition("/")[0] for key in keys if "/" in key}
    flat = any("/" not in key for key in keys)
    return f"{tops.pop()}/" if len(tops) == 1 and not flat else ""


def _zip_rows(
    archive: "Zip",
    keys: Sequence[str],
    content: _Sorted,
    texts: _TextReader,
    skipped: list[Skipped],
    prefix: str,
) -> list[RowDict]:
    rows: list[RowDict] = []
    for key in keys:
        try:
            data = archive.read(key)
        except ZIP_DAMAGE as error:
            skipped.append(Skipped(prefix + key, f"cannot be read: {error}"))
            continue
        found = texts.of(key, content)
        image = {"bytes": data, "path": None}
        row = {"captions": found.captions, "label": found.label}
        rows.append({"key": prefix + key, "image": image, **row})
    return rows


class Zip:
    """The files in a zip archive, by their keys: relative paths that stay within the archive.

    Attributes:
        images, others: sorted keys.
        skipped: names and reasons of files that cannot be used.

    Raises:
        DataError: it is encrypted.
        OSError, ValueError, zipfile.BadZipFile: it is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        self._archive = zipfile.ZipFile(file)
        self._files: dict[str, zipfile.ZipInfo] = {}
        self.skipped: list[tuple[str, str]] = []
        encrypted = 0
        for info in self._archive.infolist():
            name = _zip_name(info)
            key = posixpath.normpath(name)
            if info.is_dir() or is_junk(key):
                continue
            if key.startswith(("/", "../")) or not is_utf8(key):
                self.skipped.append((printable(name), "has a path that leads out of the archive"))
            elif key in self._files:
                self.skipped.append((key, "repeats the name of an earlier file in the archive"))
            elif info.flag_bits & 1:
                encrypted += 1
                self.skipped.append((key, "is encrypted; unpack the archive with its password"))
            else:
                self._files[key] = info
        by_kind: tuple[list[str], list[str]] = ([], [])
        for key in sorted(self._files):
            by_kind[posixpath.splitext(key)[1].lower() not in SUFFIXES].append(key)
        self.images, self.others = by_kind
        if encrypted and not self.images:
            self._archive.close()
            raise DataError(f"{file} is encrypted; unpack it with its password first")

    def __enter__(self) -> "Zip":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def has_image(self, key: str) -> bool:
        """Whether there is an image of this key."""
        return key in self._files and posixpath.splitext(key)[1].lower() in SUFFIXES

    def read(self, key: str, limit: int | None = None) -> bytes:
        """The content of a file, an image unless ``limit`` is given; raises ZIP_DAMAGE."""
        info = self._files[key]
        limit = IMAGE_LIMIT if limit is None else limit
        if info.file_size > limit:
            raise ValueError(f"it has {info.file_size} bytes, over {limit}")
        with self._archive.open(info) as stream:
            return stream.read(limit)  # not more than the archive says it has


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name of a file; without the flag for UTF-8, macOS writes UTF-8 all the same."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
