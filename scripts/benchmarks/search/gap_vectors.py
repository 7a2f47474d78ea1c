"""Synthetic vectors with the modality gap of CLIP.

Vectors of a real ViT-B/32 have a mean cosine of 0.54 between images, 0.74 between texts and only
0.19 between images and texts: each modality has its own mean, and a caption is far from every
image. An index tuned with image vectors therefore has much lower recall for captions. The synthetic
vectors reproduce the means, spectra and neighbour structure, for any number of rows.

    python -m scripts.benchmarks.search.gap_vectors --real FOLDER  # compare with real vectors
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

IMAGES, TEXTS, ACROSS = 0.54, 0.74, 0.19
"""Mean cosines to reproduce."""
MATCH = 0.3
"""Cosine between a centred text and the topic it names."""
TOPIC = (0.2, 0.7)
"""Range of the share of a centred image that its topic explains."""
LEAN = 0.019
"""Standard deviation of the component of images along the text mean; it creates hubs."""


class GapVectors:
    """A distribution over topics, from which images and texts are drawn.

    Args:
        dim: width of the vectors.
        topics: number of topics; a few are common, most are rare.
        seed: random seed of the topics and axes.
    """

    def __init__(self, dim: int = 512, topics: int = 2000, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        basis = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
        # The means lie on two axes that are free of other variance, except for the lean.
        one, other, rest = basis[0], basis[1], basis[2:]
        angle = ACROSS / np.sqrt(IMAGES * TEXTS)
        self.image_middle = np.sqrt(IMAGES) * one
        self.text_middle = np.sqrt(TEXTS) * (angle * one + np.sqrt(1 - angle**2) * other)
        number = np.arange(dim - 2)
        # Fitted to the eigenvalues of real vectors: 8 directions hold 30 % of the variance of
        # images and 19 % of that of texts; 64 directions hold 68 % and 60 %.
        self._images = rest * np.sqrt(np.exp(-number / 300) / (number + 2) ** 1.3)[:, None]
        order = random.permutation(dim - 2)
        self._texts = rest[order] * np.sqrt(np.exp(-number / 400) / (number + 8))[:, None]
        self._lean = other
        self._topics = unit(random.standard_normal((topics, dim - 2)) @ rest)
        self._tied = random.uniform(*TOPIC, topics).astype(np.float32)
        weights = 1 / (np.arange(topics) + 10)
        self._weights = weights / weights.sum()

    @staticmethod
    def _draw(random: np.random.Generator, count: int, axes: np.ndarray) -> np.ndarray:
        return unit(random.standard_normal((count, len(axes)), dtype=np.float32) @ axes)

    def _draw_topics(self, random: np.random.Generator, count: int) -> np.ndarray:
        return random.choice(len(self._topics), count, p=self._weights)

    def images(self, count: int, seed: int = 1, block: int = 2**16) -> Iterator[np.ndarray]:
        """Yield unit float32 image vectors, ``block`` rows at a time.

        With the same seed and block, a smaller count yields a prefix of a larger one.
        """
        random = np.random.default_rng(seed)
        for start in range(0, count, block):
            topic = self._draw_topics(random, block)
            tied, fine = self._tied[topic, None], self._draw(random, block, self._images)
            own = np.sqrt(tied) * self._topics[topic] + np.sqrt(1 - tied) * fine
            own += LEAN * random.standard_normal((block, 1), dtype=np.float32) * self._lean
            yield unit(self.image_middle + np.sqrt(1 - IMAGES) * unit(own[: count - start]))

    def texts(self, count: int, seed: int = 2) -> np.ndarray:
        """Unit float32 text vectors [count, dim], each of which names a topic of images."""
        random = np.random.default_rng(seed)
        topic = self._topics[self._draw_topics(random, count)]
        own = unit(MATCH * topic + np.sqrt(1 - MATCH**2) * self._draw(random, count, self._texts))
        return unit(self.text_middle + np.sqrt(1 - TEXTS) * own)


def unit(rows: np.ndarray) -> np.ndarray:
    """The rows normalised to unit length, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def facts(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Properties of vectors that matter to an index: means, spectra, score margins, recall."""
    scores = texts @ images.T
    spread = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    best = np.argsort(-scores, axis=1)[:, :10]
    result = {
        "cosine image image": float((images.mean(0) ** 2).sum()),
        "cosine text text": float((texts.mean(0) ** 2).sum()),
        "cosine image text": float(scores.mean()),
        "std of the scores of a text": float(scores.std(1).mean()),
        "best image, in std": float(np.median(spread.max(1))),
        "tenth best image, in std": float(np.median(np.sort(spread, 1)[:, -10])),
        "std of the mean scores of images": float(scores.mean(0).std()),
        "share of images among the ten best": len(np.unique(best)) / len(images),
    }
    for name, rows in (("images", images), ("texts", texts)):
        values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
        result |= {f"variance of {name} in {n}": values[:n].sum() / values.sum() for n in (8, 64)}
    near = np.sort(images[:500] @ images.T, axis=1)[:, -2]
    result["cosine to the nearest image"] = float(np.median(near))
    for spec, parameter, values in (
        ("IVF256,Flat", "nprobe", (1, 16, 64)),
        ("HNSW32", "efSearch", (16, 64, 256)),
        ("PQ64x4fs,RFlat", "k_factor_rf", (1, 8, 32)),
    ):
        index = faiss.index_factory(images.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
        index.train(images)
        index.add(images)
        for value in values:
            faiss.ParameterSpace().set_index_parameter(index, parameter, value)
            found = index.search(texts, 10)[1]
            hits = [len({*a} & {*b}) for a, b in zip(found.tolist(), best.tolist(), strict=True)]
            result[f"recall@10 of {spec}, {parameter} {value}"] = float(np.mean(hits)) / 10
    return result


def main() -> None:
    """Print the properties of real and synthetic vectors side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--real", type=Path, required=True, help="folder with clip-b32-{images,class-names}.npy"
    )
    options = parser.parse_args()
    images, texts = (
        np.load(options.real / f"clip-b32-{name}.npy").astype(np.float32)
        for name in ("images", "class-names")
    )
    made = GapVectors(images.shape[1])
    real = facts(images, texts)
    ours = facts(np.concatenate([*made.images(len(images))]), made.texts(len(texts)))
    print(f"{'':45}  real  synthetic")
    for name, value in real.items():
        print(f"{name:45} {value:6.3f}  {ours[name]:9.3f}")


if __name__ == "__main__":
    main()
