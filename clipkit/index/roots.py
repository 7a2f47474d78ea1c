"""Roots: the sources of the images of an index, each with its own key prefix.

Keys from the source that the index was built from have no prefix. Every source added later has a
unique prefix, and its keys are ``PREFIX/KEY``, so that two folders never share a key. The manifest
lists the roots under ``source.roots``.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from glob import has_magic
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from clipkit.artifacts import Manifest
from clipkit.errors import ArtifactError

FOLDERS = ("folder", "sidecars", "classes", "metadata")
"""Kinds of source that are folders; their sub-folders are folders of images, too."""

_ALWAYS = ("prefix", "where", "folder")
"""Fields of a root that a manifest has even if they are empty."""


@dataclass(frozen=True)
class Root:
    """One source of the images of an index.

    Attributes:
        prefix: the prefix of its keys, without the slash; empty for the first root.
        where: the absolute path of a directory or file, or the name of a hub dataset; empty for
            what was given as Python objects.
        folder: whether it is a folder of images.
        base: the folder that keys are relative to, if ``where`` is a table and its images are
            elsewhere.
        listed: the paths and patterns of its images, as in ``Source``; empty for all of ``where``.
        columns: the names of its columns and its encoding, as in ``Source``.
    """

    prefix: str
    where: str
    folder: bool
    base: str = ""
    listed: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)

    def key(self, key: str) -> str:
        """The index key of the item that has ``key`` in this root."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def relative(self, key: str) -> str:
        """The key within this root of the item that has ``key`` in the index."""
        return key[len(self.prefix) + 1 :] if self.prefix else key

    def __str__(self) -> str:
        where = self.where or "objects in memory"
        return f"{where} (as {self.prefix}/)" if self.prefix else where


@dataclass(frozen=True)
class Scope:
    """A root, or a sub-folder of one: ``below`` is its path within the root."""

    root: Root
    below: str = ""

    def key(self, key: str) -> str:
        """The index key of the item that has ``key`` in this scope."""
        return self.root.key(f"{self.below}/{key}" if self.below else key)


def root_of(source: dict[str, Any], prefix: str = "") -> Root:
    """The root that ``source`` describes: the field of a manifest, or of an opened source.

    ``source`` contains the spec it was opened with, its kind and its directory.
    """
    spec, kind, root = str(source.get("spec", "")), source.get("kind"), source.get("root")
    listed, columns = tuple(source.get("listed", ())), source.get("columns", {})
    if kind == "image" and root:
        return Root(prefix, str(root), True, listed=(os.path.basename(spec),))
    if kind in FOLDERS and root:
        return Root(prefix, str(root), True, listed=listed, columns=columns)
    if kind == "pairs":
        return Root(prefix, "", False)
    if kind in ("hub", None):
        return Root(prefix, spec, False, columns=columns)
    if kind == "saved" and root:
        _, colon, split = os.path.basename(spec).partition(":")
        return Root(prefix, f"{root}{colon}{split}", False, columns=columns)
    # A relative path is relative to the directory where embed ran; a table is its own root.
    where = str(source.get("table", spec))
    if root and not os.path.isabs(where):
        where = os.path.join(str(root), os.path.basename(spec))
    inside = kind in ("tars", "zip")
    base = str(root) if root and not inside and str(root) != os.path.dirname(where) else ""
    return Root(prefix, where, False, base, listed, columns)


def roots_of(manifest: Manifest) -> list[Root]:
    """All roots of an index, starting with the one it was built from."""
    listed = manifest.source.get("roots")
    if not listed:
        return [root_of(manifest.source)]
    try:
        return [Root(**{**one, "listed": tuple(one.get("listed", ()))}) for one in listed]
    except TypeError as error:
        raise ArtifactError(
            f"the manifest of the index has a malformed list of roots ({error}); rebuild it"
        ) from None


def with_roots(source: dict[str, Any], roots: Iterable[Root]) -> dict[str, Any]:
    """Return the ``source`` of a manifest with these roots."""
    plain = [{**asdict(root), "listed": list(root.listed)} for root in roots]
    used = [
        {name: value for name, value in one.items() if value or name in _ALWAYS} for one in plain
    ]
    # What is listed can be long and is in the roots.
    return {**{n: v for n, v in source.items() if n != "listed"}, "roots": used}


