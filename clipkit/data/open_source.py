"""Open images with captions and labels, from paths, patterns or Python objects."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any

from clipkit.data.formats.folders import (
    FOLDER_KINDS,
    note_unused,
    open_directory,
    open_image,
    open_images,
    open_zips,
    split_folder,
)
from clipkit.data.formats.huggingface import (
    HUB,
    is_in_memory,
    is_saved,
    open_hub,
    open_in_memory,
    open_saved,
)
from clipkit.data.formats.pairs import is_image, open_pairs
from clipkit.data.formats.tables import TABLES, open_table
from clipkit.data.formats.webdataset import TAR_SUFFIXES, expand, is_tar, open_tars
from clipkit.data.images import SUFFIXES, is_utf8, printable
from clipkit.data.rows import Row
from clipkit.data.source import Data, Source, Wanted, mix, no_captions
from clipkit.errors import DataError

__all__ = ["Data", "Row", "Source", "no_captions", "open_source"]


def open_source(
    data: Data,
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    streaming: bool | None = None,
    metadata: bool = False,
    image_root: str | os.PathLike[str] | None = None,
    encoding: str | None = None,
) -> Source:
    """Open images with their captions and labels.

    Args:
        data: what to open.

            - An image, or a folder or zip archive of images: plain, with sidecar captions
              (``a.txt``, ``a.caption`` or ``a.json`` beside ``a.jpg``), or with one sub-folder per
              class.
            - A folder with a table of its images: ``metadata.csv``, ``.jsonl`` or ``.parquet``, or
              another table alone. ``path:train`` is its sub-folder ``train``.
            - A table: CSV, TSV, JSON lines, Parquet, or JSON (a list of objects, COCO captions, or
              Karpathy's splits as ``file.json:train``).
            - WebDataset tars, plain or compressed: ``shards-{000..012}.tar``.
            - A folder of tars, zip archives or tables.
            - ``hf:org/name:split``, or a dataset saved to disk (``path`` or ``path:split``).
            - A pattern (``photos/*.jpg``), or a list of paths and patterns. Those of different
              kinds become a mixture, and so does a list of Sources; ``a::b`` is a list, too.
            - In memory: a PIL image, a uint8 array [height, width, 3] or a torch tensor; a list of
              images or of ``(image, caption)`` pairs, or a map-style dataset of them, read once; a
              pandas data frame, an Arrow table or a ``datasets`` dataset, which are tables.
            - A Source, which is returned as it is.
        image: name of the image column; None looks for the usual names.
        caption: name of the caption column, with dots for a field of nested objects or lists
            (``sentences.raw``); "" ignores captions.
        label: name of the label column; "" ignores labels.
        streaming: read rows in order instead of holding them in memory; None streams tars,
            zip archives, and tables larger than 2 GiB.
        metadata: keep the other columns of a table that hold numbers, strings, booleans or dates.
        image_root: folder that the image paths of a table start from, which is also the root of
            keys; None is the folder of the table, or the one sub-folder that has the images.
        encoding: of a CSV or TSV table, by Python's name; None finds it: UTF-8, UTF-16, UTF-32 or
            cp1252.

    Raises:
        DataError: the data does not exist, has an unknown format, lacks a column, or holds no
            usable image.
        TypeError: the data or a column name has the wrong type.
    """
    for name, column in {"image": image, "caption": caption, "label": label}.items():
        if column is not None and not isinstance(column, str):
            raise TypeError(f"{name} is a {type(column).__name__}, expected the name of one column")
    if encoding is not None and not isinstance(encoding, str):
        raise TypeError(f"encoding is a {type(encoding).__name__}, expected a name such as cp1252")
    if isinstance(data, Source):
        return data
    if isinstance(data, list | tuple) and data and isinstance(data[0], Source):
        return mix([_source(item) for item in data])
    root = None if image_root is None else os.fspath(image_root)
    wanted = Wanted(image, caption, label, metadata, root, encoding)
    source, spec = _open_data(data, wanted, streaming)
    if root is not None and source.kind in {*FOLDER_KINDS, "tars", "zip"} - {"metadata"}:
        source.notes.append(f"{source.spec} is not a table, so the image root is not used")
    if encoding is not None and source.kind not in ("csv", "metadata", "mixture"):
        source.notes.append(f"{source.spec} is not a CSV table, so the encoding is not used")
    if streaming and not source.streaming:
        source = replace(source, rows=source.table.stream())
    named = {"image": image, "caption": caption, "label": label, "encoding": encoding}
    source = replace(source, columns={n: c for n, c in named.items() if c is not None})
    if next(iter(source.rows), None) is None:
        skipped = source.skipped[0] if source.skipped else None
        why = f"{skipped.key} {skipped.reason}" if skipped else "it has no rows"
        raise DataError(f"{spec} holds no image that can be used: {why}")
    if source.parts:
        return source
    if source.kind in FOLDER_KINDS and not os.path.isdir(spec):
        return source  # several images: their common folder is a path that can be opened again
    return replace(source, spec=spec)


def _open_data(data: Any, wanted: Wanted, streaming: bool | None) -> tuple[Source, str]:
    """The source, and what names it."""
    if is_in_memory(data):
        source = open_in_memory(data, wanted, streaming)
        return source, source.spec
    paths, items = _paths_or_items(data)
    paths = [split_folder(part) or part for path in paths for part in split_data(path)]
    if len(paths) == 1:
        return _open(paths[0], wanted, streaming), paths[0]
    source = _open_several(paths, wanted, streaming) if paths else open_pairs(items)
    return source, source.spec


def _paths_or_items(data: Any) -> tuple[list[str], Iterable[Any]]:
    """The paths and patterns that were given, or else the items in memory."""
    if isinstance(data, str | os.PathLike):
        return [os.fspath(data)], ()
    if is_image(data) and getattr(data, "ndim", 3) == 3:
        return [], [data]
    first, items = _peek(data)
    if isinstance(first, str | os.PathLike):
        return [_path(item) for item in items], ()
    return [], items


def _peek(data: Any) -> tuple[Any, Iterable[Any]]:
    """The first item of a sequence, map-style dataset or iterable, and all of its items."""
    items: Iterator[Any] | None = None
    if isinstance(data, Iterable) and not isinstance(data, bytes | Mapping):
        items = iter(data)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "keys"):
        # A map-style dataset need not raise IndexError at its end.
        items = (data[number] for number in range(len(data)))
    if items is None:
        raise TypeError(
            f"data is a {type(data).__name__}, expected a path, a list of paths, a Source, a data "
            "frame, or an iterable of images or (image, caption) pairs"
        )
    for first in items:
        return first, chain([first], items)
    raise DataError(
        f"the {type(data).__name__} yields no items; a generator can be read only once, so pass a "
        "new one or a list"
    )


def split_data(data: str) -> list[str]:
    """The parts of ``a::b``, open_clip's way to name several DATA; else the text itself."""
    return [data] if "::" not in data or os.path.exists(data) else data.split("::")


def _source(item: Any) -> Source:
    if isinstance(item, Source):
        return item
    raise TypeError(f"a list of sources holds a {type(item).__name__}, expected Source")


def _path(item: Any) -> str:
    if isinstance(item, str | os.PathLike):
        return str(item)
    raise TypeError(f"a list of paths holds a {type(item).__name__}, expected str or Path")


def _open_several(texts: Sequence[str], wanted: Wanted, streaming: bool | None) -> Source:
    named = [_absolute(text) for text in texts if not text.startswith(HUB)]
    found = [find_files(path) for path in named]
    places = list(dict.fromkeys(place for some in found for place in some))
    if len(named) == len(texts) and all(found) and _is_one_kind(places):
        return _open_files(places, wanted, streaming, named)
    return mix([_open(text, wanted, streaming) for text in texts])


def _is_one_kind(files: Sequence[Path]) -> bool:
    """Whether files and folders can be opened as one source that is not a mixture."""
    suffixes = {file.suffix.lower() for file in files}
    return (
        all(map(is_tar, files))
        or (len(suffixes) == 1 and suffixes <= {".zip", *TABLES})
        or all(file.is_dir() or file.suffix.lower() in SUFFIXES for file in files)
    )


def _absolute(text: str) -> Path:
    if not text:  # which would mean the current directory
        raise DataError("the path is empty, expected data such as a folder; write . for this one")
    path = os.path.abspath(text)
    if not is_utf8(path):
        raise DataError(f"the path {printable(text)} is not UTF-8; rename it")
    return Path(path)


def _open(text: str, wanted: Wanted, streaming: bool | None) -> Source:
    if text.startswith(HUB):
        return open_hub(text, wanted, streaming)
    path = _absolute(text)
    if path.is_dir():
        return _open_directory(path, wanted, streaming)
    files = find_files(path)
    if files:
        return _open_files(files, wanted, streaming, [path])
    stem, _, split = str(path).rpartition(":")
    if stem and is_saved(Path(stem)):
        return open_saved(Path(stem), split, wanted, streaming)
    if TABLES.get(Path(stem).suffix.lower()) in ("json", "jsonl") and os.path.isfile(stem):
        return open_table([Path(stem)], wanted, streaming, split=split)
    raise DataError(_nothing_there(text, path))


def _open_directory(path: Path, wanted: Wanted, streaming: bool | None) -> Source:
    if is_saved(path):
        return open_saved(path, None, wanted, streaming)
    found = open_directory(path, wanted, streaming)
    if isinstance(found, Source):
        return found
    source = _open_files(found.files, wanted, streaming, [path])
    note_unused(str(path), found.unused, source.notes)
    return source


def find_files(path: Path) -> list[Path]:
    """Expand braces and wildcards in a path; an empty list if nothing matches."""
    if path.exists():
        return [path]
    folder = _folder_of(path)
    pattern = str(path.relative_to(folder))
    names = [
        name for one in expand(pattern) for name in sorted(glob(one, root_dir=folder)) or [one]
    ]
    files = [folder / name for name in names]
    # The reader reports a shard that is missing among others.
    return files if any(map(os.path.exists, files)) else []


def _folder_of(path: Path) -> Path:
    """The folder that a path or pattern is in, whatever it matches; a folder is in itself."""
    while not path.is_dir():
        path = path.parent
    return path


def open_listed(root: Path, listed: Sequence[str], columns: Mapping[str, str]) -> Source:
    """Open images and folders again that a Source of ``root`` listed.

    Patterns are expanded again, and what no longer exists is left out.

    Raises:
        DataError: nothing is left.
    """
    found = [place for name in listed for place in find_files(root / name) if place.exists()]
    if not found:
        raise DataError(
            f"none of the {len(listed)} listed images, folders and patterns of {root} is left; "
            "restore them"
        )
    wanted = Wanted(caption=columns.get("caption"), label=columns.get("label"))
    source = open_images(list(dict.fromkeys(found)), root, wanted)
    return replace(source, listed=tuple(listed), columns=dict(columns))


def _open_files(
    files: list[Path], wanted: Wanted, streaming: bool | None, named: list[Path]
) -> Source:
    """Open the files and folders that paths and patterns name."""
    listed = () if len(named) == 1 and named[0].exists() else tuple(map(str, named))
    if all(map(is_tar, files)):
        return replace(open_tars(files, wanted, streaming), listed=listed)
    suffixes = sorted({file.suffix.lower() for file in files})
    suffix = suffixes[0]
    if len(suffixes) == 1:
        if suffix == ".zip":
            return replace(open_zips(files, wanted, streaming), listed=listed)
        if suffix in TABLES:
            return replace(open_table(files, wanted, streaming), listed=listed)
        if suffix in SUFFIXES and not listed:
            return open_image(files[0])
    if all(file.is_dir() or file.suffix.lower() in SUFFIXES for file in files):
        # The folder must not depend on what a pattern matches today.
        root = Path(os.path.commonpath([_folder_of(path) for path in named]))
        names = [path.relative_to(root).as_posix() for path in named]
        return replace(
            open_images(files, root, wanted), listed=() if "." in names else tuple(names)
        )
    raise DataError(
        f"{files[0]} has the form {' and '.join(suffixes) or 'of no suffix'}, expected images, "
        f"folders, .zip, tars ({', '.join(TAR_SUFFIXES)}), or a table ({', '.join(TABLES)})"
    )


def _nothing_there(text: str, path: Path) -> str:
    if has_magic(text):
        return f"no file matches the pattern {text}"
    there, missing = path.parent, path.name
    while not there.is_dir():
        there, missing = there.parent, there.name
    close = get_close_matches(missing, [printable(name) for name in os.listdir(there)], 1)
    hint = f"did you mean {there / close[0]}" if close else f"{there} has no {missing}"
    return f"{text} does not exist ({hint}); a dataset of the hub is written hf:org/name:split"
