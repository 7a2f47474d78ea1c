"""Fields of nested records by dotted names, as JSON and Parquet tables hold them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from clipkit.data.formats.columns import CAPTION
from clipkit.data.source import Row

_PLAIN = ("path", "file_name", "filename", "raw", "text", "caption", "value", "sentence")
"""Fields that stand for the object they are in, the first of them that it has."""
_TURNS = (("from", "value"), ("role", "content"))
"""Speaker and text of a conversation's turns: LLaVA's and ShareGPT's names, and OpenAI's."""
_ASSISTANT = ("gpt", "assistant", "model")
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
    def find(cls, names: Iterable[str], notes: list[str]) -> "Nested":
        """Name the fields of records.

        A field that holds objects has the names of the fields within. Its own name stands for the
        one of them that is plainly meant, such as ``caption`` for ``caption.text``.

        Args:
            names: of the fields without any within, those in objects with dots.
            notes: takes the field that is read as captions though its name does not say so.
        """
        names = list(dict.fromkeys(names))
        paths, turns = {name: tuple(name.split(".")) for name in names if "." in name}, {}
        within: dict[str, list[str]] = {}
        for name, path in paths.items():
            within.setdefault(path[0], []).append(name)
        for name, inner in within.items():
            if name in names:  # some records have a plain value
                continue
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

    def flatten(self, record: Row) -> Row:
        """The record with a value for each of the names; None where it has none."""
        if not self.paths and not self.objects:
            return record
        found = {name: self.value(record, name) for name in self.paths}
        record = {name: v for name, v in record.items() if name not in self.objects}
        return record | {
            name: v for name, v in found.items() if v is not None or name not in record
        }

    def value(self, record: Row, name: str) -> Any:
        """The value of one of the names."""
        value = _follow(record, self.paths[name])
        return _answer(value, *self.turns[name]) if name in self.turns else value


def leaves(record: Mapping[str, Any]) -> Iterator[str]:
    """The names of the fields of a record, those within objects with dots."""
    for name, value in record.items():
        parts = value if isinstance(value, list) else [value]
        objects = [part for part in parts if isinstance(part, dict)]
        if not objects:
            yield name
        for part in objects:
            yield from (f"{name}.{inner}" for inner in leaves(part))


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
