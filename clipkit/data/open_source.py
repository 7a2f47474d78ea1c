"""Open a source of images and captions by its name, whatever its form."""

import os
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from glob import glob
from pathlib import Path

from clipkit.data.formats.folders import FOLDER_KINDS, open_folder, open_image, open_images
from clipkit.data.formats.huggingface import HUB, is_saved, open_hub, open_saved
from clipkit.data.formats.tables import TABLES, open_table
from clipkit.data.formats.webdataset import expand, open_tars
from clipkit.data.images import SUFFIXES, is_utf8, printable
from clipkit.data.source import Row, Source, Wanted, no_captions, row_image, row_record, row_source
from clipkit.data.streaming import table_stream
from clipkit.errors import DataError

__all__ = ["Row", "Source", "no_captions", "open_source", "row_image", "row_record", "row_source"]


def open_source(
    spec: str | Path | Source | Sequence[str | Path],
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    streaming: bool | None = None,
    metadata: bool = False,
) -> Source:
    """Open images with their captions and labels.

    Args:
        spec: an image; a folder (with sidecar captions, with metadata.csv or metadata.jsonl, with
            one sub-folder per class, or plain); a CSV, TSV, JSON lines or Parquet table; WebDataset
            tars (``shards-{000..012}.tar`` or ``shards-*.tar``); ``hf:org/name:split``; a dataset
            saved to disk (``path`` or ``path:split``); several images and folders, as a list or a
            pattern (``photos/*.jpg``), with keys relative to their common folder. A Source is
            returned as it is.
        image: name of the column that holds images; found by the usual names where None.
        caption: name of the caption column; an empty name says there is none.
        label: name of the label column; an empty name says there is none.
        streaming: read in order instead of holding the rows; None streams tars, and tables of
            more than 2 GiB.
        metadata: keep a table's other columns of numbers, texts, truth values, days and times, for
            the records of what is made of the images.

    Raises:
        DataError: it does not exist, has no such form, lacks the columns, or holds no image.
    """
    if isinstance(spec, Source):
        return spec
    wanted = Wanted(image, caption, label, metadata)
    if not isinstance(spec, str | Path) and len(spec) == 1:
        (spec,) = spec
    if isinstance(spec, str | Path):
        text = os.fspath(spec)
        source = _open(text, wanted, streaming)
    else:
        text = ", ".join(map(str, spec[:3])) + (", …" if len(spec) > 3 else "")
        source = _open_several(spec)
    if streaming and not source.streaming:
        source = replace(source, rows=table_stream(source.rows))
    if not source.streaming and not len(source.rows):
        first = source.skipped[0] if source.skipped else None
        why = f"{first.key} {first.reason}" if first else "it has no rows"
        raise DataError(f"{text} holds no image that can be used: {why}")
    # Of several images and folders the common folder is the name that can be opened again.
    several = source.kind in FOLDER_KINDS and not os.path.isdir(text)
    return source if several else replace(source, spec=text)


def _open(text: str, wanted: Wanted, streaming: bool | None) -> Source:
    if text.startswith(HUB):
        return open_hub(text, wanted, streaming)
    if not is_utf8(os.path.abspath(text)):
        raise DataError(f"the path {printable(text)} is not UTF-8; rename it")
    path = Path(os.path.abspath(text))
    if path.is_dir():
        return _open_directory(path, wanted, streaming)
    files = find_files(path)
    if files:
        return _open_files(files, wanted, streaming)
    stem, _, split = str(path).rpartition(":")
    if stem and is_saved(Path(stem)):
        return open_saved(Path(stem), split, wanted, streaming)
    raise DataError(_nothing_there(text, path))


def _open_directory(path: Path, wanted: Wanted, streaming: bool | None) -> Source:
    if is_saved(path):
        return open_saved(path, None, wanted, streaming)
    for name in ("metadata.csv", "metadata.jsonl"):
        if (path / name).is_file():
            return open_table([path / name], wanted, streaming, kind="metadata")
    return open_folder(path)


def find_files(path: Path) -> list[Path]:
    """The files that a path with braces or stars means; none where there is none."""
    if path.exists():
        return [path]
    names = [name for one in expand(str(path)) for name in sorted(glob(one)) or [one]]
    # A shard that is missing among others is for the reader to tell.
    return [Path(name) for name in names] if any(map(os.path.exists, names)) else []


def _open_files(files: list[Path], wanted: Wanted, streaming: bool | None) -> Source:
    suffixes = sorted({file.suffix.lower() for file in files})
    suffix = suffixes[0]
    if len(suffixes) == 1:
        if suffix == ".tar":
            return open_tars(files, wanted, streaming)
        if suffix in TABLES:
            return open_table(files, wanted, streaming)
        if suffix in SUFFIXES and len(files) == 1:
            return open_image(files[0])
    if all(file.is_dir() or file.suffix.lower() in SUFFIXES for file in files):
        return open_images(files)
    raise DataError(
        f"{files[0]} has the form {' and '.join(suffixes) or 'of no suffix'}, expected one image, "
        f"a folder, .tar files, or a table ({', '.join(TABLES)})"
    )


def _open_several(specs: Sequence[str | Path]) -> Source:
    if not all(isinstance(spec, str | Path) for spec in specs):
        raise TypeError("expected a list of paths, found one of other things")
    if not specs:
        raise DataError("the list of data is empty, expected at least one path")
    files = []
    for spec in specs:
        path = Path(os.path.abspath(spec))
        files += find_files(path) or [path]
    return open_images(files)


def _nothing_there(text: str, path: Path) -> str:
    if any(sign in text for sign in "*?[") and path.parent.is_dir():
        return f"no file matches the pattern {text}"
    there, missing = path.parent, path.name
    while not there.is_dir():
        there, missing = there.parent, there.name
    close = get_close_matches(missing, [printable(name) for name in os.listdir(there)], 1)
    hint = f"did you mean {there / close[0]}" if close else f"{there} has no {missing}"
    return f"{text} does not exist ({hint}); a dataset of the hub is written hf:org/name:split"
