"""Calibrated probabilities as a detector of out-of-distribution queries.

    python -m scripts.benchmarks.search.calibration RUN DATA

Calibrates an index of the Flickr8k dev photos and one of the UCM aerial photos with one caption per
image. Then searches each with its other captions (in distribution), with the captions of the other
data set and with random words (both out of distribution), and compares the probabilities of the
best hits. DATA holds flickr8k-224-dev.parquet and ucm-val.parquet.
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
    """Strings of two to six random words from CLIP's vocabulary."""
    file = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = [line.split() for line in lines.readlines()[1:20000] if len(line.split()) == 2]
    words = ["".join(pair)[:-4] for pair in merges if pair[1].endswith("</w>")]
    words = [word for word in words if word.isalpha() and len(word) > 3]
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, random.integers(2, 7))) for _ in range(count)]


def best_probabilities(found: Calibration, images: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The probability of the best hit of each query, or its margin if there are none."""
    best = (queries @ images.T).max(axis=1, keepdims=True)
    probabilities = [found.probabilities(q, s) for q, s in zip(queries, best, strict=True)]
    if probabilities[0] is None:
        return best[:, 0] - queries @ found.background
    return np.concatenate(probabilities)


def split(pairs: EncodedPairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One caption per image with its row, and all other captions."""
    random = np.random.default_rng(0)
    order = random.permutation(len(pairs.owners))
    _, first = np.unique(pairs.owners[order], return_index=True)
    picked = np.sort(order[first])
    rest = np.setdiff1d(np.arange(len(pairs.owners)), picked)
    return pairs.captions[picked], pairs.owners[picked], pairs.captions[rest]


def main() -> None:
    """Print a line for each index and each kind of query."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run or a model name")
    parser.add_argument("data", type=Path, help="folder with the two Parquet files")
    options = parser.parse_args()
    encoder = load_model(options.model)
    sets = {
        name: encode_pairs(encoder, open_source(options.data / file), workers=2, progress=False)
        for name, file in SETS.items()
    }
    without, words = (encoder.encode_text(texts) for texts in (nonsense(), random_words(500)))
    for name, pairs in sets.items():
        captions, rows, matching = split(pairs)
        images = pairs.images
        found = calibrate(
            captions, rows, without, lambda images=images: [images], "captions of the images"
        )
        print(
            f"{name}: {len(images)} images, {len(captions)} captions for calibration, AUROC "
            f"{found.auroc:.3f}, calibration error {found.error:.3f}, weights {found.weights}"
        )
        if not found.informative:
            print("  scores are not informative: no probabilities; the figures are for raw margins")
        positive = best_probabilities(found, images, matching)
        other = next(pairs for key, pairs in sets.items() if key != name)
        for kind, queries in (("other captions", other.captions), ("random words", words)):
            negative = best_probabilities(found, images, queries)
            probability = np.concatenate([positive, negative]).astype(np.float64)
            target = np.arange(len(probability)) < len(positive)
            line = f"  in distribution vs {kind:14} AUROC {auroc(positive, negative):.3f}"
            if found.informative:
                line += (
                    f"  calibration error {expected_error(probability, target):.3f}"
                    f"  no good match: {(positive < GOOD).mean():.3f} of the former,"
                    f" {(negative < GOOD).mean():.3f} of the latter"
                )
            print(line)


if __name__ == "__main__":
    main()