def extended(roots: Sequence[Root], scope: Scope, wanted: Root) -> tuple[Scope, list[Root]]:
    """The scope and the roots of an index after the images of ``wanted`` are added to the scope."""
    root = scope.root
    if not root.listed:
        return scope, list(roots)
    below = [os.path.normpath(os.path.join(scope.below, name)) for name in wanted.listed or [""]]
    listed = () if "." in below else tuple(dict.fromkeys([*root.listed, *below]))
    new = replace(root, listed=listed)
    return Scope(new, scope.below), [new if one is root else one for one in roots]


def owner(roots: Sequence[Root], key: str) -> Root:
    """Return the root that a key of the index belongs to."""
    fitting = [root for root in roots if not root.prefix or key.startswith(f"{root.prefix}/")]
    return max(fitting, key=lambda root: len(root.prefix))


def file_of(roots: Sequence[Root], key: str) -> Path | None:
    """The file of a key of the index, with links resolved; None if it does not exist.

    Keys are untrusted: a key never names a file outside its own root.
    """
    root = owner(roots, key)
    if not os.path.isabs(root.where):  # a hub dataset
        return None
    try:
        # The image paths of a table are relative to its folder, or to another one.
        folder = root.where if root.folder else root.base or os.path.dirname(root.where)
        base = Path(folder).resolve(strict=True)
        file = (base / root.relative(key)).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: circular links
        return None
    return file if file.is_relative_to(base) and file.is_file() else None


def find_scope(roots: Sequence[Root], wanted: Root) -> Scope | None:
    """Locate a source within the roots of an index; None if it is in none of them.

    Args:
        roots: the roots of the index.
        wanted: the source.

    Raises:
        ArtifactError: the source has images of a root that is inside its folder, which would be
            indexed twice.
    """
    for root in roots:
        if root.where and root.where == wanted.where:
            return Scope(root)
        if not (root.folder and wanted.folder):
            continue
        outer, inner = Path(root.where), Path(wanted.where)
        if inner.is_relative_to(outer):
            return Scope(root, inner.relative_to(outer).as_posix())
        places = [inner / _plain(name) for name in wanted.listed] or [inner]
        if any(outer.is_relative_to(one) or one.is_relative_to(outer) for one in places):
            raise ArtifactError(
                f"{inner} contains {outer}, whose images are already in the index; build an index "
                f"of {inner}, or add its other folders one by one"
            )
    return None


def _plain(pattern: str) -> Path:
    """The folder or file that a pattern starts with."""
    plain = takewhile(lambda part: not has_magic(part) and "{" not in part, Path(pattern).parts)
    return Path(*plain)


def new_root(roots: list[Root], keys: Iterable[str], wanted: Root, prefix: str | None) -> Root:
    """Give a new root a key prefix that no other item of the index uses.

    Args:
        roots: the roots of the index.
        keys: the keys of the index.
        wanted: the root to add.
        prefix: the prefix; None uses the name of the folder or file, followed by a number if that
            name is taken.

    Raises:
        ArtifactError: ``prefix`` is used by another root or by keys, or is not a single word.
    """
    firsts = {key.partition("/")[0] for key in keys if "/" in key}
    firsts |= {root.prefix.partition("/")[0] for root in roots}
    if prefix is None:
        name = os.path.basename(wanted.where.rstrip("/")).partition(".")[0] or "more"
        numbered = (name if n == 1 else f"{name}-{n}" for n in count(1))
        prefix = next(one for one in numbered if one not in firsts)
    if not prefix or "/" in prefix or prefix in (".", ".."):
        raise ArtifactError(
            f"{prefix!r} is not a valid key prefix for {wanted.where}; expected --prefix with one "
            "word and no slash"
        )
    if prefix in firsts:
        raise ArtifactError(
            f"the key prefix {prefix}/ for {wanted.where} is already used in the index; "
            "choose another --prefix"
        )
    return replace(wanted, prefix=prefix)
