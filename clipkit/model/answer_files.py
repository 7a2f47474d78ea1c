"""Answers as files: a table, a page, a contact sheet, folders of pictures."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from clipkit.data.sorting import SortedFolder
from clipkit.data.sources import row_image
from clipkit.data.thumbnails import contact_sheet, thumbnail
from clipkit.errors import ArtifactError, ImageError
from clipkit.manifest import write_text
from clipkit.model.answers import Answer
from clipkit.pages.classified import Card, Classes, render_classified

MOST_PICTURES = 400
"""Pictures on a page or a sheet, the first ones: some 3 MB."""
FORMS = (".csv", ".json", ".jsonl", ".html", ".png", ".jpg")


class AnswerFiles:
    """Writes answers to files as they come; used in a ``with`` statement.

    Left by an exception it leaves nothing behind.

    Args:
        files: ``.csv`` (a line an image), ``.json`` or ``.jsonl`` (an object a line), ``.html``
            (a page with pictures), ``.png`` or ``.jpg`` (a contact sheet). What stands there is
            replaced.
        folder: where to put the pictures, in a folder for each label; None: nowhere.
        link: put symbolic links there instead of copies.
        lead: a sentence for the page.

    Raises:
        ArtifactError: a form that is not known, or a folder that is not empty.
    """

    def __init__(
        self, files: Sequence[Path], folder: Path | None, *, link: bool = False, lead: str = ""
    ) -> None:
        for file in files:
            if file.suffix.lower() not in FORMS:
                raise ArtifactError(
                    f"{file} has no form that answers are written in, expected one of "
                    f"{', '.join(FORMS)}; name it so"
                )
        self._lead, self._stack = lead, ExitStack()
        self._tables: list[tuple[IO[str], Path, Path, Callable[[IO[str], Answer], None]]] = []
        self._drawn = [file for file in files if file.suffix.lower() in (".html", ".png", ".jpg")]
        self._kept: list[tuple[Answer, bytes]] = []
        self._counts: Counter[str] = Counter()
        self._folder = self._stack.enter_context(SortedFolder(folder, link)) if folder else None
        for file in files:
            if file not in self._drawn:
                self._open(file)

    def _open(self, file: Path) -> None:
        temp = file.with_name(f".{file.name}.tmp")
        try:
            stream = temp.open("w", encoding="utf-8", newline="")
        except OSError as error:
            self._stack.close()
            raise ArtifactError(
                f"{file} cannot be written ({error.strerror}); name another place"
            ) from None
        self._stack.callback(temp.unlink, missing_ok=True)
        self._stack.enter_context(stream)
        write = _write_json if file.suffix.lower() != ".csv" else _write_csv(stream)
        self._tables.append((stream, temp, file, write))

    def __enter__(self) -> Self:
        return self

    def add(self, answer: Answer) -> None:
        """Write one answer."""
        self._counts[answer.label] += 1
        for stream, _, _, write in self._tables:
            write(stream, answer)
        if self._folder:
            path = getattr(answer.predictions[0].label, "path", (answer.label,))
            self._folder.add((answer.label,) if answer.rejected else path, answer.key, answer.image)
        if self._drawn and len(self._kept) < MOST_PICTURES:
            self._kept.append((answer, thumbnail(_picture(answer.image))))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        for stream, temp, file, _ in self._tables:
            stream.close()
            temp.replace(file)
        for file in self._drawn:
            if file.suffix.lower() == ".html":
                write_text(file, render_classified(self._page()))
            else:
                pictures = [(answer.label, data) for answer, data in self._kept]
                contact_sheet(sorted(pictures, key=lambda one: one[0]), file)
        if self._folder:
            self._folder.finish()

    def _page(self) -> Classes:
        cards = [
            Card(
                answer.key,
                picture,
                answer.label,
                [(one.label, one.score) for one in answer.predictions],
                answer.shows_any,
            )
            for answer, picture in self._kept
        ]
        return Classes(self._lead, self._counts.most_common(), cards)


def _picture(image: dict[str, Any]) -> Any:
    try:
        return row_image({"image": image})
    except ImageError as error:  # it was read a moment ago
        raise ArtifactError(f"a picture changed while it was classified: it {error}") from None


def _write_json(stream: IO[str], answer: Answer) -> None:
    stream.write(json.dumps(answer.to_dict(), ensure_ascii=False) + "\n")


def _write_csv(stream: IO[str]) -> Callable[[IO[str], Answer], None]:
    writer = csv.writer(stream)
    begun = False

    def write(_: IO[str], answer: Answer) -> None:
        nonlocal begun
        row: dict[str, Any] = {
            "key": answer.key,
            "label": answer.label,
            "probability": answer.score,
        }
        if answer.shows_any is not None:
            row["shows_any"] = answer.shows_any
        if answer.groups:
            row["group"], row["group_probability"] = answer.groups[0].label, answer.groups[0].score
        for place, one in enumerate(answer.predictions, 1):
            row[f"label_{place}"], row[f"probability_{place}"] = one.label, one.score
        if not begun:
            begun = True
            writer.writerow(row)
        writer.writerow(row.values())

    return write
