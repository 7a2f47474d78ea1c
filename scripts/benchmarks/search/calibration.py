"""Do probabilities tell what an index holds from what it does not? Flickr8k, UCM and random words.

Two indexes, of Flickr8k's dev photos and of UCM's aerial ones, are calibrated with one caption of
each image. Asked are other captions of theirs (present), captions of the other one and strings of
random words (absent); the probability is that of the best hit.

python scripts/bench_calibration.py RUN ../shared/data
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import open_clip

from clipkit.data.open_source import open_source
from clipkit.index.calibration import GOOD, Calibration, auroc, calibrate, expected_error
from clipkit.index.sample_queries import nonsense
from clipkit.models.embed_source import EncodedPairs, encode_pairs
from clipkit.models.loading import load_model

SETS = {"Flickr8k dev": "flickr8k-224-dev.parquet", "UCM val": "ucm-val.parquet"}


def random_words(count: int) -> list[str]:
    """Strings of two to six words of CLIP's vocabulary."""
    file = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = [line.split() for line in lines.readlines()[1:20000] if len(line.split()) == 2]
    words = ["".join(pair)[:-4] for pair in merges if pair[1].endswith("</w>")]
    words = [word for word in words if word.isalpha() and len(word) > 3]
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, random.integers(2, 7))) for _ in range(count)]


def best_chances(found: Calibration, images: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The probability of each query's best hit; its margin where there is no probability."""
    best = (queries @ images.T).max(axis=1, keepdims=True)
    chances = [found.probabilities(q, s) for q, s in zip(queries, best, strict=True)]
    if chances[0] is None:
        return best[:, 0] - queries @ found.background
    return np.concatenate(chances)


def split(pairs: EncodedPairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One caption of each image and its row, and all the others."""
    random = np.random.default_rng(0)
    order = random.permutation(len(pairs.owners))
    _, first = np.unique(pairs.owners[order], return_index=True)
    mine = np.sort(order[first])
    other = np.setdiff1d(np.arange(len(pairs.owners)), mine)
    return pairs.captions[mine], pairs.owners[mine], pairs.captions[other]


def main() -> None:
    """Print a line for each index and what it is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    encoder = load_model(options.model)
    sets = {
        name: encode_pairs(encoder, open_source(options.data / file), workers=2, progress=False)
        for name, file in SETS.items()
    }
    without, words = (encoder.encode_text(texts) for texts in (nonsense(), random_words(500)))
    for name, pairs in sets.items():
        captions, rows, present = split(pairs)
        images = pairs.images
        found = calibrate(
            captions, rows, without, lambda images=images: [images], "captions of the images"
        )
        print(
            f"{name}: {len(images)} images, {len(captions)} captions to calibrate, AUROC "
            f"{found.auroc:.3f}, calibration error {found.error:.3f}, weights {found.weights}"
        )
        if not found.informative:
            print("  its scores say nothing: no probabilities; the figures are of raw margins")
        there = best_chances(found, images, present)
        other = next(pairs for key, pairs in sets.items() if key != name)
        for kind, queries in (("captions of the other", other.captions), ("random words", words)):
            gone = best_chances(found, images, queries)
            chance = np.concatenate([there, gone]).astype(np.float64)
            right = np.arange(len(chance)) < len(there)
            line = f"  present against {kind:22} AUROC {auroc(there, gone):.3f}"
            if found.informative:
                line += (
                    f"  calibration error {expected_error(chance, right):.3f}"
                    f"  no good match: {(there < GOOD).mean():.3f} of the present,"
                    f" {(gone < GOOD).mean():.3f} of the absent"
                )
            print(line)


if __name__ == "__main__":
    main()
