"""A list of data sets to measure models on, as TOML."""

import tomllib
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from clipkit.errors import ConfigError

TASKS = ("zeroshot", "retrieval")


@dataclass(frozen=True)
class SuiteSet:
    """One data set of a suite.

    Attributes:
        name: what it is called in the table.
        data: whatever ``open_source`` opens, or a directory in CLIP_benchmark's layout; paths are
            relative to the suite's file.
        task: ``zeroshot`` or ``retrieval``; empty where the data say so themselves.
        labels: as for classify; empty: the labels of the data.
        templates: a file, or ``openai`` or ``simple``; empty: the data's, else the usual ones.
        split: of CLIP_benchmark's layout.
        image_column: if it has no usual name.
        caption_column: likewise.
        label_column: likewise.
        equal_captions: ``merge`` or ``apart``, of a retrieval.
    """

    name: str
    data: str
    task: str = ""
    labels: str = ""
    templates: str = ""
    split: str = "test"
    image_column: str = ""
    caption_column: str = ""
    label_column: str = ""
    equal_captions: str = "merge"


def read_suite(file: Path) -> list[SuiteSet]:
    """Read the ``[[set]]`` tables of a suite.

    Raises:
        ConfigError: no TOML, no set, an unknown key, a wrong type or value, or a name twice.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read as a suite ({error}), expected TOML with [[set]] tables"
        ) from None
    entries = content.pop("set", [])
    if content or not isinstance(entries, list) or not entries:
        found = f"{', '.join(content)} beside its" if content else "no"
        raise ConfigError(
            f"{file} holds {found} [[set]] tables, expected these alone, each with a name, data "
            "and a task; write one for each data set"
        )
    sets = [_read(entry, file) for entry in entries]
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{file} names the set {name!r} twice, expected each name once")
    return sets


def _read(entry: Any, file: Path) -> SuiteSet:
    known = [field.name for field in fields(SuiteSet)]
    for key, value in entry.items() if isinstance(entry, dict) else ():
        if key not in known:
            close = get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{file}: a set has no setting {key!r}; {hint}")
        if not isinstance(value, str):
            raise ConfigError(f"{file}: {key} = {value!r} is no text, expected one in quotes")
    if not isinstance(entry, dict) or not entry.get("name") or not entry.get("data"):
        raise ConfigError(f"{file}: a set lacks its name or data, expected both; add them")
    one = SuiteSet(**entry)
    if one.task and one.task not in TASKS:
        raise ConfigError(f"{file}: the task {one.task!r} is none of {', '.join(TASKS)}")
    if one.equal_captions not in ("merge", "apart"):
        raise ConfigError(
            f"{file}: equal_captions = {one.equal_captions!r}, expected merge or apart"
        )
    return one
