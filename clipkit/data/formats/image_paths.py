"""Find the image files that the paths of a table name.

Paths come as people have them: relative to the table, to its images' folder or to a folder of
another machine; with backslashes, as ``file://`` URLs, from ``~``; without a suffix; with the
number of the caption after a ``#``, as in Flickr8k; or with the letters of macOS, whose accents are
characters of their own.
"""

import base64
import binascii
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote, urlsplit

from clipkit.data.images import SUFFIXES
from clipkit.errors import DataError

SAMPLE = 50
"""Paths of a table that are looked up to find out where its images are."""
FOLDERS = 1000
"""Sub-folders that are searched for the images of a table, at most 3 levels deep."""
_TRIED = 8  # of them in each sub-folder
_SPECIAL = re.compile(r"^(file:|~/)|\\", re.IGNORECASE)
_NUMBER = re.compile(r"#\d+$")
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_FIRST_BYTES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")
"""How JPEG, PNG, GIF, WebP, TIFF and BMP files begin in base64."""
INLINE = f"^(?i:data:)|^(?:{'|'.join(_FIRST_BYTES)})"
"""A pattern that images in base64 match, and hardly any paths."""
_SHORTEST_INLINE = 48  # characters: a GIF of one pixel
_DRIVE = re.compile(r"[A-Za-z]:[/\\]|\\\\")


@dataclass(frozen=True)
class ImagePaths:
    """How to get from a path in a table to an image file.

    Attributes:
        root: the absolute folder that relative paths and keys start from.
        prefix: leading folders of the paths that ``root`` stands for, with the last slash.
        numbered: the names end in ``#`` and the number of a caption, which is dropped.
        stems: the names have no suffix: each is the only image file with that stem.
    """

    root: Path
    prefix: str = ""
    numbered: bool = False
    stems: bool = False
    _listings: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    _names: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def locate(self, text: str) -> tuple[str, str]:
        """The key and the absolute path of an image."""
        root = str(self.root)
        if self.numbered:
            text = _NUMBER.sub("", text)
        if _SPECIAL.search(text):
            text = _posix(text, root)
        path = os.path.normpath(text)
        if self.prefix:
            path = path.removeprefix(self.prefix)
        if self.stems:
            path = self._with_suffix(path)
        if not path.isascii():
            path = self._as_on_disk(path)
        if os.path.isabs(path):
            return path.removeprefix(root.rstrip("/") + "/"), path
        return path, os.path.normpath(f"{root}/{path}")

    def _as_on_disk(self, path: str) -> str:
        """The path with its letters composed (NFC) or decomposed (NFD) as they are on disk."""
        whole = os.path.join(self.root, path)
        if os.path.lexists(whole):
            return path
        place = "/"
        for name in os.path.normpath(whole).split("/")[1:]:
            if not name.isascii() and not os.path.lexists(os.path.join(place, name)):
                if place not in self._names:
                    names = os.listdir(place) if os.path.isdir(place) else ()
                    self._names[place] = {normalize("NFC", one): one for one in names}
                name = self._names[place].get(normalize("NFC", name), name)
            place = os.path.join(place, name)
        return place if os.path.isabs(path) else os.path.relpath(place, self.root)

    def _with_suffix(self, path: str) -> str:
        folder, stem = os.path.split(path)
        where = os.path.join(self.root, folder)
        if where not in self._listings:
            names: dict[str, str] = {}
            for name in os.listdir(where) if os.path.isdir(where) else ():
                one, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    names[one] = "" if one in names else name  # with two, neither is meant
            self._listings[where] = names
        return os.path.join(folder, self._listings[where].get(stem) or stem)


