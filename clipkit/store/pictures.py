"""Pictures that lie inside the tables and tars an index was built of, by its keys."""

import threading

from clipkit.data.inside import Pictures, holds_pictures, open_pictures
from clipkit.store.roots import Root, owner


class InsidePictures:
    """Pictures inside tables, tars and saved data sets; each of these is opened once.

    No part of a key becomes a path. Safe to ask from several threads.

    Args:
        roots: where the images of the index lie.
    """

    def __init__(self, roots: list[Root]) -> None:
        self._roots = roots
        self._opened: dict[str, Pictures] = {}
        self._lock = threading.Lock()

    def hold(self, key: str) -> bool:
        """Whether the picture of a key, if there is any, lies inside something."""
        root = owner(self._roots, key)
        return not root.folder and holds_pictures(root.where)

    def open(self, key: str) -> Pictures:
        """What should hold the picture of a key; raises DataError where it cannot be opened."""
        where = owner(self._roots, key).where
        with self._lock:
            if where not in self._opened:
                self._opened[where] = open_pictures(where)
            return self._opened[where]

    def read(self, key: str) -> bytes | None:
        """The content of a picture; None where there is none of that key.

        Raises:
            DataError: what should hold it is not there any more, or damaged.
        """
        return self.open(key).read(key[len(owner(self._roots, key).key("")) :])
