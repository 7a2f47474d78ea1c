"""Amounts of memory as people write them."""

import re

import typer

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB``, ``1.5 GiB`` or ``2g``.

    Raises:
        BadParameter: it is none, which ends a command with exit code 2.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[kmgt]i?)?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no amount of memory, expected for example 500MB")
    return int(float(found[1]) * _UNITS[found[2]])
