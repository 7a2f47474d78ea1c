"""Data sets in the layout of CLIP_benchmark: WebDataset tars beside class names and templates."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from clipkit.data.labels import Label, literal_labels
from clipkit.data.open_source import Row, Source, open_source
from clipkit.errors import DataError
from clipkit.evaluation.report import Task

_SHARDS, _TYPE = "nshards.txt", "dataset_type.txt"
_CLASSES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
_LIMIT = 10 << 20  # bytes of a text file


@dataclass(frozen=True)
class Benchmark:
    """A data set and its task.

    Attributes:
        source: the images, with captions or with the names of their classes.
        task: ``"zero-shot"`` or ``"retrieval"``.
        labels: the classes; empty for a retrieval.
        templates: captions with a ``{}`` in place of the label; empty for a retrieval.
    """

    source: Source
    task: Task
    labels: list[Label]
    templates: list[str]


def is_benchmark(path: Path, split: str) -> bool:
    """Whether a directory has this layout: ``SPLIT/nshards.txt`` beside ``SPLIT/0.tar``, …"""
    return (path / split / _SHARDS).is_file()


def open_benchmark(path: Path, split: str) -> Benchmark:
    """Open a data set as ``clip_benchmark_export_wds`` writes it.

    Args:
        path: a directory with ``classnames.txt`` and ``zeroshot_classification_templates.txt``, or
            with ``retrieval`` in ``dataset_type.txt``.
        split: the split to open, a directory in it.

    Raises:
        DataError: a file is missing or invalid, or a shard is missing.
    """
    count = _text(path / split / _SHARDS).strip()
    if not count.isdigit() or not int(count):
        raise DataError(
            f"{path / split / _SHARDS} holds {count[:20]!r}, expected the number of tars"
        )
    shards = [path / split / f"{number}.tar" for number in range(int(count))]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]} does not exist, expected {count} tars according to {_SHARDS}; download "
            f"the missing {len(missing)}"
        )
    pattern = "0.tar" if len(shards) == 1 else f"{{0..{len(shards) - 1}}}.tar"
    source = open_source(path / split / pattern)
    kind = _text(path / _TYPE).strip().lower() if (path / _TYPE).is_file() else "classification"
    if kind == "retrieval":
        return Benchmark(source, "retrieval", [], [])
    if kind != "classification":
        raise DataError(f"{path / _TYPE} holds {kind[:40]!r}, expected retrieval or classification")
    labels = literal_labels(_lines(path / _CLASSES))
    templates = [line.replace("{c}", "{}") for line in _lines(path / _TEMPLATES)]
    named = source.rows.map(partial(_name_class, labels=labels, file=path / _CLASSES))
    return Benchmark(replace(source, rows=named), "zero-shot", labels, templates)


def _name_class(row: Row, labels: list[Label], file: Path) -> Row:
    label = row.label
    if label is None:
        return row
    if not label.isdigit() or int(label) >= len(labels):
        raise DataError(
            f"{row.key} has the class {label!r}, expected a number below {len(labels)}, the "
            f"number of classes in {file}"
        )
    return replace(row, label=str(labels[int(label)]))


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in _text(file).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{file} is empty, expected one entry per line")
    return lines


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LIMIT:
            raise DataError(f"{file} has more than {_LIMIT} bytes, expected a short text file")
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {file} ({error}), expected the layout of CLIP_benchmark's WebDatasets"
        ) from None
