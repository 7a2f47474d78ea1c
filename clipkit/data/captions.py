"""What counts as a caption among the values that sources hold, and which captions look wrong."""

import ast
import json
import re
import warnings
from pathlib import PurePosixPath
from typing import Any

from clipkit.data.images import SUFFIXES, Skipped
from clipkit.data.source import clean_text, is_damaged

MISSING = {"nan", "-nan", "nat", "null", "none", "na", "n/a", "<na>", "#n/a", "#na", "\\n"}
"""Words that programs write for a missing value, in lower case: ``\\N`` is from SQL databases."""
_LONGEST_MISSING = max(map(len, MISSING))
_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PRINTED_STRING = re.compile(_STRING, re.DOTALL)
_PRINTED_LIST = re.compile(  # NumPy writes no commas
    rf"\[\s*(?:{_STRING})(?:(?:\s*,\s*|\s+)(?:{_STRING}))*\s*,?\s*\]", re.DOTALL
)
_PRINTED_NOTE = (
    """captions printed as lists, like "['a dog', 'a cat']", are read as several captions each"""
)


def clean_captions(values: Any, key: str, skipped: list[Skipped], notes: list[str]) -> list[str]:
    """The captions in a string or a list.

    None and blank strings are not captions, nor are NaN and words for a missing value such as NULL,
    nor objects. A list that was printed into a string, by Python, NumPy or as JSON, holds several
    captions.

    Args:
        values: a string, or a list of strings and further lists; numbers are converted.
        key: of the image.
        skipped: takes what is left out, but not None, and blanks only beside a caption.
        notes: takes a sentence if a printed list was read.
    """
    captions: list[str] = []
    blank = False
    for text in strings(values):
        printed = _parse_printed_list(text) if text.startswith("[") else None
        if printed is not None:
            notes.append(_PRINTED_NOTE)
        for caption in [text] if printed is None else map(clean_text, printed):
            if not caption:
                blank = True
            elif len(caption) <= _LONGEST_MISSING and caption.lower() in MISSING:
                skipped.append(Skipped(key, f"its caption {caption!r} stands for a missing value"))
            elif is_damaged(caption):
                skipped.append(Skipped(key, "a caption of it is not UTF-8 and is left out"))
            elif caption.startswith("{") and (fields := _printed_fields(caption)) is not None:
                shown = ", ".join(fields) or "none"
                skipped.append(Skipped(key, f"its caption is an object with the fields {shown}"))
            else:
                captions.append(caption)
    if captions and blank:
        skipped.append(Skipped(key, "one of its captions is empty"))
    return captions


def strings(value: Any) -> list[str]:
    """A value as a stripped string, and those of a list one by one; None is nothing."""
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [] if value is None else [clean_text(value)]


def single(texts: list[str]) -> str | None:
    """The first of the strings; None if there is none, or NaN."""
    return texts[0] if texts and texts[0] != "nan" else None


def _parse_printed_list(text: str) -> list[str] | None:
    """The strings of a printed list; None if the text is anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        if not _PRINTED_LIST.fullmatch(text):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of "\d", and reads it as it stands
            try:
                return [ast.literal_eval(part) for part in _PRINTED_STRING.findall(text)]
            except (ValueError, SyntaxError):  # a truncated "\x"
                return None
    good = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if good else None


def _printed_fields(text: str) -> list[str] | None:
    """The fields of an object printed as JSON or by Python; None if the text is anything else."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return list(map(str, value)) if isinstance(value, dict) else None
    return None


def caption_warning(caption: str, key: str) -> str | None:
    """Why a caption probably does not describe its image; None if nothing seems wrong.

    It is mostly digits, a truth value, or a file name: its image's, with or without the suffix, or
    any other with one. A single word of letters may well be both a file's name and a caption.
    """
    if caption.lower() in ("true", "false"):
        return "its caption is a truth value"
    if len(caption.split()) == 1 or caption == key:
        path, own = PurePosixPath(caption.replace("\\", "/")), PurePosixPath(key)
        of_own = own.suffix and path.name == own.stem and not path.name.isalpha()
        if of_own or path.suffix.lower() in SUFFIXES:
            return "its caption is a file name"
    characters = sum(not character.isspace() for character in caption)
    if 2 * sum(map(str.isdigit, caption)) > characters or _is_number(caption):
        return "its caption is mostly digits"
    return None


def _is_number(text: str) -> bool:
    if text.isalpha():  # "infinity" is a word
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True
