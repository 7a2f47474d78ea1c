"""Folders of images: with sidecar captions, by class, or plain."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from clipkit.data.images import SUFFIXES, Skipped, find_images
from clipkit.data.source import RowDict, Source, fingerprint_of, in_memory, is_damaged, to_batches
from clipkit.errors import DataError

FOLDER_KINDS = ("sidecars", "classes", "folder")
_SIDECAR_LIMIT = 1 << 20  # bytes


def open_image(path: Path) -> Source:
    """A single image file as a source of one row."""
    row = _row(path.parent, path.name)
    prints = fingerprint_of([(path.name, path)])
    rows = in_memory(to_batches([row], 1), [])
    return Source(str(path), "image", rows, path.parent, prints, [])


def open_folder(root: Path) -> Source:
    """A folder of images, searched to its depth.

    A text file beside an image (``a.jpg``, ``a.txt``) holds its captions, one a line. Where there
    is none and every image lies in a sub-folder, the first-level sub-folders are the labels.

    Raises:
        DataError: it holds no image that can be used.
    """
    keys, skipped = find_images(root)
    source = _open_keys(root, keys, skipped)
    if not source.count:
        raise DataError(_nothing_in(root, skipped))
    return source


def open_images(paths: Sequence[Path], root: Path) -> Source:
    """Several image files and folders below ``root`` as one source, with keys relative to it.

    Raises:
        DataError: a path does not exist or is neither an image nor a folder.
    """
    keys: set[str] = set()
    skipped: list[Skipped] = []
    for path in paths:
        place = path.relative_to(root).as_posix()
        if path.is_dir():
            below = "" if place == "." else f"{place}/"
            found, left_out = find_images(path)
            keys |= {below + key for key in found}
            skipped += [Skipped(below + item.key, item.reason) for item in left_out]
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            keys.add(place)
        else:
            what = "is not an image" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}; several DATA must be image files or folders of images")
    return _open_keys(root, sorted(keys), skipped)


def _open_keys(root: Path, keys: Sequence[str], skipped: list[Skipped]) -> Source:
    sidecars = {key: sidecar for key in keys if (sidecar := _sidecar(root / key)).is_file()}
    if sidecars:
        kind = "sidecars"
    else:
        kind = "classes" if keys and all("/" in key for key in keys) else "folder"

    def rows() -> Iterator[RowDict]:
        for key in keys:
            row = _row(root, key)
            if kind == "classes":
                row["label"] = key.partition("/")[0]
            try:
                row["captions"] = _read_captions(sidecars[key]) if key in sidecars else []
            except DataError as error:
                # The picture is good: it can be embedded and classified all the same.
                skipped.append(Skipped(key, str(error)))
            yield row

    files = [(key, root / key) for key in keys]
    files += [(f"{key}.txt", sidecar) for key, sidecar in sidecars.items()]
    prints = fingerprint_of(files, kind)
    table = in_memory(to_batches(rows(), 4096), skipped)
    return Source(str(root), kind, table, root, prints, skipped)


def texts_without_image(root: Path) -> list[str]:
    """Text files that lie among images like captions, with no image of their name beside them."""
    keys = [PurePosixPath(key) for key in find_images(root)[0]]
    stems = {key.with_suffix("") for key in keys}
    return sorted(
        text.as_posix()
        for folder in {key.parent for key in keys}
        for file in (root / folder).glob("*.txt")
        if (text := folder / file.name).with_suffix("") not in stems
    )


def _row(root: Path, key: str) -> RowDict:
    image = {"bytes": None, "path": str(root / key)}
    return {"key": key, "image": image, "captions": [], "label": None}


def _sidecar(image: Path) -> Path:
    return image.with_suffix(".txt")


def _read_captions(sidecar: Path) -> list[str]:
    try:
        if sidecar.stat().st_size > _SIDECAR_LIMIT:
            raise DataError(f"its sidecar text is larger than {_SIDECAR_LIMIT} bytes")
        text = sidecar.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("its sidecar text is not UTF-8") from None
    except OSError as error:
        raise DataError(f"its sidecar text cannot be read: {error.strerror}") from None
    if is_damaged(text):
        raise DataError("its sidecar text is not UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _nothing_in(root: Path, skipped: list[Skipped]) -> str:
    if skipped:
        first = f"{skipped[0].key} {skipped[0].reason}"
        return f"{root} holds no image that can be used ({first}, and {len(skipped) - 1} more)"
    tables = sorted(path.name for path in root.iterdir() if path.suffix in (".parquet", ".tar"))
    if tables:
        glob = root / f"*{Path(tables[0]).suffix}"
        return f"{root} holds no images but {tables[0]}; name '{glob}' to read such files"
    return f"{root} holds no images, expected a folder of images, a table or a saved dataset"
