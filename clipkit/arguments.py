"""Checks of arguments that public functions share.

A wrong type or a value out of range raises one sentence here, where it would otherwise pass without
a word (a batch size of -1 encodes nothing) or end in the message of a library.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral, Real
from os import PathLike
from typing import Any, get_args

from clipkit.errors import ArgumentError

AUTO = "auto"


def require_integer(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is not an integer (``True`` is not).
        ArgumentError: it is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {_shown(value)}, expected an integer from {least}")
    if value < least:
        raise ArgumentError(f"{name} is {value}, expected at least {least}")
    return int(value)


def require_size(name: str, value: Any, least: int = 1) -> int | str:
    """A number of images or threads, or ``"auto"``.

    Raises:
        TypeError: it is neither an integer nor ``"auto"``.
        ArgumentError: it is below ``least``.
    """
    if isinstance(value, str):
        if value == AUTO:
            return value
        raise TypeError(f'{name} is {value!r}, expected an integer from {least}, or "auto"')
    return require_integer(name, value, least)


def require_number(name: str, value: Any) -> float:
    """A finite number above 0 as a float.

    Raises:
        TypeError: it is not a number.
        ArgumentError: it is not finite, or not above 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {_shown(value)}, expected a number above 0")
    number = float(value)
    if not 0 < number < float("inf"):
        raise ArgumentError(f"{name} is {value}, expected a finite number above 0")
    return number


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Check that ``value`` is one of ``choices``, a ``Literal`` type or a sequence.

    Raises:
        ArgumentError: it is not.
    """
    known = get_args(choices) or tuple(choices)
    if value not in known:
        shown = " or ".join(repr(one) for one in known)
        raise ArgumentError(f"{name} is {_shown(value)}, expected {shown}")


def require_text(name: str, value: Any, example: str) -> None:
    """Check that ``value`` is a string.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_shown(value)}, expected text such as {example!r}")


def require_items(name: str, value: Any, example: str) -> list[Any]:
    """The items of a list, tuple, array, series or iterator.

    Raises:
        TypeError: ``value`` is one string; a mapping, whose keys alone would be read; a set, which
            has no order; or not iterable.
    """
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} is one string, {value[:80]!r}, expected a list such as {example}")
    if isinstance(value, Mapping | AbstractSet) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {_shown(value)}, expected a list such as {example}")
    return list(value)


def require_encoder(encoder: Any) -> None:
    """Check that ``encoder`` is None or an encoder.

    Raises:
        TypeError: it is the name of a model, or something else.
    """
    if encoder is None or hasattr(encoder, "model"):
        return
    hint = ""
    if isinstance(encoder, str | PathLike):
        hint = f"; clipkit.load_model({str(encoder)!r}) makes one"
    raise TypeError(f"encoder is {_shown(encoder)}, expected an Encoder{hint}")


def _shown(value: Any) -> str:
    """A value, if it is short, or its type."""
    if value is None or (isinstance(value, str | int | float) and len(repr(value)) < 80):
        return repr(value)
    kind = type(value).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return f"{article} {kind}" + (f" of {len(value)} items" if several else "")
