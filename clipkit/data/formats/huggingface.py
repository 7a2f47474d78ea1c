"""Datasets as the ``datasets`` library has them: on the hub, saved to disk, or in memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.data.formats.columns import Common
from clipkit.data.formats.image_paths import find_image_paths
from clipkit.data.formats.pairs import is_image, stored_image
from clipkit.data.formats.tables import columns_of
from clipkit.data.rows import Position, Stream
from clipkit.data.source import Notes, Skips, Source, Wanted, fingerprint_of, in_memory
from clipkit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset


HUB = "hf:"
_CHUNK = 64  # rows of a stream held at a time, images and all
_ROWS = 1000  # rows of a saved dataset read at a time, as many as it writes in one batch


def is_saved(path: Path) -> bool:
    """Whether a directory was written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_saved(path: Path, split: str | None, wanted: Wanted, streaming: bool | None) -> Source:
    """Open a directory written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``.

    Raises:
        DataError: damaged, or the split is not there, or several are and none was named.
    """
    from datasets import Dataset, load_from_disk

    try:
        with _no_bars():
            rows = load_from_disk(str(path))
    # Damaged directories raise FileNotFoundError, JSON, Arrow, key and type errors alike.
    except Exception as error:
        raise DataError(f"{path} is not an intact saved dataset: {_line(error)}") from error
    if isinstance(rows, Dataset):
        if split is not None:
            raise DataError(f"{path} holds no splits, but {split!r} was asked for; leave it out")
    else:
        names = ", ".join(rows)
        if split is None and len(rows) != 1:
            raise DataError(
                f"{path} holds the splits {names}; name one, as {path}:{next(iter(rows))}"
            )
        if split is not None and split not in rows:
            raise DataError(f"{path} holds no split {split!r}, it has: {names}")
        rows = rows[split or next(iter(rows))]
    return _common(
        rows, f"{path}:{split}" if split else str(path), "saved", path, wanted, streaming
    )


def open_hub(spec: str, wanted: Wanted, streaming: bool | None) -> Source:
    """Open ``hf:org/name``, ``hf:org/name:split`` or ``hf:org/name/config:split``; split train.

    Raises:
        DataError: out of reach, or not there.
    """
    from datasets import load_dataset

    name, _, split = spec.removeprefix(HUB).partition(":")
    owner, _, rest = name.partition("/")
    title, _, config = rest.partition("/")
    try:
        with _no_bars():
            rows = load_dataset(
                f"{owner}/{title}" if title else owner,
                config or None,
                split=split or "train",
                streaming=bool(streaming),
            )
    # Which error stands for "no network" or "no such set" depends on the versions of three
    # libraries below.
    except Exception as error:
        raise DataError(
            f"{spec} cannot be loaded ({_line(error)}); check its name and split, and the network: "
            "without one only a dataset in the local cache can be opened"
        ) from error
    return _common(rows, spec, "hub", None, wanted, streaming)


def is_in_memory(data: Any) -> bool:
    """Whether this is a ``datasets`` dataset, an Arrow table or a pandas data frame."""
    return any(_is(data, *kind) for kind in _IN_MEMORY)


def open_in_memory(data: Any, wanted: Wanted, streaming: bool | None) -> Source:
    """Open a ``datasets`` dataset, an Arrow table or a pandas data frame.

    Columns are found as in other tables. An image column holds paths, encoded images or, in a data
    frame, PIL images and arrays as well.

    Raises:
        DataError: a column that is needed is missing, or several splits were given.
        TypeError: an image in a data frame has the wrong type.
    """
    import pyarrow as pa
    from datasets import Dataset

    spec = type(data).__name__
    if _is(data, "datasets", "DatasetDict") or _is(data, "datasets", "IterableDatasetDict"):
        names = ", ".join(data)
        raise DataError(f"the {spec} has the splits {names}, expected one of them; pass data[…]")
    if _is(data, "pandas", "DataFrame"):
        columns = {str(name): data[name] for name in data.columns}
        data = pa.Table.from_pandas(
            data.assign(**{name: _stored(values) for name, values in columns.items()}),
            preserve_index=False,
        ).replace_schema_metadata(None)
    if isinstance(data, pa.Table):
        data = Dataset(data)
    return _common(data, spec, "dataset", None, wanted, streaming)


_IN_MEMORY = (
    ("datasets", "Dataset"),
    ("datasets", "IterableDataset"),
    ("datasets", "DatasetDict"),
    ("datasets", "IterableDatasetDict"),
    ("pyarrow", "Table"),
    ("pandas", "DataFrame"),
)


def _is(data: Any, module: str, name: str) -> bool:
    """Whether an object is of a class whose module need not be imported for that."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and isinstance(data, known)


def _stored(values: Any) -> Any:
    """A column of a data frame, its images in memory as rows store them."""
    items = list(values)
    if not any(is_image(item) for item in items):
        return values
    return [stored_image(item, number) for number, item in enumerate(items)]


def _common(
    rows: "Dataset | IterableDataset",
    spec: str,
    kind: str,
    root: Path | None,
    wanted: Wanted,
    streaming: bool | None,
) -> Source:
    from datasets import Dataset, Image

    held = isinstance(rows, Dataset)
    known = rows.features or rows.take(1)._resolve_features().features
    if not held:
        for name, feature in known.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(name, Image(decode=False))
    notes = Notes()
    columns = columns_of(known.arrow_schema, wanted, spec, notes)
    types = {part.name: part.type for part in known.arrow_schema}
    more = columns.metadata([types], spec, notes) if wanted.metadata else None
    width = len(str(max(len(rows) - 1, 0))) if held else 8
    paths = find_image_paths((), root or Path.cwd(), wanted.image_root, notes)
    common = Common(columns, paths, Skips(), width, metadata=more, notes=notes)
    rows = rows.select_columns(common.used).with_format("arrow")

    def read(shard: int, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
        if held:
            end = at or 0
            for first in range(end, len(rows), _ROWS):
                for batch in rows[first : first + _ROWS].to_batches():
                    end += len(batch)
                    yield common.batch(batch, end - len(batch)), end
            return
        state, first = at or (None, 0)
        part = rows.shard(shard_count, shard)
        if hasattr(part, "reshard"):
            part = part.reshard()  # a Parquet file can be begun at any of its row groups
        if state:
            part.load_state_dict(state)
        own = replace(common, prefix=f"{shard:05d}-")
        for table in part.iter(_CHUNK):
            [batch] = table.combine_chunks().to_batches()
            after = [part.state_dict(), first + len(batch)]
            yield own.batch(batch, first), after
            first += len(batch)

    shard_count = 1 if held else rows.num_shards
    prints = fingerprint_of([], spec if not held else rows._fingerprint, wanted)
    result: Any = Stream(read, list(range(shard_count)))
    if held and not streaming:
        result = in_memory(result.batches(), common.skipped, common.metadata_schema)
    return Source(spec, kind, result, root, prints, common.skipped, common.notes)


@contextmanager
def _no_bars() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
