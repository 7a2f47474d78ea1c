"""The page of classified images: pure functions from facts to HTML.

Pictures put into a folder for each class, as copies or links; the originals stay.

Answers as files: a table, a page, a contact sheet, folders of pictures.
"""

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self

from clipkit.artifacts import move_into_place, partial_path, write_text
from clipkit.classifiers.predictions import Answer
from clipkit.data.open_source import row_image
from clipkit.display.html import bar, data_uri, document
from clipkit.display.thumbnails import contact_sheet, thumbnail
from clipkit.errors import ArtifactError, ImageError


@dataclass(frozen=True)
class Card:
    """One image: its key, a JPEG, what it was taken for, its likeliest labels, and the probability
    that it shows any of them (None if that was not asked)."""

    key: str
    jpeg: bytes
    label: str
    guesses: Sequence[tuple[str, float]]
    shows_any: float | None


@dataclass(frozen=True)
class Classes:
    """All that the page tells: a sentence, how many images each label has, and the first images."""

    lead: str
    counts: Sequence[tuple[str, int]]
    cards: Sequence[Card]


STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem;
  margin-top: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .8rem; display: grid; grid-template-columns: 96px 1fr; gap: .8rem; }
.card img { width: 96px; border-radius: 8px; display: block; } figure { margin: 0; }
figcaption { font-size: .75rem; overflow-wrap: anywhere; margin-top: .3rem; }
.guess { display: grid; grid-template-columns: 5.5rem 1fr 2.6rem; gap: .5rem; align-items: center;
  font-size: .85rem; overflow-wrap: anywhere; } .guess span:last-child { text-align: right; }
.right { font-weight: 600; }
"""


def render_classified(page: Classes) -> str:
    """The page as one HTML file: pictures inline, no script, nothing fetched, light and dark."""
    total = sum(count for _, count in page.counts)
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count}</td>'
        f'<td class="bar">{bar(count / total)}</td><td class="n">{count / total:.1%}</td></tr>'
        for name, count in page.counts
    )
    head = '<th>label</th><th class="n">images</th><th class="bar"></th><th class="n">share</th>'
    more = "" if len(page.cards) == total else f", the first {len(page.cards):,} of {total:,}"
    body = (
        f"<h2>What they were taken for</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table><h2>The images{more}</h2>"
        f'<div class="cards">{"".join(map(_card, page.cards))}</div>'
    )
    return document("Classified images", page.lead, body, "Made by clipkit classify.", STYLE)


def picture(jpeg: bytes, name: str) -> str:
    """An inline image."""
    return f'<img src="{data_uri(jpeg)}" alt="{escape(name)}" loading="lazy">'


def _card(card: Card) -> str:
    guesses = "".join(
        f'<div class="guess{" right" if label == card.label else ""}"><span>{escape(label)}</span>'
        f"{bar(share)}<span>{share:.0%}</span></div>"
        for label, share in card.guesses
    )
    shows = ""
    if card.shows_any is not None:
        shows = f'<p class="soft">{escape(card.label)}; any of them: {card.shows_any:.0%}</p>'
    return (
        f'<div class="card"><figure>{picture(card.jpeg, card.key)}'
        f"<figcaption>{escape(card.key)}</figcaption></figure><div>{guesses}{shows}</div></div>"
    )


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
