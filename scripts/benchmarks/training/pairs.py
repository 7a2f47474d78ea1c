"""Photos and captions as files that both clipkit and open_clip_train read, for speed.py."""

import csv
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq


def draw_rows(
    captions: Sequence[Sequence[str]], count: int, generator: random.Random
) -> list[tuple[int, str]]:
    """Draw a photo and a caption for each row; all photos are used before one repeats.

    Args:
        captions: the captions of each photo, at least one.
        count: number of rows.
        generator: source of randomness.
    """
    turns = [generator.sample(of_photo, len(of_photo)) for of_photo in captions]
    rows: list[tuple[int, str]] = []
    turn = 0
    while len(rows) < count:
        photos = generator.sample(range(len(captions)), min(len(captions), count - len(rows)))
        rows += [(photo, turns[photo][turn % len(turns[photo])]) for photo in photos]
        turn += 1
    return rows


def write_pairs(source: Path, folder: Path, count: int) -> tuple[Path, list[str], bool]:
    """Write JPEG files and a CSV file of `count` rows.

    Returns:
        the CSV file, the captions of its rows, and whether any photo repeats.
    """
    table = pq.read_table(source, columns=["image", "captions"])
    table = table.filter([bool(captions) for captions in table["captions"].to_pylist()])
    rows = draw_rows(table["captions"].to_pylist(), count, random.Random(0))
    print(f"{count} rows from {len(table)} photos, each at most {-(-count // len(table))} times")
    images, files = table["image"], {}
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "caption"])
        for number, (photo, caption) in enumerate(rows):
            file = folder / f"{number:06}.jpg"
            if photo in files:
                file.hardlink_to(files[photo])
            else:
                file.write_bytes(images[photo].as_py()["bytes"])
                files[photo] = file
            writer.writerow([file, caption])
    repeats = count > len(table)
    return folder / "pairs.csv", [caption for _, caption in rows], repeats
