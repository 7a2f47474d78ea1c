"""Fields of nested records by dotted names, as JSON and Parquet tables hold them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clipkit.data.captions import single, strings
from clipkit.data.formats.columns import CAPTION
from clipkit.data.source import RowDict

if TYPE_CHECKING:
    import pyarrow as pa

    from clipkit.data.formats.columns import Columns

_PLAIN = ("path", "file_name", "filename", "raw", "text", "caption", "value", "sentence")
"""Fields that stand for the object they are in, the first of them that it has."""
_TURNS = (("from", "value"), ("role", "content"))
"""Speaker and text of a conversation's turns: LLaVA's and ShareGPT's names, and OpenAI's."""
_ASSISTANT = ("gpt", "assistant", "model")
FIRST_IMAGE = "rows have several images in the column {column}; only the first of each is read"
_CAPTIONS = ("sentences", "conversations", "messages")
"""Lists of objects that hold captions where no field has a usual name for them."""


@dataclass(frozen=True)
class Nested:
    """The fields of objects within records, under names of their own.

    Attributes:
        paths: for each name the fields that lead to it: ``image.path`` is in ``image``, and lists
            on the way are followed into each of their objects.
        turns: conversations, with the names of their turns' speaker and text. Such a name stands
            for the first thing that the assistant says.
        objects: fields that hold nothing but objects, which ``flatten`` leaves out.
    """

    paths: dict[str, tuple[str, ...]]
    turns: dict[str, tuple[str, str]]
    objects: frozenset[str]

    @classmethod
    def find(cls, leaves: Iterable[tuple[str, ...]], notes: list[str]) -> "Nested":
        """Name the fields of records.

        A field that holds objects has the names of the fields within. Its own name stands for the
        one of them that is plainly meant, such as ``caption`` for ``caption.text``.

        Args:
            leaves: paths to the fields without any within.
            notes: takes the field that is read as captions though its name does not say so.
        """
        names = {".".join(path): path for path in leaves}
        paths = {name: path for name, path in names.items() if len(path) > 1}
        turns, within = dict[str, tuple[str, str]](), dict[str, list[str]]()
        for name, path in paths.items():
            within.setdefault(path[0], []).append(name)
        for name, inner in within.items():
            speech = next(
                (t for t in _TURNS if {f"{name}.{part}" for part in t} <= set(inner)), None
            )
            if speech:
                turns[name], paths[name] = speech, (name,)
                continue
            plain = [f"{name}.{part}" for part in _PLAIN if f"{name}.{part}" in inner]
            if plain or len(inner) == 1:
                paths[name] = paths[(plain or inner)[0]]
        if not any(name.strip().lower() in CAPTION for name in [*names, *paths]):
            found = next((name for name in _CAPTIONS if name in paths), None)
            if found:
                what = "the first answer in" if found in turns else "in"
                notes.append(f"captions are {what} the field {'.'.join(paths[found])}")
                paths["caption"] = paths[found]
                if found in turns:
                    turns["caption"] = turns[found]
        return cls(paths, turns, frozenset(within.keys() - names))

    def only(self, names: Iterable[str]) -> "Nested":
        """These names alone."""
        return replace(self, paths={name: self.paths[name] for name in names if name in self.paths})

    def flatten(self, record: RowDict) -> RowDict:
        """The record with a value for each of the names; None where it has none."""
        if not self.paths and not self.objects:
            return record
        found = {name: self.value(record, name) for name in self.paths}
        record = {name: v for name, v in record.items() if name not in self.objects}
        # Some records may have a plain value where others have an object.
        plain = {name: record.get(name) for name, value in found.items() if not strings(value)}
        return record | found | {n: v for n, v in plain.items() if not _objects_in(v)}

    def value(self, record: RowDict, name: str) -> Any:
        """The value of one of the names."""
        value = _follow(record, self.paths[name])
        return _answer(value, *self.turns[name]) if name in self.turns else value

    def plain(
        self, batch: "pa.RecordBatch", columns: "Columns", notes: list[str]
    ) -> "pa.RecordBatch":
        """An Arrow batch with a column for each of the names, and one image a row.

        Args:
            batch: of the columns stored.
            columns: what they are used for.
            notes: takes a sentence if rows have further images, which are not used.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
        for name, path in self.paths.items():
            if name == columns.image and pa.types.is_struct(batch.column(path[0]).type):
                arrays[name] = pc.struct_field(batch.column(path[0]), list(path[1:]))
                continue
            column = batch.column(path[0]).to_pylist()
            texts = [strings(self.value({path[0]: one}, name)) for one in column]
            if name in columns.captions:
                arrays[name] = pa.array(texts, pa.list_(pa.string()))
            else:
                arrays[name] = pa.array([single(one) for one in texts], pa.string())
        kind = arrays[columns.image].type
        if _is_list(kind) and (is_image(kind.value_type) or kind.value_type == pa.string()):
            arrays[columns.image], longest = _first_of_each(arrays[columns.image])
            if longest > 1:
                notes.append(FIRST_IMAGE.format(column=columns.image))
        return pa.RecordBatch.from_pydict(arrays)


def json_leaves(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The paths to the fields of a record that do not hold objects."""
    for name, value in record.items():
        objects = _objects_in(value)
        if not objects:
            yield (name,)
        for part in objects:
            yield from ((name, *inner) for inner in json_leaves(part))


def _objects_in(value: Any) -> list[dict[str, Any]]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]


def arrow_leaves(
    fields: "Iterable[pa.Field]", path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], "pa.DataType"]:
    """The paths to the fields of an Arrow schema that do not hold structs, with their types.

    A struct of an image's bytes or path is a field, and so is a list of images, as if of one.
    """
    import pyarrow as pa

    found: dict[tuple[str, ...], pa.DataType] = {}
    for field in fields:
        kind, own = field.type, (*path, field.name)
        one = kind.value_type if _is_list(kind) else kind
        if pa.types.is_struct(one) and not is_image(one):
            found |= arrow_leaves(one, own)
        else:
            found[own] = one if is_image(one) else kind
    return found


def is_image(kind: "pa.DataType") -> bool:
    """Whether an Arrow type holds encoded images, or the struct of an image's path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool({part.name for part in kind} & {"bytes", "path"})
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _first_of_each(lists: "pa.Array") -> tuple["pa.Array", int]:
    """The first value of each list, null for an empty one, and the length of the longest."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    values = lists.flatten()  # without those of null lists
    starts = np.cumsum(lengths) - lengths
    places = pa.array(starts, pa.int64(), mask=lengths == 0)
    return values.take(places), int(lengths.max(initial=0))


def _follow(value: Any, path: tuple[str, ...]) -> Any:
    for depth, name in enumerate(path):
        if isinstance(value, list):
            found = [_follow(one, path[depth:]) for one in value]
            return [inner for one in found for inner in (one if isinstance(one, list) else [one])]
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _answer(turns: Any, speaker: str, text: str) -> str | None:
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get(speaker) in _ASSISTANT:
            said = turn.get(text)
            parts = said if isinstance(said, list) else [said]  # OpenAI's: text and images by turns
            texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
            return "".join(one for one in texts if isinstance(one, str)).replace("<image>", "")
    return None
