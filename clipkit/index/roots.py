"""Roots: where the images of an index lie, so that two folders' keys never mean one item.

The source an index was built of has the empty prefix: keys are relative to it. Every other one that
is added has a prefix of its own, and ``PREFIX/KEY`` are its keys. The manifest lists them under
``source.roots``.
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
"""Kinds of source that are a folder, whose sub-folders are folders of images as well."""


@dataclass(frozen=True)
class Root:
    """Where some of the images of an index lie.

    Attributes:
        prefix: what their keys begin with, without the slash; empty for the first.
        where: what opens them: a directory or file as an absolute path, or a name of the hub.
        folder: whether it is a folder of images.
    """

    prefix: str
    where: str
    folder: bool

    def key(self, key: str) -> str:
        """The key in the index of what has ``key`` in this root."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def __str__(self) -> str:
        return f"{self.where} (as {self.prefix}/)" if self.prefix else self.where


@dataclass(frozen=True)
class Scope:
    """A root, or a sub-folder of one: ``below`` is its path within the root."""

    root: Root
    below: str = ""

    def key(self, key: str) -> str:
        """The key in the index of what has ``key`` in this scope."""
        return self.root.key(f"{self.below}/{key}" if self.below else key)


def root_of(source: dict[str, Any], prefix: str = "") -> Root:
    """The root of a store or index, by the ``source`` of its manifest, or of an opened source.

    ``source`` has the spec under which it was opened, its kind, and the directory it lies in.
    """
    spec, kind, root = str(source.get("spec", "")), source.get("kind"), source.get("root")
    if kind in FOLDERS and root:
        return Root(prefix, str(root), True)
    if kind in ("hub", None):
        return Root(prefix, spec, False)
    if kind == "saved" and root:
        _, colon, split = os.path.basename(spec).partition(":")
        return Root(prefix, f"{root}{colon}{split}", False)
    # A relative name was meant from where embed ran; a table lies in its own root.
    complete = os.path.isabs(spec) or not root
    return Root(
        prefix, spec if complete else os.path.join(str(root), os.path.basename(spec)), False
    )


def roots_of(manifest: Manifest) -> list[Root]:
    """All roots of an index, the one it was built of first."""
    listed = manifest.source.get("roots")
    if not listed:
        return [root_of(manifest.source)]
    try:
        return [Root(**one) for one in listed]
    except TypeError as error:
        raise ArtifactError(
            f"the manifest of the index lists no roots that can be read ({error}); build it again"
        ) from None


def with_roots(source: dict[str, Any], roots: Iterable[Root]) -> dict[str, Any]:
    """The ``source`` of a manifest with these roots."""
    return {**source, "roots": [asdict(root) for root in roots]}


def owner(roots: Sequence[Root], key: str) -> Root:
    """The root that a key of the index belongs to."""
    fitting = [root for root in roots if not root.prefix or key.startswith(f"{root.prefix}/")]
    return max(fitting, key=lambda root: len(root.prefix))


def file_of(roots: Sequence[Root], key: str) -> Path | None:
    """The file of a key of the index, links followed; None where it has none, or none any more.

    Keys come with the index: they name files below their own root, and no others.
    """
    root = owner(roots, key)
    if not os.path.isabs(root.where):  # of the hub
        return None
    try:
        # Paths in a table are relative to where it lies.
        base = Path(root.where if root.folder else os.path.dirname(root.where)).resolve(strict=True)
        file = (base / key[len(root.key("")) :]).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links that go in a circle
        return None
    return file if file.is_relative_to(base) and file.is_file() else None


def find_scope(roots: list[Root], wanted: Root, *, whole: bool = True) -> Scope | None:
    """Where a source lies within the roots of an index; None where it lies in none of them.

    Args:
        roots: those of the index.
        wanted: the source.
        whole: whether all images of its folder are meant.

    Raises:
        ArtifactError: a root is inside the source, whose images would be indexed twice.
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
                f"{inner} contains {outer}, whose images the index holds already; build an index "
                f"of {inner}, or add its other folders one by one"
            )
    return None


def new_root(roots: list[Root], keys: Iterable[str], wanted: Root, prefix: str | None) -> Root:
    """A root whose keys differ from all others.

    Args:
        roots: those of the index.
        keys: what the index holds.
        wanted: the root to add.
        prefix: first part of its keys; None: the name of its folder or file, with a number
            behind it where that is taken.

    Raises:
        ArtifactError: ``prefix`` is taken, by another root or by keys, or is not a relative path.
    """
    firsts = {key.partition("/")[0] for key in keys if "/" in key}
    firsts |= {root.prefix.partition("/")[0] for root in roots}
    if prefix is None:
        name = os.path.basename(wanted.where.rstrip("/")).partition(".")[0] or "more"
        numbered = (name if n == 1 else f"{name}-{n}" for n in count(1))
        prefix = next(one for one in numbered if one not in firsts)
    if not prefix or "/" in prefix or prefix in (".", ".."):
        raise ArtifactError(
            f"{prefix!r} cannot be what the keys of {wanted.where} begin with; expected one word "
            "without a slash after --prefix"
        )
    if prefix in firsts:
        raise ArtifactError(
            f"the keys of {wanted.where} would begin with {prefix}/, and so do others of the index "
            "already; name another --prefix"
        )
    return replace(wanted, prefix=prefix)
