"""Labels of data found among the labels that a classifier knows.

Labels that say more than a word: synonyms, descriptions, a place in a hierarchy.

Labels for collections of everyday photos, where none are given.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import CaptionError, DataError

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


_SHOWN = 10  # labels


def targets_of(
    found: Sequence[str | None], labels: Sequence[str], spec: str
) -> tuple[list[int], NDArray[np.int64]]:
    """The rows that have a label, and its number among ``labels``, int64 [rows].

    A label is found by its words: capitals, hyphens and underscores do not matter.

    Args:
        found: the label of each row of the data, or None.
        labels: what may be chosen.
        spec: the data's name, for the error.

    Raises:
        DataError: no row has a label, or one that is not among ``labels``.
    """
    rows = [i for i, label in enumerate(found) if label is not None]
    if not rows:
        raise DataError(f"{spec} has no labels; expected one folder per class, or a label column")
    numbers = {_words(label): number for number, label in enumerate(labels)}
    names = [str(found[i]) for i in rows]
    unknown = Counter(name for name in names if _words(name) not in numbers)
    if unknown:
        raise DataError(
            f"{spec} has labels that are not among --labels: "
            f"{', '.join(sorted(unknown)[:_SHOWN])} ({len(unknown)} in all); add them or rename "
            "them"
        )
    return rows, np.array([numbers[_words(name)] for name in names], np.int64)


def own_labels(found: Sequence[str | None], spec: str) -> list[Label]:
    """The labels that occur in data, sorted; captions say them without underscores and hyphens.

    Args:
        found: the label of each row, or None.
        spec: the data's name, for the error.

    Raises:
        DataError: fewer than two.
    """
    names = sorted({label for label in found if label is not None})
    if len(names) < 2:
        raise DataError(
            f"{spec} has {len(names) or 'no'} label{'s' if not names else ''}, expected two or "
            "more; name a label column, or a folder with one folder per class"
        )
    return [
        Label([name], [" ".join(name.replace("_", " ").replace("-", " ").split())])
        for name in names
    ]


def empty_classes(targets: NDArray[np.int64], labels: Sequence[str]) -> str:
    """A sentence about labels that no image has; empty if there are none."""
    empty = [labels[i] for i in sorted(set(range(len(labels))) - set(targets.tolist()))]
    if not empty:
        return ""
    more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
    return (
        f"labels without an image: {len(empty)} of {len(labels)} ({', '.join(empty[:_SHOWN])}"
        f"{more}); they can be chosen, and count in no mean over classes"
    )


def _words(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").replace("-", " ").split())


_LABELS = """
person, group of people, crowd, portrait, child, baby, wedding, party, concert, football,
basketball, tennis, skiing, snowboarding, surfing, swimming, running, cycling, skateboarding,
climbing, hiking, camping, fishing, dancing, reading, cooking, dog, cat, horse, cow, sheep,
bird, duck, fish, insect, butterfly, bear, elephant, giraffe, zebra, monkey, snake, flower,
tree, forest, garden, leaf, mushroom, mountain, desert, beach, sea, lake, river, waterfall, sky,
sunset, snow, rain, fog, night, field, farm, road, street, bridge, city, skyline, building,
house, church, castle, tower, ruin, statue, painting, drawing, museum, shop, market, restaurant,
kitchen, bedroom, bathroom, living room, office, classroom, hospital, airport, station,
factory, car, truck, bus, train, tram, bicycle, motorcycle, boat, ship, aeroplane, helicopter,
food, cake, bread, fruit, vegetable, pizza, soup, coffee, wine, bottle, cup, book, newspaper,
document, screenshot, map, diagram, sign, computer, phone, camera, clock, lamp, chair, table,
bed, toy, game, instrument, guitar, piano, clothes, shoes, hat, bag, jewellery, tool, machine,
weapon, flag, fire, smoke, firework, swimming pool, playground, stadium, golf course, harbour,
parking lot, tennis court, aerial view
"""
EVERYDAY = tuple(" ".join(label.split()) for label in _LABELS.split(","))
"""About 170 things photos are often of, as labels for ``clipkit map``."""
