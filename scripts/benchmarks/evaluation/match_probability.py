"""Match probabilities against graded relevance, on captions that did not fit them.

    python -m scripts.benchmarks.evaluation.match_probability RUN DATA

Indexes the photos of Flickr8k dev, and the aerial photos of UCM val. For each seed, one caption of
each of a random half of the photos fits the calibration; all captions of the other half are
searched for, with and without their own photo in the index. What is stated is compared with graded
relevance: a query's own photo matches; another one matches to a degree, taken from the words of its
captions (``grade_hits``). The model's own caption vectors would not do: they lie near the query for
the reasons that made the photo a hit, and grade the best hits of Flickr8k 0.15 higher. Prints the
expected calibration error (ECE) and how often "no good match" is said, as means over the seeds with
the lowest and the highest value, and a reliability diagram of the last seed.

DATA holds flickr8k-224-dev.parquet and ucm-val.parquet.
"""

import argparse
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import open_clip

from clipkit.data.open_source import open_source
from clipkit.evaluation.calibration import expected_calibration_error, reliability
from clipkit.index.calibration import TOP, Calibration, calibrate, grade_hits
from clipkit.index.sample_queries import SampleQueries, nonsense
from clipkit.models.embed_source import EncodedPairs, encode_pairs
from clipkit.models.loading import load_model

SETS = {"Flickr8k dev": "flickr8k-224-dev.parquet", "UCM val": "ucm-val.parquet"}
Figures = dict[str, list[float]]


def random_words(count: int) -> list[str]:
    """Strings of two to six random words from CLIP's vocabulary."""
    file = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = [line.split() for line in lines.readlines()[1:20000] if len(line.split()) == 2]
    words = ["".join(pair)[:-4] for pair in merges if pair[1].endswith("</w>")]
    words = [word for word in words if word.isalpha() and len(word) > 3]
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, random.integers(2, 7))) for _ in range(count)]


class Photos:
    """The encoded photos of a data set, with their captions."""

    def __init__(self, pairs: EncodedPairs) -> None:
        self.pairs = pairs
        self.captions: dict[int, list[str]] = defaultdict(list)
        for owner, text in zip(pairs.owners, pairs.texts, strict=True):
            self.captions[int(owner)].append(text)

    def calibration(self, photos: np.ndarray, without: np.ndarray, seed: int) -> Calibration:
        """Fitted to a random caption of each of the photos."""
        order = np.random.default_rng(seed).permutation(len(self.pairs.owners))
        first = order[np.unique(self.pairs.owners[order], return_index=True)[1]]
        picked = np.sort(first[np.isin(self.pairs.owners[first], photos)])
        queries = SampleQueries(
            [self.pairs.texts[n] for n in picked],
            self.pairs.captions[picked],
            self.pairs.owners[picked],
            without,
            "captions",
        )
        return calibrate(
            queries,
            lambda: [self.pairs.images],
            lambda rows: {int(row): self.captions[int(row)] for row in rows},
        )

    def best(self, queries: np.ndarray, left_out: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Scores and rows of the ten best photos of queries, [m, 10]."""
        scores = queries @ self.pairs.images.T
        if left_out is not None:
            scores[np.arange(len(queries)), left_out] = -np.inf
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        return np.take_along_axis(scores, rows, axis=1), rows


def stated(found: Calibration, queries: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, ...]:
    """Probabilities of the hits [m, 10], and of any match [m]."""
    both = [found.assess(query, own) for query, own in zip(queries, scores, strict=True)]
    return (
        np.array([one.probabilities for one in both], np.float64),
        np.array([one.any_match for one in both], np.float64),
    )


def ece(chance: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error."""
    weights = np.ones((1, chance.size))
    return float(expected_calibration_error(chance.ravel(), truth.ravel(), weights)[0])


def measure(
    photos: Photos, found: Calibration, picked: np.ndarray, figures: Figures
) -> tuple[np.ndarray, np.ndarray]:
    """Add the figures of one seed; return what is stated and graded for all best hits."""
    pairs = photos.pairs
    queries, own = pairs.captions[picked], pairs.owners[picked]
    texts = [pairs.texts[n] for n in picked]
    parts = []
    for left_out in (None, own):
        scores, rows = photos.best(queries, left_out)
        grades = grade_hits(texts, own, rows, photos.captions)[0]
        parts.append((*stated(found, queries, scores), grades))
    both = tuple(np.concatenate(one) for one in zip(*parts, strict=True))
    for kind, part in zip(("photo indexed", "photo left out", "both"), (*parts, both), strict=True):
        hit, any_match, grades = part
        figures[f"{kind}: best hit, stated"].append(hit[:, 0].mean())
        figures[f"{kind}: best hit, graded"].append(grades[:, 0].mean())
        figures[f"{kind}: best hit, ECE"].append(ece(hit[:, 0], grades[:, 0]))
        figures[f"{kind}: ten hits, ECE"].append(ece(hit, grades))
        figures[f"{kind}: any match, stated"].append(any_match.mean())
        figures[f"{kind}: any match, graded"].append(grades.max(axis=1).mean())
        figures[f"{kind}: any match, ECE"].append(ece(any_match, grades.max(axis=1)))
        figures[f"{kind}: no good match"].append((any_match < 0.5).mean())
    hit, _, grades = both
    return hit[:, 0], grades[:, 0]


def main() -> None:
    """Print the figures of both data sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run or a model name")
    parser.add_argument("data", type=Path, help="folder with the two Parquet files")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    encoder = load_model(options.model)
    sets = {
        name: Photos(
            encode_pairs(encoder, open_source(options.data / file), workers=2, progress=False)
        )
        for name, file in SETS.items()
    }
    without, words = (encoder.encode_text(texts) for texts in (nonsense(), random_words(500)))
    for name, photos in sets.items():
        pairs, figures = photos.pairs, defaultdict(list)
        others = {key: other.pairs.captions for key, other in sets.items() if key != name}
        for seed in range(options.seeds):
            order = np.random.default_rng(seed).permutation(len(pairs.images))
            half = order[: len(order) // 2]
            found = photos.calibration(half, without, seed)
            picked = np.flatnonzero(~np.isin(pairs.owners, half))
            if not found.gives_probabilities:
                print(f"{name}, seed {seed}: AUROC {found.auroc:.3f}: no probabilities")
                continue
            chance, truth = measure(photos, found, picked, figures)
            for kind, queries in {**others, "random words": words}.items():
                _, any_match = stated(found, queries, photos.best(queries, None)[0])
                figures[f"{kind}: any match, stated"].append(any_match.mean())
                figures[f"{kind}: no good match"].append((any_match < 0.5).mean())
        if not figures:
            continue
        print(f"{name}: {len(pairs.images)} photos, {len(picked)} queries per seed")
        for what, values in figures.items():
            spread = f"{min(values):.3f} to {max(values):.3f}"
            print(f"  {what:40} {np.mean(values):.3f} ({spread})")
        print("  best hits of the last seed: stated, graded, number")
        for one in reliability(chance, truth):
            print(f"    {one.confidence:.3f} {one.accuracy:.3f} {one.count:5}")


if __name__ == "__main__":
    main()
