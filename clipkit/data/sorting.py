"""Pictures put into a folder for each class, as copies or links; the originals stay."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from clipkit.errors import ArtifactError
from clipkit.manifest import move_into_place, partial_path


class SortedFolder:
    """Fills a new folder; it appears when it is finished. Used in a ``with`` statement.

    Args:
        path: where it shall stand; must be empty, or not exist.
        link: symbolic links to the pictures' files instead of copies.

    Raises:
        ArtifactError: ``path`` is not empty, or cannot be written.
    """

    def __init__(self, path: Path, link: bool) -> None:
        self.path, self.link = Path(os.path.abspath(path)), link
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ArtifactError(
                f"{path} exists and is not empty, expected a new folder for the sorted pictures; "
                "name another one"
            )
        self._temp = partial_path(self.path)
        self._taken: set[Path] = set()
        shutil.rmtree(self._temp, ignore_errors=True)
        try:
            self._temp.mkdir(parents=True)
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be written ({error.strerror}); name another place"
            ) from None

    def __enter__(self) -> Self:
        return self

    def add(self, classes: Sequence[str], key: str, image: dict[str, Any]) -> None:
        """Put one picture into the folder of its class.

        Args:
            classes: the folders from outside in: ``("animal", "fox")``.
            key: the picture's; the file keeps the last part of it, numbered where it is taken.
            image: ``{"bytes": …, "path": …}``.

        Raises:
            ArtifactError: a link to a picture that has no file of its own.
        """
        folder = self._temp.joinpath(*map(_file_name, classes))
        folder.mkdir(parents=True, exist_ok=True)
        target = self._free(folder / _file_name(PurePosixPath(key).name))
        if self.link:
            if image["bytes"] is not None:
                raise ArtifactError(
                    f"{key} lies inside a table or tar, expected a file of its own to link to; "
                    "leave --link out to copy it"
                )
            target.symlink_to(os.path.abspath(image["path"]))
        elif image["bytes"] is not None:
            target.write_bytes(image["bytes"])
        else:
            shutil.copy2(image["path"], target)

    def _free(self, target: Path) -> Path:
        place, number = target, 1
        while place in self._taken:
            number += 1
            place = target.with_name(f"{target.stem}-{number}{target.suffix}")
        self._taken.add(place)
        return place

    def finish(self) -> None:
        """Move the folder into place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.rmdir()
        move_into_place(self._temp, self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._temp, ignore_errors=True)


def _file_name(text: str) -> str:
    """A name for a file or folder: no slash, no control character, no dot before it."""
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", text).strip()[:200]
    return f"_{name.lstrip('.')}" if name.startswith(".") or not name else name
