"""Made-up vectors with the gap between the modalities that real CLIP vectors show.

Real ones (ViT-B/32) have a mean cosine of 0.54 among images, 0.74 among texts and only 0.19 between
the two: each modality has its own middle, and a caption lies far from every image. An index that is
tuned with image vectors therefore finds far less for captions. The vectors made here have the same
middles, spectra and neighbours, for as many rows as are asked for.

python scripts/gap_vectors.py --real ../shared/data     # compares the two
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

IMAGES, TEXTS, ACROSS = 0.54, 0.74, 0.19
"""Mean cosines that are reproduced."""
MATCH = 0.3
"""Cosine of a text's own direction with that of the topic it names."""
TOPIC = (0.2, 0.7)
"""Share of an image's own variance that lies in its topic: from, to."""
LEAN = 0.019
"""How much images differ in leaning towards all texts, which makes some of them hubs."""


class GapVectors:
    """A world of topics, from which images and texts are drawn.

    Args:
        dim: width.
        topics: how many kinds of images there are; a few of them are common, most rare.
        seed: of the world.
    """

    def __init__(self, dim: int = 512, topics: int = 2000, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        basis = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
        # The middles stand on two axes that nothing else varies along.
        one, other, rest = basis[0], basis[1], basis[2:]
        angle = ACROSS / np.sqrt(IMAGES * TEXTS)
        self.image_middle = np.sqrt(IMAGES) * one
        self.text_middle = np.sqrt(TEXTS) * (angle * one + np.sqrt(1 - angle**2) * other)
        number = np.arange(dim - 2)
        # Fitted to the eigenvalues of the real ones: 8 directions hold 30 % of the images'
        # variance and 19 % of the texts', 64 hold 68 % and 60 %.
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

    def _chosen(self, random: np.random.Generator, count: int) -> np.ndarray:
        return random.choice(len(self._topics), count, p=self._weights)

    def images(self, count: int, seed: int = 1, block: int = 2**16) -> Iterator[np.ndarray]:
        """Image vectors, unit float32 rows, ``block`` at a time; a prefix of a longer draw."""
        random = np.random.default_rng(seed)
        for start in range(0, count, block):
            topic = self._chosen(random, block)
            tied, fine = self._tied[topic, None], self._draw(random, block, self._images)
            own = np.sqrt(tied) * self._topics[topic] + np.sqrt(1 - tied) * fine
            own += LEAN * random.standard_normal((block, 1), dtype=np.float32) * self._lean
            yield unit(self.image_middle + np.sqrt(1 - IMAGES) * unit(own[: count - start]))

    def texts(self, count: int, seed: int = 2) -> np.ndarray:
        """Text vectors, unit float32 [count, dim], each naming a topic of images."""
        random = np.random.default_rng(seed)
        topic = self._topics[self._chosen(random, count)]
        own = unit(MATCH * topic + np.sqrt(1 - MATCH**2) * self._draw(random, count, self._texts))
        return unit(self.text_middle + np.sqrt(1 - TEXTS) * own)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def facts(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """What an index feels of vectors: middles, spectra, how far the best stand out, recalls."""
    scores = texts @ images.T
    spread = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    best = np.argsort(-scores, axis=1)[:, :10]
    result = {
        "cosine image image": float((images.mean(0) ** 2).sum()),
        "cosine text text": float((texts.mean(0) ** 2).sum()),
        "cosine image text": float(scores.mean()),
        "spread of a text's scores": float(scores.std(1).mean()),
        "best image, in spreads": float(np.median(spread.max(1))),
        "tenth best": float(np.median(np.sort(spread, 1)[:, -10])),
        "spread of the images' mean scores": float(scores.mean(0).std()),
        "images among the ten best": len(np.unique(best)) / len(images),
    }
    for name, rows in (("images", images), ("texts", texts)):
        values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
        result |= {f"variance of {name} in {n}": values[:n].sum() / values.sum() for n in (8, 64)}
    near = np.sort(images[:500] @ images.T, axis=1)[:, -2]
    result["nearest image of an image"] = float(np.median(near))
    for spec, knob, values in (
        ("IVF256,Flat", "nprobe", (1, 16, 64)),
        ("HNSW32", "efSearch", (16, 64, 256)),
        ("PQ64x4fs,RFlat", "k_factor_rf", (1, 8, 32)),
    ):
        index = faiss.index_factory(images.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
        index.train(images)
        index.add(images)
        for value in values:
            faiss.ParameterSpace().set_index_parameter(index, knob, value)
            found = index.search(texts, 10)[1]
            hits = [len({*a} & {*b}) for a, b in zip(found.tolist(), best.tolist(), strict=True)]
            result[f"recall@10 of {spec}, {knob} {value}"] = float(np.mean(hits)) / 10
    return result


def main() -> None:
    """Print the facts of real and made-up vectors side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True)
    options = parser.parse_args()
    images, texts = (
        np.load(options.real / f"clip-b32-{name}.npy").astype(np.float32)
        for name in ("images", "class-names")
    )
    made = GapVectors(images.shape[1])
    real = facts(images, texts)
    ours = facts(np.concatenate([*made.images(len(images))]), made.texts(len(texts)))
    print(f"{'':45}  real   made up")
    for name, value in real.items():
        print(f"{name:45} {value:6.3f}  {ours[name]:6.3f}")


if __name__ == "__main__":
    main()
