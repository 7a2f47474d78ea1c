"""Roots: the sources of the images of an index, each with its own key prefix.

Keys from the source that the index was built from have no prefix. Every source added later has a
unique prefix, and its keys are ``PREFIX/KEY``, so that two folders never share a key. The manifest
lists the roots under ``source.roots``.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from clipkit.artifacts import Manifest
from clipkit.errors import ArtifactError

FOLDERS = ("folder", "sidecars", "classes", "metadata")
"""Kinds of source that are folders; their sub-folders are folders of images, too."""


@dataclass(frozen=True)
class Root:
    """One source of the images of an index.

    Attributes:
        prefix: the prefix of its keys, without the slash; empty for the first root.
        where: the absolute path of a directory or file, or the name of a hub dataset.
        folder: whether it is a folder of images.
        base: the folder that keys are relative to, if ``where`` is a table and its images are
            elsewhere.
    """

    prefix: str
    where: str
    folder: bool
    base: str = ""

    def key(self, key: str) -> str:
        """The index key of the item that has ``key`` in this root."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def relative(self, key: str) -> str:
        """The key within this root of the item that has ``key`` in the index."""
        return key[len(self.prefix) + 1 :] if self.prefix else key

    def __str__(self) -> str:
        return f"{self.where} (as {self.prefix}/)" if self.prefix else self.where


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
    if kind in FOLDERS and root:
        return Root(prefix, str(root), True)
    if kind in ("hub", None):
        return Root(prefix, spec, False)
    if kind == "saved" and root:
        _, colon, split = os.path.basename(spec).partition(":")
        return Root(prefix, f"{root}{colon}{split}", False)
    # A relative path is relative to the directory where embed ran; a table is its own root.
    where = str(source.get("table", spec))
    if root and not os.path.isabs(where):
        where = os.path.join(str(root), os.path.basename(spec))
    base = str(root) if root and kind != "tars" and str(root) != os.path.dirname(where) else ""
    return Root(prefix, where, False, base)


def roots_of(manifest: Manifest) -> list[Root]:
    """All roots of an index, starting with the one it was built from."""
    listed = manifest.source.get("roots")
    if not listed:
        return [root_of(manifest.source)]
    try:
        return [Root(**one) for one in listed]
    except TypeError as error:
        raise ArtifactError(
            f"the manifest of the index has a malformed list of roots ({error}); rebuild it"
        ) from None


def with_roots(source: dict[str, Any], roots: Iterable[Root]) -> dict[str, Any]:
    """Return the ``source`` of a manifest with these roots."""
    return {**source, "roots": [asdict(root) for root in roots]}


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


def find_scope(roots: list[Root], wanted: Root, *, whole: bool = True) -> Scope | None:
    """Locate a source within the roots of an index; None if it is in none of them.

    Args:
        roots: the roots of the index.
        wanted: the source.
        whole: whether the source covers all images of its folder.

    Raises:
        ArtifactError: a root is inside the source, so its images would be indexed twice.
    """
    for root in roots:
        if root.where and root.where == wanted.where:
            return Scope(root)
        if not (root.folder and wanted.folder):
            continue
        outer, inner = Path(root.where), Path(wanted.where)
        if inner.is_relative_to(outer):
            return Scope(root, inner.relative_to(outer).as_posix())
        if whole and outer.is_relative_to(inner):
            raise ArtifactError(
                f"{inner} contains {outer}, whose images are already in the index; build an index "
                f"of {inner}, or add its other folders one by one"
            )
    return None


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
