"""Search beside its peers: exact search, an index tuned with text, building and loading many.

All on made-up vectors with CLIP's gap between texts and images (gap_vectors.py). The parts:

exact   every row: clipkit, FAISS Flat, and one whole product in NumPy, in turn
tuned   recall@10 of text queries and latency within one memory: clipkit, autofaiss, clip-retrieval
build   time and memory of building, time of loading; reckoned on for a billion

``tuned`` goes twice over it, with half a byte a dimension for each row, which takes compression,
and with enough for a graph over whole rows. The peers live in environments of their own, and each
has ``--limit`` seconds each time.

python scripts/bench_search.py --autofaiss PYTHON --clip-retrieval PYTHON
python scripts/bench_search.py --only build --count 1000000
python scripts/bench_search.py --only build --count 10000000 --half    # 33 GB of disk
python scripts/bench_search.py --only tuned --families     # every kind of index, at three recalls
"""

import argparse
import tempfile
from pathlib import Path

import bench_exact
import numpy as np
from gap_vectors import GapVectors
from search_scale import scale, write_shards
from search_tuned import against, families

from clipkit.cli.index import parse_size

PARTS = ("exact", "tuned", "build")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="of exact")
    parser.add_argument("--memory", nargs="+", help="of an index, as 50MiB")
    parser.add_argument("--autofaiss", type=Path, metavar="PYTHON")
    parser.add_argument("--clip-retrieval", type=Path, metavar="PYTHON")
    parser.add_argument("--limit", type=float, default=90, help="seconds of a peer")
    parser.add_argument("--families", action="store_true", help="of tuned: clipkit's kinds alone")
    parser.add_argument("--specs", nargs="+", help="with --families: these alone")
    parser.add_argument("--half", action="store_true", help="of build: shards of float16")
    options = parser.parse_args()
    row = options.dim * options.count
    memory = [parse_size(text) for text in options.memory or [f"{row // 2}B", f"{6 * row}B"]]
    if "exact" in options.only:
        bench_exact.run(options.count, options.dim, [1, 64, 256], 10, options.rounds)
    if "tuned" in options.only:
        with tempfile.TemporaryDirectory() as name:
            tuned(options, Path(name), memory)
    if "build" in options.only:
        with tempfile.TemporaryDirectory() as name:
            scale(Path(name), options.count, options.dim, memory[0], options.half)


def tuned(options: argparse.Namespace, folder: Path, memory: list[int]) -> None:
    """The index tuned with text, on vectors in one file that the peers read as well."""
    write_shards(folder / "img_emb", options.count, options.dim, half=False)
    files = sorted((folder / "img_emb").glob("*.npy"))
    vectors = np.concatenate([np.load(file) for file in files])
    texts = GapVectors(options.dim).texts(1000)
    if options.families:
        families(vectors, texts, options.specs)
        return
    pythons = {"autofaiss": options.autofaiss, "clip-retrieval": options.clip_retrieval}
    for most in memory:
        print(f"within {most / 2**20:.0f} MiB of memory:", flush=True)
        against(folder, vectors, texts, most, pythons, options.limit)


if __name__ == "__main__":
    main()
