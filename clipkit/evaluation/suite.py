"""The TOML file of an evaluation suite: a list of data sets."""

import tomllib
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from clipkit.errors import ConfigError
from clipkit.evaluation.report import Task
from clipkit.evaluation.retrieval import EqualCaptions

TASKS, EQUAL_CAPTIONS = get_args(Task), get_args(EqualCaptions)


@dataclass(frozen=True)
class SuiteSet:
    """One data set of a suite.

    Attributes:
        name: its name in the table of results.
        data: anything that ``open_source`` opens, or a directory in CLIP_benchmark's layout.
            Paths are relative to the directory of the suite.
        task: ``zero-shot`` or ``retrieval``; may be empty for CLIP_benchmark's layout.
        labels: labels separated by commas, a file, or ``imagenet``; empty for the labels of the
            data.
        templates: a file, ``openai`` or ``simple``; empty for those of the data, or the default.
        split: of CLIP_benchmark's layout.
        image_column: the column of the images, if it has an unusual name.
        caption_column: likewise.
        label_column: likewise.
        image_root: the folder that the image paths of a table start from, relative to the suite.
        encoding: of a CSV or TSV table, if it is not found.
        equal_captions: ``merge`` or ``apart``, for a retrieval.
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
    image_root: str = ""
    encoding: str = ""
    equal_captions: EqualCaptions = "merge"


def read_suite(file: Path) -> list[SuiteSet]:
    """Read the ``[[set]]`` tables of a suite.

    Raises:
        ConfigError: the file is not TOML or has no set; a set has an unknown key, a wrong type or
            value, or the name of another set.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"cannot read the suite {file} ({error}), expected TOML with [[set]] tables"
        ) from None
    entries = content.pop("set", [])
    if content:
        raise ConfigError(
            f"{file} has the unknown key {next(iter(content))!r}, expected [[set]] tables only"
        )
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{file} has no [[set]] table, expected one for each data set with its name, data and "
            "task"
        )
    sets = [_read_set(entry, file) for entry in entries]
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{file} has two sets named {name!r}; rename one")
    return sets


def _read_set(entry: Any, file: Path) -> SuiteSet:
    known = [field.name for field in fields(SuiteSet)]
    for key, value in entry.items() if isinstance(entry, dict) else ():
        if key not in known:
            close = get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}"
            raise ConfigError(f"{file}: a set has the unknown key {key!r}; {hint}")
        if not isinstance(value, str):
            raise ConfigError(f"{file}: {key} = {value!r}, expected a text in quotes")
    if not isinstance(entry, dict) or not entry.get("name") or not entry.get("data"):
        raise ConfigError(f"{file}: a set lacks its name or data; add both")
    one = SuiteSet(**entry)
    if one.task and one.task not in TASKS:
        raise ConfigError(f"{file}: task = {one.task!r}, expected {' or '.join(TASKS)}")
    if one.equal_captions not in EQUAL_CAPTIONS:
        raise ConfigError(
            f"{file}: equal_captions = {one.equal_captions!r}, expected "
            f"{' or '.join(EQUAL_CAPTIONS)}"
        )
    return one
