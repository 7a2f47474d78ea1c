"""Labels: their names, groups and phrases, and the labels of data matched against a list.

A label may have synonyms or a description for its captions, and a place in a hierarchy.
``EVERYDAY`` is a list of labels for collections of photos.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.arguments import require_items
from clipkit.errors import CaptionError, DataError

_COLON = re.compile(r"(?<!\\):\s")
_SLASH = re.compile(r"(?<!\\)/")


@dataclass(frozen=True)
class Label:
    """A class of images.

    ``str(label)`` is the name that is printed; it starts with the groups: ``animal/fox``.

    Attributes:
        name: the name below its groups: ``"fox"``.
        groups: the groups above it, outermost first: ``("animal",)``.
        phrases: what captions say; the name if nothing else is given.

    Raises:
        TypeError: groups or phrases are a single string.
    """

    name: str
    groups: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value in (("groups", self.groups), ("phrases", self.phrases)):
            if isinstance(value, str):
                raise TypeError(f"{what} is one string, {value!r}, expected a tuple of strings")
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "phrases", tuple(self.phrases) or (self.name,))

    @property
    def path(self) -> tuple[str, ...]:
        """The groups and the name: ``("animal", "fox")``."""
        return (*self.groups, self.name)

    def __str__(self) -> str:
        return "/".join(self.path)


def to_labels(labels: Sequence[str | Label]) -> list[Label]:
    """Labels as ``Label`` objects; a plain string is a name without groups and synonyms.

    Raises:
        TypeError: ``labels`` is a single string, or has an item that is neither a string nor a
            ``Label``.
    """
    found = require_items("labels", labels, "['dog', 'cat']")
    for label in found:
        if not isinstance(label, (str, Label)):
            raise TypeError(
                f"labels has {label!r} of type {type(label).__name__}, expected strings or Labels"
            )
    return [label if isinstance(label, Label) else Label(label) for label in found]


def parse_label(text: str) -> Label:
    r"""Read a label: ``fox``, ``animal/fox``, ``fox: red fox, vixen``.

    The text after the colon is what captions say instead of the name. Semicolons separate its
    phrases, or commas if it has no semicolon (``fox: a small, red animal; vixen``).
    ``\:`` and ``\/`` are a literal colon and slash.
    """
    parts = _COLON.split(text, maxsplit=1)
    name = " ".join(parts[0].replace("\\:", ":").split())
    *groups, own = (part.strip().replace("\\/", "/") for part in _SLASH.split(name))
    words = parts[1] if len(parts) > 1 else ""
    phrases = (" ".join(one.split()) for one in words.split(";" if ";" in words else ","))
    return Label(own, tuple(groups), tuple(phrase for phrase in phrases if phrase))


def parents(labels: Sequence[Label]) -> dict[str, list[int]]:
    """The groups above the labels, outermost first, and the numbers of the labels in each."""
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        for depth in range(1, len(label.path)):
            groups.setdefault("/".join(label.path[:depth]), []).append(number)
    return groups


def check_paths(labels: Sequence[Label], where: str) -> None:
    """Check that names and groups are not empty, and that labels can be distinguished.

    Raises:
        CaptionError: a path has an empty part, a label is also a group, or two labels have the same
            phrases.
    """
    groups = parents(labels)
    seen: dict[tuple[str, ...], Label] = {}
    for label in labels:
        name = str(label)
        if not all(label.path):
            raise CaptionError(
                f"{where} holds {name!r} with an empty part, expected names between the slashes; "
                "write a slash that separates nothing as \\/"
            )
        if name in groups:
            raise CaptionError(
                f"{where} holds {name!r} and labels below it, expected either; call it "
                f"{name + '/other'!r}, with words for what it shows"
            )
        words = tuple(sorted(phrase.lower() for phrase in label.phrases))
        if words in seen:
            raise CaptionError(
                f"{where} describes {str(seen[words])!r} and {name!r} with the same words, which "
                "nothing can tell apart; write other words behind a colon"
            )
        seen[words] = label


def literal_labels(names: Sequence[str]) -> list[Label]:
    """Class names as they are, in their order; a repeated name is printed with its number.

    Public lists of classes repeat names (ImageNet's repeats "missile" and "sunglasses").
    """
    seen: set[str] = set()
    labels = []
    for number, name in enumerate(names):
        shown = f"{name} ({number})" if name.lower() in seen else name
        seen.add(name.lower())
        labels.append(Label(shown, phrases=(name,)))
    return labels


def imagenet_labels() -> list[Label]:
    """The 1,000 names of ImageNet's classes as open_clip ships them, in their order."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return literal_labels(IMAGENET_CLASSNAMES)


_SHOWN = 10  # labels


def targets_of(
    found: Sequence[str | None], labels: Sequence[str | Label], spec: str
) -> tuple[list[int], NDArray[np.int64]]:
    """The rows that have a label, and the index of each one's label, int64 [rows].

    Labels match if they have the same words; case, hyphens and underscores do not matter.

    Args:
        found: the label of each row of the data, or None.
        labels: the classes.
        spec: the data's name, for the error.

    Raises:
        DataError: no row has a label, or a row has a label that is not among ``labels``.
    """
    rows = [i for i, label in enumerate(found) if label is not None]
    if not rows:
        raise DataError(f"{spec} has no labels; expected one folder per class, or a label column")
    numbers = {_words(str(label)): number for number, label in enumerate(labels)}
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
    """The labels of data, sorted; their phrases have spaces instead of underscores and hyphens.

    Args:
        found: the label of each row, or None.
        spec: the data's name, for the error.

    Raises:
        DataError: the data has fewer than two labels.
    """
    names = sorted({label for label in found if label is not None})
    if len(names) < 2:
        raise DataError(
            f"{spec} has {len(names) or 'no'} label{'s' if not names else ''}, expected two or "
            "more; name a label column, or a folder with one folder per class"
        )
    return [
        Label(name, phrases=(" ".join(name.replace("_", " ").replace("-", " ").split()),))
        for name in names
    ]


def empty_classes(targets: NDArray[np.int64], labels: Sequence[str | Label]) -> str:
    """A sentence about labels without images; an empty string if every label has one."""
    empty = [str(labels[i]) for i in sorted(set(range(len(labels))) - set(targets.tolist()))]
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
"""About 170 common subjects of photos, the default labels of ``clipkit map``."""
