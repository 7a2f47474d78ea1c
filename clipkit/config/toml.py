"""TOML in, resolved TOML out; ``--set section.key=value`` overrides single fields."""

import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from clipkit.config.sections import TrainConfig
from clipkit.errors import ConfigError

_ADAPTER = TypeAdapter(TrainConfig)
_TEXTS = {
    f"{section.name}.{item.name}"
    for section in fields(TrainConfig)
    for item in fields(section.type)  # type: ignore[arg-type]
    if item.type is str
}
"""Fields that hold any text."""
_EXPECTED = {
    "dataclass_type": "expected a section of keys, such as [train]",
    "missing": "expected more values in the list",
    "tuple_type": "expected a list in brackets",
}
"""What pydantic says in the words of Python, in those of TOML; by its type of error."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply ``section.key=value`` overrides.

    Relative paths in ``[data]`` are taken from where the command runs, as on the command line.

    Raises:
        ConfigError: the file is missing or no TOML; an unknown key (with the nearest known one);
            a wrong type or value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows mark it
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}), expected a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "; write a path with backslashes in 'single quotes'" if "'\\'" in str(error) else ""
        raise ConfigError(f"{path} is not valid TOML: {error}{hint}") from None
    for override in overrides:
        _override(content, override)
    return parse_config(content, origin=str(path))


def parse_config(content: dict[str, Any], origin: str = "the configuration") -> TrainConfig:
    """Check a nested dictionary and turn it into a TrainConfig; raises ConfigError as above."""
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_sentence(error)}") from None


def dump_config(config: TrainConfig) -> str:
    """The configuration as TOML with every field written out."""
    return tomli_w.dumps(_plain(asdict(config)))


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what TOML can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _override(content: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value``; the value is read as TOML, else as a plain string."""
    target, equals, text = override.partition("=")
    *sections, key = _parts(target)
    if not equals or not sections or not all(sections) or not key:
        raise ConfigError(
            f"--set {override!r} is not section.key=value, for example train.epochs=5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if ".".join([*sections, key]) in _TEXTS and not isinstance(value, str):
        value = text.strip()  # a folder named 2024, or true
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
    content[key] = value


def _parts(target: str) -> list[str]:
    """The names in a dotted key, as TOML reads it; a name in quotes may hold dots itself."""
    names = []
    try:
        found: Any = tomllib.loads(f"{target} = 0")
        while isinstance(found, dict):
            ((name, found),) = found.items()
            names.append(name)
    except ValueError:  # TOML's error is one
        return target.strip().split(".")
    return names


def _sentence(error: ValidationError) -> str:
    """The first thing wrong, in one sentence."""
    problem = error.errors()[0]
    # pydantic adds the alternatives of a union to the path; a person knows only the key.
    where = ".".join(map(str, problem["loc"][:2]))
    expected = _EXPECTED.get(problem["type"], problem["msg"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section, _, key = where.rpartition(".")
        known = list(_known_keys(section))
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    found = json.dumps(problem["input"], default=str)
    known = re.findall(r"'(\w+)'", str(problem.get("ctx", {}).get("expected", "")))
    close = difflib.get_close_matches(str(problem["input"]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{where} is {found}; {expected[0].lower()}{expected[1:]}{hint}"


def _known_keys(section: str) -> list[str]:
    """Names of a section's fields; of the sections for an empty name."""
    sections = {item.name: item.type for item in fields(TrainConfig)}
    return [item.name for item in fields(sections[section])] if section else list(sections)  # type: ignore[arg-type]
