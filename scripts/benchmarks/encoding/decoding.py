"""Effect of fast decoding on retrieval: `--decode exact` and `--decode fast`, all else equal.

    python -m scripts.benchmarks.encoding.decoding PAIRS.parquet --model RUN --sizes 224 2MP

Upscales each photo (see photos.py), decodes it both ways and encodes it. Then measures retrieval in
both directions. Prints recall with each decoding and the difference in percentage points, the
cosine between the two vectors of a photo, and milliseconds per photo on one thread.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from clipkit.data.images import Decode, read_image
from clipkit.data.transforms import as_batch
from clipkit.evaluation.retrieval import retrieval_recall
from clipkit.models.encoder import Encoder
from clipkit.models.loading import load_model
from scripts.benchmarks.encoding.photos import SIDES, enlarged

WAYS: tuple[Decode, Decode] = ("exact", "fast")
PART = 50  # photos decoded and encoded at once


def read(encoder: Encoder, photo: bytes, decode: Decode) -> tuple[np.ndarray, float]:
    """Pixels of a photo, uint8 [height, width, 3], and the seconds to decode it."""
    start = time.thread_time()
    image = read_image(photo, encoder.preprocess.reduction(decode))
    return encoder.preprocess.pixels(image, decode), time.thread_time() - start


def encode_part(
    encoder: Encoder, photos: list[bytes], side: int, first: int
) -> dict[str, np.ndarray]:
    """Vectors of some photos with both decodings, and seconds and bytes per photo."""

    def prepare(job: tuple[int, bytes]) -> tuple[int, list[tuple[np.ndarray, float]]]:
        number, photo = job
        large = enlarged(photo, side, seed=number)
        return len(large), [read(encoder, large, way) for way in WAYS]

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(prepare, enumerate(photos, first)))
    part: dict[str, np.ndarray] = {"bytes": np.array([size for size, _ in done])}
    for place, way in enumerate(WAYS):
        pixels = as_batch([found[place][0] for _, found in done])
        part[way] = encoder.encode_images(pixels)
        part[f"{way} seconds"] = np.array([found[place][1] for _, found in done])
    return part


def encoded(
    encoder: Encoder, photos: list[bytes], size: str, cache: Path | None
) -> dict[str, np.ndarray]:
    """The result of ``encode_part`` for all photos."""
    parts = []
    for first in range(0, len(photos), PART):
        file = cache / f"{size}-{first}.npz" if cache else None
        if file and file.exists():
            parts.append(dict(np.load(file)))
            continue
        parts.append(encode_part(encoder, photos[first : first + PART], SIDES[size], first))
        if file:
            np.savez(file, **parts[-1])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def main() -> None:
    """Measure and print one size after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path, help="Parquet file with images and captions")
    parser.add_argument("--model", required=True)
    parser.add_argument("--sizes", nargs="*", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument(
        "--keep", type=Path, help="folder that keeps vectors, to continue an interrupted run"
    )
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(options.pairs).slice(0, options.photos).to_pylist()
    encoder = load_model(options.model)
    texts = [(number, text) for number, row in enumerate(rows) for text in row["captions"]]
    owners = np.array([number for number, _ in texts])
    captions = encoder.encode_text([text for _, text in texts])
    photos = [row["image"]["bytes"] for row in rows]
    print(f"{len(photos)} photos, {len(texts)} captions, {encoder.model}")
    for size in options.sizes:
        found = encoded(encoder, photos, size, options.keep)
        cosine = (found["exact"] * found["fast"]).sum(axis=1)
        recall = {way: retrieval_recall(found[way], captions, owners) for way in WAYS}
        cost = {way: 1000 * found[f"{way} seconds"].mean() for way in WAYS}
        print(
            f"\n{size}: {found['bytes'].mean() / 1e6:.2f} MB per photo; decoding takes "
            f"{cost['exact']:.1f} ms exact, {cost['fast']:.1f} ms fast; cosine mean "
            f"{cosine.mean():.5f}, minimum {cosine.min():.4f}"
        )
        for name, exact in recall["exact"].items():
            fast = recall["fast"][name]
            print(
                f"{name:20} exact {exact:.4f}  fast {fast:.4f}  {100 * (fast - exact):+.2f} points"
            )


if __name__ == "__main__":
    main()
