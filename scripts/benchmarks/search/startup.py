"""One text query in a process of its own: `clipkit search` against open_clip and FAISS by hand.

python scripts/bench_start.py --vectors 100000 --rounds 5

Makes a ViT-B-32 with random weights and an index of random vectors in a temporary directory. Each
answer is a process that ends; they take turns. The model is loaded whole once beforehand, as
`clipkit embed` does, and so its weights are known when the search comes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

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
    """The model, the index, and the keys as a list for the way by hand."""
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
    captions = [f"a caption of picture {number}, as long as they are"] * 5
    kept = {"key": f"photos/{number:08}.jpg", "size": number, "mtime_ns": number}
    return {**kept, "captions": captions, "label": None}


def commands(folder: Path) -> dict[str, list[str]]:
    """The ways to an answer, and what the imports of the way by hand take alone."""
    weights, index = str(folder / "weights.safetensors"), str(folder / "index" / "index.faiss")
    by_hand = [weights, index, str(folder / "keys.json"), QUERY]
    return {
        "open_clip by hand": [sys.executable, "-c", BY_HAND, *by_hand],
        "its imports alone": [sys.executable, "-c", IMPORTS],
        "clipkit search": [sys.executable, "-m", "clipkit", "search", str(folder / "index"), QUERY],
    }


def seconds(command: list[str]) -> float:
    """How long a process takes, from its start to its end."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return taken


def measure(ways: dict[str, list[str]], rounds: int) -> None:
    """Let them take turns, files being in memory after a first one, and print times and ratios."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, command in ways.items():
            taken = seconds(command)
            if number:
                times[name].append(taken)
    ours = times["clipkit search"]
    for name, taken in times.items():
        ratios = [theirs / own for theirs, own in zip(taken, ours, strict=True)]
        print(
            f"{name:20} {statistics.median(taken):6.2f} s "
            f"({min(taken):.2f}–{max(taken):.2f})  {statistics.median(ratios):5.1f} "
            f"({min(ratios):.1f}–{max(ratios):.1f}) times clipkit search"
        )


def main() -> None:
    """Make what is needed in a directory that goes away, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["CLIPKIT_CACHE"] = str(folder / "notes")
        make(folder, options.vectors)
        print(f"{options.vectors} vectors, {QUERY!r}")
        measure(commands(folder), options.rounds)


if __name__ == "__main__":
    main()
