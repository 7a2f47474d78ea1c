"""What a few labelled images teach: ``clipkit probe DATA --model M --shots 1,2,4,8,16``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clipkit.artifacts import ModelRef
from clipkit.classifiers.few_shot import METHODS, Labelled, accuracy, one_thread
from clipkit.classifiers.zero_shot import Classifier, ZeroShotClassifier
from clipkit.data.labels import own_labels, targets_of
from clipkit.data.open_source import Source
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.errors import DataError
from clipkit.evaluation.bootstrap import Estimate, interval, resamples
from clipkit.models.embed_source import cached_pairs
from clipkit.models.encoder import Encoder

ZERO_SHOT = "zero-shot"
MOST_HELD_OUT = 4
"""Examples of a class that choose settings: as many as there are shots, at most four."""
TEST_SHARE = 0.5
"""Share of each class that is tested on where no test data are named."""


@dataclass(frozen=True)
class Row:
    """One method with so many shots.

    Attributes:
        method: its name.
        shots: labelled images of each class that it learned from; 0 for captions alone.
        accuracy: mean over the seeds, with a 95 % interval over seeds and test images together.
        mean_per_class: the mean of the classes' own accuracies, likewise.
        by_seed: the accuracy of each seed.
    """

    method: str
    shots: int
    accuracy: Estimate
    mean_per_class: Estimate
    by_seed: list[float]


@dataclass(frozen=True)
class Probe:
    """What was learned from how much.

    Attributes:
        model: the model.
        data: what was learned from and, if nothing else was named, tested on.
        classes: the labels.
        tested: how many images were tested on.
        rows: captions alone first, then method after method.
        best: the classifier that did best on held-out examples with most shots and the first seed.
        notes: what to keep in mind.
    """

    model: ModelRef
    data: str
    classes: list[str]
    tested: int
    rows: list[Row]
    best: Classifier
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "model": str(self.model),
            "fingerprint": self.model.fingerprint,
            "data": self.data,
            "classes": len(self.classes),
            "tested": self.tested,
            "rows": [asdict(row) for row in self.rows],
            "best": self.best.kind,
            "notes": self.notes,
        }


def probe(
    source: Source,
    encoder: Encoder,
    *,
    test: Source | None = None,
    labels: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 5,
    progress: bool = True,
) -> Probe:
    """Learn from so many images of each class, test on others, and again with other draws.

    Beside the shots, as many images of each class (at most four) choose a method's settings.

    Args:
        source: images with labels to learn from.
        encoder: the model; its vectors are made once, and kept in the person's cache.
        test: images with labels to test on; None: half of each class, which is not learned from.
        labels: the classes, with the words for them; None: the labels of the data.
        templates: captions with a ``{}`` where the label goes.
        shots: images of each class to learn from.
        methods: of ``METHODS``.
        seeds: how many draws.
        progress: show a bar on stderr.

    Raises:
        DataError: no labels, a label of the test data that is not learned, or too few images of a
            class even for the fewest shots.
        CaptionError: labels or templates that cannot be used.
    """
    names, pool = _labelled(source, encoder, labels, progress)
    if test is None:
        pool, tested = _split(pool)
    else:
        _, tested = _labelled(test, encoder, names, progress)
    text = ZeroShotClassifier.from_labels(encoder, names, templates)
    possible, notes = _possible(pool, names, sorted(set(shots)), source)
    rows = [_row(ZERO_SHOT, 0, [_hits(text, tested)], tested)]
    best: tuple[float, Classifier] = (-1.0, text)
    work = [(method, count) for method in methods for count in possible]
    show = None if progress else True
    with one_thread(), tqdm(total=len(work) * seeds, desc="probing", disable=show) as bar:
        for method, count in work:
            hits = []
            for seed in range(seeds):
                learned, held_out = draw(pool, count, seed)
                head = METHODS[method](learned, held_out, text)
                hits.append(_hits(head, tested))
                if count == possible[-1] and seed == 0:
                    best = max(best, (accuracy(head, held_out), head), key=lambda one: one[0])
                bar.update()
            rows.append(_row(method, count, hits, tested))
    return Probe(encoder.model, source.spec, list(names), len(tested.targets), rows, best[1], notes)


def draw(pool: Labelled, shots: int, seed: int) -> tuple[Labelled, Labelled]:
    """So many examples of each class, and others of each that choose settings.

    Args:
        pool: what to draw from, at least ``shots + 1`` of each class.
        shots: of each class.
        seed: of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(pool.targets))
    learned, held_out = [], []
    for number in np.unique(pool.targets):
        mine = order[pool.targets[order] == number]
        learned.append(mine[:shots])
        held_out.append(mine[shots : shots + min(shots, MOST_HELD_OUT)])
    first, second = np.concatenate(learned), np.concatenate(held_out)
    return (
        Labelled(pool.vectors[first], pool.targets[first]),
        Labelled(pool.vectors[second], pool.targets[second]),
    )


