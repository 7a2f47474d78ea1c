"""Sidecars: the small files beside an image that hold its captions, label and other fields.

Folders, tars and zip archives read them alike. For ``a.jpg`` these are ``a.txt`` and ``a.caption``
(one caption a line), ``a.json`` and ``a.cls`` (a label), whatever the case of the ending. A part in
between is accepted if it is a number, the name of a caption column, or the image's own:
``a.0.txt``, ``a.caption.txt``, ``a.jpg.txt``.
"""

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clipkit.data.captions import clean_captions
from clipkit.data.formats.columns import CAPTION, LABEL
from clipkit.data.images import Skipped
from clipkit.data.source import Wanted, clean_text

ENDINGS = ("txt", "caption", "json", "cls")
SIDECAR_LIMIT = 1 << 20
"""Bytes of the largest sidecar that is read."""

_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NESTED = ("raw", "annotations", "sentences")  # as in COCO's and Karpathy's files


@dataclass(frozen=True)
class Texts:
    """What the sidecars of one image say.

    Attributes:
        captions: in the order of the sidecars, without blank ones.
        label: None if there is none.
        fields: the top level of the JSON.
    """

    captions: list[str]
    label: str | None
    fields: dict[str, Any]


def is_usual(between: str) -> bool:
    """Whether a name between an image's and the ending marks a caption: ``0`` or ``caption``."""
    return not between or between.isdecimal() or between.lower() in CAPTION


def read_texts(
    sidecars: Iterable[tuple[str, bytes]],
    key: str,
    wanted: Wanted,
    skipped: list[Skipped],
    notes: list[str],
) -> Texts:
    """Read the captions, the label and the fields of one image.

    Captions come from the ``.txt`` and ``.caption`` files, and from the JSON if these are blank or
    a caption column is named. The label comes from ``.cls``, or from the JSON.

    Args:
        sidecars: ending and content of each.
        key: of the image.
        wanted: the field names of caption and label in the JSON, if they are not the usual ones.
        skipped: takes damaged JSON and damaged captions.
        notes: takes sentences about how captions were read.
    """
    lines: list[str] = []
    values: list[Any] = []
    label: Any = None
    fields: dict[str, Any] = {}
    for ending, data in sidecars:
        if ending == "json":
            try:
                value = parse_json(data)
                values += find_captions(value, wanted.caption)
            except (ValueError, RecursionError) as error:
                reason = f"the JSON beside it is damaged and left out: {error}"
                skipped.append(Skipped(key, reason))
                continue
            fields |= value if isinstance(value, dict) else {}
        elif ending == "cls":
            label = decode(data) if wanted.label is None else None
        elif wanted.caption is None:
            lines += [line for line in decode(data).splitlines() if line.strip()]
    if label is None:
        names = LABEL if wanted.label is None else (wanted.label,)
        label = next((fields[name] for name in names if fields.get(name) is not None), None)
    return Texts(
        clean_captions(lines or values, key, skipped, notes),
        None if label is None else clean_text(label) or None,
        fields,
    )


def decode(data: bytes) -> str:
    """A sidecar as text: UTF-8, or as its byte order mark says; U+FFFD for damaged bytes."""
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding, "replace")


def parse_json(data: bytes) -> Any:
    """The value of a JSON sidecar; raises ValueError or RecursionError if it is damaged."""
    return json.loads(decode(data))


def find_captions(value: Any, name: str | None = None) -> list[Any]:
    """The captions in parsed JSON: a string, a list of captions, or a field of an object.

    Args:
        value: what was parsed.
        name: the field that holds captions; None looks for the usual names, of which the first
            with a caption counts, also in nested annotations.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [caption for one in value for caption in find_captions(one, name)]
    if not isinstance(value, dict):
        return []
    for field in (*CAPTION, *_NESTED) if name is None else (name,):
        captions = _listed(value.get(field))
        if any(str(caption).strip() for caption in captions if caption is not None):
            return captions
    return []


def _listed(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [
        caption
        for one in values
        for caption in (find_captions(one) if isinstance(one, list | dict) else [one])
    ]
