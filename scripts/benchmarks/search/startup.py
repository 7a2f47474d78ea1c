"""One text query in a fresh process: `clipkit search`, and open_clip with FAISS by hand.

    python -m scripts.benchmarks.search.startup --vectors 100000 --rounds 5

Creates a ViT-B-32 with random weights and an index of random vectors in a temporary directory. Each
query is a separate process; the contenders alternate. The model is loaded once beforehand, as
`clipkit embed` does, so that its fingerprint is cached.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from scripts.benchmarks.common.timing import alternate, ratios, run_command, spread

DIM = 512
QUERY = "a dog runs through the grass"
BY_HAND = """
import json, sys
import faiss, open_clip, torch
model = open_clip.create_model("ViT-B-32", pretrained=sys.argv[1]).eval()
tokenize = open_clip.get_tokenizer("ViT-B-32")
index = faiss.read_index(sys.argv[2])
keys = json.load(open(sys.argv[3]))
with torch.inference_mode():
    query = model.encode_text(tokenize([sys.argv[4]]), normalize=True).numpy()
scores, ids = index.search(query, 10)
for score, i in zip(scores[0], ids[0]):
    print(f"{score:.3f}", keys[i])
"""
IMPORTS = "import faiss, open_clip, torch"


def make(folder: Path, vectors: int) -> None:
    """Write the model, the index, and the keys as a list for the search by hand."""
    import json

    import open_clip
    import torch
    from safetensors.torch import save_file

    import clipkit
    from clipkit.store.embedding_store import EmbeddingStore

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32")
    save_file(model.state_dict(), folder / "weights.safetensors")
    reference = clipkit.load_model(f"ViT-B-32/{folder / 'weights.safetensors'}").model
    generator = np.random.default_rng(0)
    with EmbeddingStore.create(folder / "store", reference) as writer:
        for start in range(0, vectors, 4096):
            count = min(4096, vectors - start)
            rows = generator.standard_normal((count, DIM), dtype=np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            writer.append(rows, [_record(start + i) for i in range(count)])
        writer.finish({})
    index = clipkit.build_index(folder / "store", folder / "index")
    (folder / "keys.json").write_text(json.dumps(index.keys), encoding="utf-8")


def _record(number: int) -> dict[str, object]:
    captions = [f"a caption of image {number}, as long as usual"] * 5
    kept = {"key": f"photos/{number:08}.jpg", "size": number, "mtime_ns": number}
    return {**kept, "captions": captions, "label": None}


def commands(folder: Path) -> dict[str, list[str]]:
    """The contenders, and the imports of the search by hand alone."""
    weights, index = str(folder / "weights.safetensors"), str(folder / "index" / "index.faiss")
    by_hand = [weights, index, str(folder / "keys.json"), QUERY]
    return {
        "open_clip by hand": [sys.executable, "-c", BY_HAND, *by_hand],
        "the imports alone": [sys.executable, "-c", IMPORTS],
        "clipkit search": [sys.executable, "-m", "clipkit", "search", str(folder / "index"), QUERY],
    }


def measure(contenders: dict[str, list[str]], rounds: int) -> None:
    """Alternate the processes, with files in the page cache, and print times and ratios."""
    runs = {name: partial(run_command, command) for name, command in contenders.items()}
    times = alternate(runs, rounds)
    for name, taken in times.items():
        ratio = spread(ratios(taken, times["clipkit search"]), 1)
        print(f"{name:20} {spread(taken):>20} s  {ratio} times clipkit search")


def main() -> None:
    """Create model and index in a temporary directory, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["CLIPKIT_CACHE"] = str(folder / "cache")
        make(folder, options.vectors)
        print(f"{options.vectors} vectors, {QUERY!r}")
        measure(commands(folder), options.rounds)


if __name__ == "__main__":
    main()