def find_image_paths(
    texts: Iterable[str], folder: Path, image_root: str | Path | None, notes: list[str]
) -> ImagePaths:
    """Find out where the images of a table are, by looking up its first paths.

    They are expected in ``image_root``, or else beside the table. If none of them is there, the
    one sub-folder that has them is taken, and leading folders of another machine are dropped. The
    images of a table in a folder ``annotations`` may also lie beside that folder or below.

    Args:
        texts: paths as the table has them; only the first ``SAMPLE`` are looked at.
        folder: the folder of the table.
        image_root: the folder of the images, if it was given.
        notes: gets a sentence if the images are elsewhere, or nowhere.

    Raises:
        DataError: ``image_root`` is not a folder, or has none of the images.
    """
    root = folder
    if image_root is not None:
        root = Path(os.path.abspath(os.path.expanduser(image_root)))
        if not root.is_dir():
            raise DataError(f"the image root {image_root} is not a folder; name the images' folder")
    paths = ImagePaths(root)
    sample = list(islice(dict.fromkeys(texts), SAMPLE))
    if not sample:
        return paths
    if all(_NUMBER.search(text) for text in sample) and not _count(paths, sample[:1]):
        paths = replace(paths, numbered=True)
        sample = list(dict.fromkeys(_NUMBER.sub("", text) for text in sample))
    if _count(paths, sample):
        return paths
    if all(os.path.splitext(text)[1].lower() not in SUFFIXES for text in sample):
        paths = replace(paths, stems=True)
        if _count(paths, sample):
            return paths
    found = _elsewhere(paths, sample)
    if not found and image_root is None and folder.name == "annotations":  # COCO's layout
        found = _elsewhere(replace(paths, root=folder.parent), sample)
    first = sample[0]
    if len(found) == 1 and 2 * _count(found[0], sample) >= len(sample):
        _note_place(found[0], paths, first, notes)
        return found[0]
    missing = f"none of the first {len(sample)} images is in {root}, such as {first}"
    if len(sample) == 1:
        missing = f"the image {first} is not in {root}"
    if image_root is not None:
        raise DataError(f"{missing}; name the folder that the paths of the table start from")
    if _DRIVE.match(first):
        missing = f"the paths of the table are another machine's, such as {first}"
    if found:
        places = ", ".join(str(one.root) for one in found[:3])
        missing += f"; {len(found)} folders have images of these names: {places}"
    notes.append(f"{missing}; name the folder of the images with --image-root (image_root=)")
    return paths


def _note_place(found: ImagePaths, expected: ImagePaths, first: str, notes: list[str]) -> None:
    choose = "choose another folder with --image-root (image_root=)"
    if found.prefix:
        reason = f"there is no file {first}"
        notes.append(f"{reason}: {found.root} is read in place of {found.prefix}; {choose}")
    elif found.root != expected.root:
        notes.append(f"the images of the table are in {found.root}; {choose}")


def _elsewhere(paths: ImagePaths, sample: list[str]) -> list[ImagePaths]:
    """The folders that have images of the sample, with as few leading folders dropped as can be."""
    where = str(paths.root)
    parts = os.path.normpath(_posix(sample[0], where)).split("/")
    folders = [paths.root, *_folders_below(paths.root)]
    for drop in range(len(parts)):
        prefix = "/".join(parts[:drop]) + "/" if drop else ""
        ways = (replace(paths, root=root, prefix=prefix, _listings={}) for root in folders)
        found = [way for way in ways if _count(way, sample[:_TRIED])]
        if found:
            # The folder that was expected goes before any below it.
            return found[:1] if found[0].root == paths.root else found
    return []


def _count(paths: ImagePaths, sample: list[str]) -> int:
    """How many images of the sample exist."""
    return sum(os.path.isfile(paths.locate(text)[1]) for text in sample)


def _folders_below(root: Path) -> list[Path]:
    """The folders below ``root``, breadth first."""

    found: list[Path] = []
    level = [root]
    for _ in range(3):
        below: list[Path] = []
        for folder in level:
            below += _folders_in(folder)
            if len(found) + len(below) >= FOLDERS:
                return [*found, *below][:FOLDERS]
        found, level = [*found, *below], below
    return found


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _posix(text: str, root: str) -> str:
    """A ``file://`` URL, a path from ``~`` or a Windows path as a path of this machine."""
    if text[:5].lower() == "file:":
        return unquote(urlsplit(text).path)
    if text.startswith("~/"):
        return os.path.expanduser(text)
    # A backslash may be part of a name here.
    if "\\" in text and not os.path.lexists(os.path.join(root, text)):
        return text.replace("\\", "/")
    return text


def has_image_suffix(text: str) -> bool:
    """Whether a text ends like an image file, or like one with the number of a caption."""
    return os.path.splitext(_NUMBER.sub("", text))[1].lower() in SUFFIXES


def is_url(text: str) -> bool:
    """Whether a text is the URL of something that is not a local file."""
    return "://" in text[:20] and text[:5].lower() != "file:"


def decode_inline(text: str) -> bytes | None:
    """The bytes of an image in base64, with or without a data URL before it; None for a path."""
    match = _DATA_URL.match(text)
    if match is None and (len(text) < _SHORTEST_INLINE or not text.startswith(_FIRST_BYTES)):
        return None
    code = text[match.end() :] if match else text
    try:
        return base64.b64decode(code + "=" * (-len(code) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
