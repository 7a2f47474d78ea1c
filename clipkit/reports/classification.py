"""The files that a classification is written to: tables, HTML pages, contact sheets, folders."""

import csv
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from html import escape
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Self

from clipkit.artifacts import move_into_place, partial_path, replacing, write_text
from clipkit.classifiers.predictions import Prediction
from clipkit.data.rows import StoredImage
from clipkit.display.html import bar, data_uri, document
from clipkit.display.thumbnails import contact_sheet, thumbnail
from clipkit.errors import ArtifactError, ImageError

SHEET_FORMATS = (".png", ".jpg", ".jpeg")
STDOUT = Path("-")
MOST_IMAGES = 400
"""Images on a page or contact sheet, about 3 MB."""
_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem;
  margin-top: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .8rem; display: grid; grid-template-columns: 96px 1fr; gap: .8rem; }
.card img { width: 96px; border-radius: 8px; display: block; } figure { margin: 0; }
figcaption { font-size: .75rem; overflow-wrap: anywhere; margin-top: .3rem; }
.score { display: grid; grid-template-columns: 5.5rem 1fr 2.6rem; gap: .5rem; align-items: center;
  font-size: .85rem; overflow-wrap: anywhere; } .score span:last-child { text-align: right; }
.best { font-weight: 600; }
"""


class PredictionFiles:
    """Writes predictions to files one by one; use it in a ``with`` statement.

    An exception leaves nothing behind. Existing files are replaced.

    Args:
        csv: a table with a row for each image; ``-`` prints it.
        html: a page with images.
        sheet: a contact sheet, PNG or JPEG.
        folder: a new folder for the images, with a sub-folder for each label.
        link: add symbolic links to the folder instead of copies.
        lead: a sentence at the top of the page.

    Raises:
        ArtifactError: the contact sheet has an unknown format, a file cannot be written, or the
            folder is not empty.
    """

    def __init__(
        self,
        csv: Path | None = None,
        html: Path | None = None,
        sheet: Path | None = None,
        folder: Path | None = None,
        *,
        link: bool = False,
        lead: str = "",
    ) -> None:
        if sheet and sheet.suffix.lower() not in SHEET_FORMATS:
            raise ArtifactError(
                f"cannot write a contact sheet to {sheet}, expected a name that ends in "
                f"{', '.join(SHEET_FORMATS)}"
            )
        self._html, self._sheet, self._lead = html, sheet, lead
        self._stack = ExitStack()
        self._shown: list[tuple[Prediction, bytes]] = []
        self._counts: Counter[str] = Counter()
        self._folder = self._stack.enter_context(SortedFolder(folder, link)) if folder else None
        self._write: Callable[[Prediction], None] | None = None
        if csv:
            with self._stack:  # closes what is open if the table cannot be
                self._write = _csv_writer(self._open(csv))
                self._stack = self._stack.pop_all()

    def _open(self, file: Path) -> IO[str]:
        """A stream whose content replaces ``file`` at the end of the ``with`` statement."""
        if file == STDOUT:
            return sys.stdout
        temp = self._stack.enter_context(replacing(file))
        try:
            return self._stack.enter_context(temp.open("w", encoding="utf-8", newline=""))
        except OSError as error:
            raise ArtifactError(f"cannot write to {file} ({error.strerror})") from None

    def __enter__(self) -> Self:
        return self

    def add(self, prediction: Prediction) -> None:
        """Write one prediction, which has its image."""
        self._counts[prediction.label] += 1
        if self._write:
            self._write(prediction)
        image = prediction.image or StoredImage()
        if self._folder:
            path = () if prediction.rejected else prediction.top[0].path
            self._folder.add(path or (prediction.label,), prediction.key, image)
        if (self._html or self._sheet) and len(self._shown) < MOST_IMAGES:
            try:
                self._shown.append((prediction, thumbnail(image.read())))
            except ImageError as error:  # it was readable a moment ago
                raise ArtifactError(
                    f"{prediction.key} changed during the classification: it {error}"
                ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def _finish(self) -> None:
        if self._html:
            page = render_predictions(self._shown, self._counts.most_common(), self._lead)
            write_text(self._html, page)
        if self._sheet:
            images = [(prediction.label, jpeg) for prediction, jpeg in self._shown]
            sheet = contact_sheet(sorted(images, key=lambda one: one[0]))
            with replacing(self._sheet) as temp:
                sheet.save(temp, "PNG" if self._sheet.suffix.lower() == ".png" else "JPEG")
        if self._folder:
            self._folder.finish()


def _csv_writer(stream: IO[str]) -> Callable[[Prediction], None]:
    writer, started = csv.writer(stream), False

    def write(prediction: Prediction) -> None:
        nonlocal started
        row = prediction.to_row()
        if not started:
            started = True
            writer.writerow(row)
        writer.writerow(row.values())

    return write


def render_predictions(
    shown: Sequence[tuple[Prediction, bytes]], counts: Sequence[tuple[str, int]], lead: str
) -> str:
    """One self-contained HTML page: inline images, no script, light and dark.

    Args:
        shown: predictions with their images as JPEG.
        counts: the number of images of each label.
        lead: a sentence at the top.
    """
    total = sum(count for _, count in counts)
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count}</td>'
        f'<td class="bar">{bar(count / total)}</td><td class="n">{count / total:.1%}</td></tr>'
        for name, count in counts
    )
    head = '<th>label</th><th class="n">images</th><th class="bar"></th><th class="n">share</th>'
    more = "" if len(shown) == total else f", the first {len(shown):,} of {total:,}"
    body = (
        f"<h2>Predicted labels</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table><h2>Images{more}</h2>"
        f'<div class="cards">{"".join(_card(one, jpeg) for one, jpeg in shown)}</div>'
    )
    return document("Classified images", lead, body, "Written by clipkit classify.", _STYLE)


def _card(prediction: Prediction, jpeg: bytes) -> str:
    scores = "".join(
        f'<div class="score{" best" if one.label == prediction.label else ""}">'
        f"<span>{escape(one.label)}</span>{bar(one.score)}<span>{one.score:.0%}</span></div>"
        for one in prediction.top
    )
    shows = ""
    if prediction.shows_any is not None:
        label = escape(prediction.label)
        shows = f'<p class="soft">{label}; any of the labels: {prediction.shows_any:.0%}</p>'
    return (
        f'<div class="card"><figure>{inline_image(jpeg, prediction.key)}'
        f"<figcaption>{escape(prediction.key)}</figcaption></figure><div>{scores}{shows}</div></div>"
    )


def inline_image(jpeg: bytes, name: str) -> str:
    """An image element with its content."""
    return f'<img src="{data_uri(jpeg)}" alt="{escape(name)}" loading="lazy">'


class SortedFolder:
    """A new folder with a sub-folder for each label; use it in a ``with`` statement.

    The folder appears when ``finish`` is called, and an exception before that leaves nothing.

    Args:
        path: the folder; must be empty or missing.
        link: add symbolic links instead of copies.

    Raises:
        ArtifactError: ``path`` is not empty, or cannot be written.
    """

    def __init__(self, path: Path, link: bool) -> None:
        self.path, self.link = Path(os.path.abspath(path)), link
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ArtifactError(
                f"{path} exists and is not empty, expected a new folder for the sorted images"
            )
        self._temp = partial_path(self.path)
        self._taken: set[Path] = set()
        shutil.rmtree(self._temp, ignore_errors=True)
        try:
            self._temp.mkdir(parents=True)
        except OSError as error:
            raise ArtifactError(f"cannot write to {path} ({error.strerror})") from None

    def __enter__(self) -> Self:
        return self

    def add(self, classes: Sequence[str], key: str, image: StoredImage) -> None:
        """Add one image to the folder of its label.

        Args:
            classes: the folders, outermost first: ``("animal", "fox")``.
            key: the key of the image. The file gets its last part, with a number if that is taken.
            image: the image.

        Raises:
            ArtifactError: a link to an image that is not a file.
        """
        folder = self._temp.joinpath(*map(_file_name, classes))
        folder.mkdir(parents=True, exist_ok=True)
        target = self._free(folder / _file_name(PurePosixPath(key).name))
        if self.link:
            if image.data is not None:
                raise ArtifactError(
                    f"cannot link to {key}, which is inside a table or tar; leave out --link to "
                    "copy it"
                )
            target.symlink_to(os.path.abspath(str(image.path)))
        elif image.data is not None:
            target.write_bytes(image.data)
        else:
            shutil.copy2(str(image.path), target)

    def _free(self, target: Path) -> Path:
        place, number = target, 1
        while place in self._taken:
            number += 1
            place = target.with_name(f"{target.stem}-{number}{target.suffix}")
        self._taken.add(place)
        return place

    def finish(self) -> None:
        """Move the folder to its place."""
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
    """A valid name for a file or folder: no slash, control character or leading dot."""
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", text).strip()[:200]
    return f"_{name.lstrip('.')}" if name.startswith(".") or not name else name
