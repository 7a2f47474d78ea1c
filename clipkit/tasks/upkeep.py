"""Look after an index: ``clipkit index remove`` and ``clipkit index compact``."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from clipkit.errors import ArtifactError
from clipkit.store.vector_index import VectorIndex
from clipkit.store.writer import IndexWriter


def remove_items(index: str | Path, names: Sequence[str]) -> list[str]:
    """Take images out of an index, all of them or none.

    Args:
        index: the index.
        names: keys, or patterns such as ``holiday/*``, in which ``*`` also stands for slashes.

    Returns:
        The keys that were removed, in the index's order.

    Raises:
        ArtifactError: a key is not held, a pattern fits none, or another process is writing.
    """
    with IndexWriter(index) as writer:
        keys = writer.index.keys
        held, chosen = set(keys), set()
        for name in names:
            if name in held or not any(sign in name for sign in "*?["):
                chosen.add(name)
                continue
            fitting = {key for key in keys if fnmatchcase(key, name)}
            if not fitting:
                raise ArtifactError(
                    f"no key of {index} fits the pattern {name!r}, nothing is removed; `clipkit "
                    "search INDEX` shows keys as they are"
                )
            chosen |= fitting
        writer.remove(sorted(chosen))
        writer.commit()
    return [key for key in keys if key in chosen]


def compact_index(index: str | Path) -> VectorIndex:
    """Build an index anew of what it holds: trained on that, in one piece, without removed rows.

    Raises:
        ArtifactError: damaged, another process is writing, or the disk is full.
        SpecError: too few images are left to train its spec on.
    """
    with IndexWriter(index) as writer:
        return writer.commit(compact=True)