def _labelled(
    source: Source, encoder: Encoder, labels: Sequence[str] | None, progress: bool
) -> tuple[list[str], Labelled]:
    """The vectors that have a label, and the labels they are numbered by."""
    pairs = cached_pairs(encoder, source, with_captions=False, progress=progress)
    names = list[str](own_labels(pairs.labels, source.spec) if labels is None else labels)
    rows, targets = targets_of(pairs.labels, names, source.spec)
    return names, Labelled(pairs.images[rows], targets)


def _split(pool: Labelled) -> tuple[Labelled, Labelled]:
    """A part to learn from and a part to test on, the same whatever the seeds."""
    order = np.random.default_rng(0).permutation(len(pool.targets))
    tested = []
    for number in np.unique(pool.targets):
        mine = order[pool.targets[order] == number]
        tested.append(mine[: max(1, round(TEST_SHARE * len(mine)))])
    chosen = np.zeros(len(pool.targets), bool)
    chosen[np.concatenate(tested)] = True
    return (
        Labelled(pool.vectors[~chosen], pool.targets[~chosen]),
        Labelled(pool.vectors[chosen], pool.targets[chosen]),
    )


def _possible(
    pool: Labelled, names: Sequence[str], shots: Sequence[int], source: Source
) -> tuple[list[int], list[str]]:
    """The numbers of shots for which every class has enough images, and what is to be said."""
    counts = np.bincount(pool.targets, minlength=len(names))
    fewest = int(counts.argmin())
    possible = [count for count in shots if 0 < count < counts[fewest]]
    if not possible:
        raise DataError(
            f"{source.spec} has {counts[fewest]} images of {names[fewest]!r} to learn from, "
            f"expected {max(1, min(shots)) + 1} or more (a shot, and one more to choose settings "
            "by); add images, leave the class out, or name other --test data"
        )
    left_out = [count for count in shots if count not in possible]
    if not left_out:
        return possible, []
    note = (
        f"{', '.join(map(str, left_out))} shots are left out: of {names[fewest]!r} there are "
        f"{counts[fewest]} images to learn from, one of them to choose settings by"
    )
    return possible, [note]


def _hits(head: Classifier, tested: Labelled) -> NDArray[np.float64]:
    """1 for each test image whose likeliest label is right, else 0."""
    found = head.logits(tested.vectors).argmax(axis=1)
    return np.asarray(found == tested.targets, np.float64)


def _row(method: str, shots: int, hits: Sequence[NDArray[np.float64]], tested: Labelled) -> Row:
    """Means over seeds and test images; both are drawn anew for the intervals."""
    table = np.stack(hits)
    support = np.bincount(tested.targets)[tested.targets]
    per_class = table / support * len(support) / len(np.unique(tested.targets))
    generator = np.random.default_rng(1)
    drawn: list[list[NDArray[np.float64]]] = [[], []]
    for weights in resamples(table.shape[1], seed=0):
        seeds = generator.integers(0, len(table), (len(weights), len(table)))
        for place, values in enumerate((table, per_class)):
            by_seed = weights @ values.T / table.shape[1]
            drawn[place].append(np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1))
    estimates = [
        Estimate(float(values.mean()), *interval(np.concatenate(parts)))
        for values, parts in zip((table, per_class), drawn, strict=True)
    ]
    return Row(method, shots, estimates[0], estimates[1], table.mean(axis=1).tolist())
