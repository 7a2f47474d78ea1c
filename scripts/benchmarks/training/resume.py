"""Time to resume late in an epoch of a streamed data set: clipkit and `datasets`.

    python -m scripts.benchmarks.training.resume FOLDER --tars 20 --images 20000 --at 0.9

Writes WebDataset tars of small JPEGs to FOLDER if it does not hold them already. Each contender is
restored from a state saved late in the epoch and timed until its first batch of 256:

- clipkit, from the stream position in its checkpoint;
- clipkit, from a checkpoint without a position, so that it reads all earlier rows again;
- a `datasets` stream with a shuffle buffer of 1,000 rows, from its own state, which loses the rows
  in the buffer.

Prints median seconds and megabytes read, and the ratios to clipkit with their spread. The files are
in the page cache by then. On a slow disk, the megabytes matter more.
"""

import argparse
import io
import statistics
import tarfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from clipkit.data.open_source import Source, open_source
from clipkit.data.streaming import stream_batches
from scripts.benchmarks.common.timing import ratios, spread

BATCH, SEED = 256, 7
Way = Callable[[], Any]


def make_tars(folder: Path, tars: int, images: int) -> None:
    """Write tars of random JPEGs, 96 pixels wide and about 6 kB each, with a caption for each."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    parts = np.array_split(np.arange(images), tars)
    for shard, numbers in enumerate(parts):
        path = folder / f"{shard:03d}.tar"
        if path.exists():
            continue
        with tarfile.open(path, "w") as tar:
            for number in numbers.tolist():
                jpeg = io.BytesIO()
                pixels = random.integers(0, 256, (96, 96, 3), np.uint8)
                Image.fromarray(pixels).save(jpeg, "JPEG", quality=75)
                caption = f"image {number}".encode()
                for suffix, data in (("jpg", jpeg.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def bytes_read() -> int:
    """Bytes that this process has read so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise SystemExit("error: /proc/self/io does not report the bytes read")


def ours(pattern: str, start: int, place: dict[str, Any] | None) -> list[Any]:
    """The first batch of clipkit after ``start`` batches."""
    source = open_source(pattern)
    return next(stream_batches(source, BATCH, SEED, 0, start, place))[0]


def place_of(source: Source, start: int) -> dict[str, Any]:
    """The stream position that a checkpoint after ``start`` batches holds."""
    batches = stream_batches(source, BATCH, SEED, 0, 0, None)
    return next(islice(batches, start - 1, None))[1]


def stream_of(files: list[str]) -> Any:
    """A ``datasets`` stream of the same files, shuffled and not decoded."""
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    return rows.cast_column("jpg", datasets.Image(decode=False)).shuffle(SEED, buffer_size=1000)


def theirs(files: list[str], state: dict[str, Any]) -> list[Any]:
    """The first batch of ``datasets`` from a state."""
    rows = stream_of(files)
    rows.load_state_dict(state)
    return list(islice(iter(rows), BATCH))


def state_of(files: list[str], count: int) -> dict[str, Any]:
    """The state of ``datasets`` after ``count`` rows."""
    rows = stream_of(files)
    passing = iter(rows)
    for _ in islice(passing, count):
        pass
    state: dict[str, Any] = rows.state_dict()
    return state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for the tars")
    parser.add_argument("--tars", type=int, default=20)
    parser.add_argument("--images", type=int, default=20_000, help="images in all tars")
    parser.add_argument("--at", type=float, default=0.9, help="share of the epoch already read")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    make_tars(given.folder, given.tars, given.images)
    pattern, start = str(given.folder / "*.tar"), int(given.at * given.images / BATCH)
    files = [str(file) for file in sorted(given.folder.glob("*.tar"))]
    whole = sum(Path(file).stat().st_size for file in files) / 1e6
    place, state = place_of(open_source(pattern), start), state_of(files, start * BATCH)
    ways: dict[str, Way] = {
        "clipkit": partial(ours, pattern, start, place),
        "clipkit, no position": partial(ours, pattern, start, None),
        "datasets": partial(theirs, files, state),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            before, since = bytes_read(), time.perf_counter()
            assert len(way()) == BATCH
            seconds, read = time.perf_counter() - since, (bytes_read() - before) / 1e6
            taken[name].append((seconds, read))
    print(f"{len(files)} tars, {given.images} images, {whole:.0f} MB, resumed at batch {start}")
    own = [one for one, _ in taken["clipkit"]]
    for name, figures in taken.items():
        seconds = [one for one, _ in figures]
        print(
            f"{name:28s} {statistics.median(seconds):7.3f} s  "
            f"{statistics.median(read for _, read in figures):8.1f} MB read  "
            f"ratio to clipkit {spread(ratios(seconds, own), 1)}"
        )


if __name__ == "__main__":
    main()
