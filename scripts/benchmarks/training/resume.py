"""What going on late in an epoch of a stream takes: clipkit, clipkit reading all again, datasets.

python scripts/bench_resume.py /tmp/tars --tars 20 --images 20000 --at 0.9

Makes WebDataset tars of small JPEGs in a folder, unless they are there. Each way stands where a
checkpoint would be written, is built anew in that state, and is timed until its first batch of 256
is there: clipkit from the place in its checkpoint; clipkit from a checkpoint without one, which
passes over the rows before; and the stream of `datasets` with a shuffle buffer of 1,000 rows and
its own state, which does not hold the rows that were in the buffer. Prints seconds and megabytes
read, as medians of several turns, and the ratios to clipkit's with their spread. The files lie in
memory by then: on a slow disk it is the megabytes that count.
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

BATCH, SEED = 256, 7
Way = Callable[[], Any]


def make_tars(folder: Path, tars: int, images: int) -> None:
    """Tars of JPEGs of noise, 96 pixels wide and about 6 kB each, with a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    parts = np.array_split(np.arange(images), tars)
    for shard, numbers in enumerate(parts):
        path = folder / f"{shard:03d}.tar"
        if path.exists():
            continue
        with tarfile.open(path, "w") as tar:
            for number in numbers.tolist():
                picture = io.BytesIO()
                pixels = random.integers(0, 256, (96, 96, 3), np.uint8)
                Image.fromarray(pixels).save(picture, "JPEG", quality=75)
                caption = f"picture {number}".encode()
                for suffix, data in (("jpg", picture.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def bytes_read() -> int:
    """Bytes that this process has asked the system for so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise SystemExit("/proc/self/io does not count what is read")


def ours(pattern: str, start: int, place: dict[str, Any] | None) -> list[Any]:
    """clipkit's first batch from ``start`` on."""
    source = open_source(pattern)
    return next(stream_batches(source, BATCH, SEED, 0, start, place))[0]


def place_of(source: Source, start: int) -> dict[str, Any]:
    """What a checkpoint after ``start`` batches says."""
    batches = stream_batches(source, BATCH, SEED, 0, 0, None)
    return next(islice(batches, start - 1, None))[1]


def stream_of(files: list[str]) -> Any:
    """The same files through ``datasets``, shuffled and not decoded."""
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    return rows.cast_column("jpg", datasets.Image(decode=False)).shuffle(SEED, buffer_size=1000)


def theirs(files: list[str], state: dict[str, Any]) -> list[Any]:
    """The first batch of ``datasets`` from a state on."""
    rows = stream_of(files)
    rows.load_state_dict(state)
    return list(islice(iter(rows), BATCH))


def state_of(files: list[str], count: int) -> dict[str, Any]:
    """The state of ``datasets`` after so many rows."""
    rows = stream_of(files)
    passing = iter(rows)
    for _ in islice(passing, count):
        pass
    state: dict[str, Any] = rows.state_dict()
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tars", type=int, default=20)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--at", type=float, default=0.9)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    make_tars(given.folder, given.tars, given.images)
    pattern, start = str(given.folder / "*.tar"), int(given.at * given.images / BATCH)
    files = [str(file) for file in sorted(given.folder.glob("*.tar"))]
    whole = sum(Path(file).stat().st_size for file in files) / 1e6
    place, state = place_of(open_source(pattern), start), state_of(files, start * BATCH)
    ways: dict[str, Way] = {
        "clipkit": partial(ours, pattern, start, place),
        "clipkit, reading all again": partial(ours, pattern, start, None),
        "datasets": partial(theirs, files, state),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(given.turns):
        for name, way in ways.items():
            before, since = bytes_read(), time.perf_counter()
            assert len(way()) == BATCH
            seconds, read = time.perf_counter() - since, (bytes_read() - before) / 1e6
            taken[name].append((seconds, read))
    print(f"{len(files)} tars, {given.images} pictures, {whole:.0f} MB, at batch {start}")
    for name, figures in taken.items():
        seconds = [one for one, _ in figures]
        ratios = [one / own for one, (own, _) in zip(seconds, taken["clipkit"], strict=True)]
        print(
            f"{name:28s} {statistics.median(seconds):7.3f} s  "
            f"{statistics.median(read for _, read in figures):8.1f} MB read  "
            f"{statistics.median(ratios):6.1f} times ({min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()
