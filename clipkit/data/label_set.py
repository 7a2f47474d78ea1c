"""Labels that say more than a word: synonyms, descriptions, a place in a hierarchy."""

import re
from collections.abc import Sequence

from clipkit.errors import CaptionError

_COLON = re.compile(r"(?<!\\):\s")
_SLASH = re.compile(r"(?<!\\)/")


class Label(str):
    """A label's name, which is what is printed, and the words that stand for it in captions.

    Attributes:
        path: the groups above it and its own name: ``("animal", "fox")``.
        phrases: what captions say; if nothing else is given, the last part of the path.
    """

    path: tuple[str, ...]
    phrases: tuple[str, ...]

    def __new__(cls, path: Sequence[str], phrases: Sequence[str] = ()) -> "Label":  # noqa: D102
        label = super().__new__(cls, "/".join(path))
        label.path = tuple(path)
        label.phrases = tuple(phrases) or (label.path[-1],)
        return label


def parse_label(text: str) -> Label:
    r"""Read a label: ``fox``, ``animal/fox``, ``fox: red fox, vixen``.

    What stands behind the colon is what captions say instead of the name; where it holds a
    semicolon, this parts the phrases, else a comma does (``fox: a small, red animal; vixen``).
    ``\:`` and ``\/`` are the characters themselves.
    """
    parts = _COLON.split(text, maxsplit=1)
    name = " ".join(parts[0].replace("\\:", ":").split())
    path = [part.strip().replace("\\/", "/") for part in _SLASH.split(name)]
    words = parts[1] if len(parts) > 1 else ""
    phrases = [" ".join(one.split()) for one in words.split(";" if ";" in words else ",")]
    return Label(path, [phrase for phrase in phrases if phrase])


def phrases_of(label: str) -> tuple[str, ...]:
    """The words that captions say for a label; a plain text stands for itself."""
    return label.phrases if isinstance(label, Label) else (label,)


def path_of(label: str) -> tuple[str, ...]:
    """The groups above a label and its own name; a plain text has no groups."""
    return label.path if isinstance(label, Label) else (label,)


def parents(labels: Sequence[str]) -> dict[str, list[int]]:
    """Every group above the labels, with the numbers of the labels below it, outermost first."""
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        parts = path_of(label)
        for depth in range(1, len(parts)):
            groups.setdefault("/".join(parts[:depth]), []).append(number)
    return groups


def check_paths(labels: Sequence[str], where: str) -> None:
    """Refuse empty parts, a label that is a group too, and two that say the same.

    Raises:
        CaptionError: names the labels.
    """
    groups = parents(labels)
    said: dict[tuple[str, ...], str] = {}
    for label in labels:
        if not all(path_of(label)):
            raise CaptionError(
                f"{where} holds {label!r} with an empty part, expected names between the slashes; "
                "write a slash that parts nothing as \\/"
            )
        if label in groups:
            raise CaptionError(
                f"{where} holds {label!r} and labels below it, expected either; call it "
                f"{label + '/other'!r}, with words for what it shows"
            )
        words = tuple(sorted(phrase.lower() for phrase in phrases_of(label)))
        if words in said:
            raise CaptionError(
                f"{where} describes {said[words]!r} and {label!r} with the same words, which "
                "nothing can tell apart; write other words behind a colon"
            )
        said[words] = label


def literal_labels(names: Sequence[str]) -> list[Label]:
    """Names of classes as they are, in their order; one that comes again is printed with a number.

    Public lists of classes hold names twice (of ImageNet's, "missile" and "sunglasses").
    """
    seen: set[str] = set()
    labels = []
    for number, name in enumerate(names):
        shown = f"{name} ({number})" if name.lower() in seen else name
        seen.add(name.lower())
        labels.append(Label([shown], [name]))
    return labels


def imagenet_labels() -> list[Label]:
    """The 1,000 names of ImageNet's classes as open_clip ships them, in their order."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return literal_labels(IMAGENET_CLASSNAMES)
