"""Few-shot classification: ``clipkit eval probe DATA --model M --shots 1,2,4,8,16``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.arguments import require_encoder
from clipkit.artifacts import ModelRef
from clipkit.classifiers.few_shot import METHODS, Labelled, accuracy, one_thread, require_methods
from clipkit.classifiers.heads import Templates, list_templates, read_labels_or_classifier
from clipkit.classifiers.zero_shot import Classifier, ZeroShotClassifier
from clipkit.data.labels import Label, own_labels, targets_of
from clipkit.data.open_source import Data, Source, open_source
from clipkit.display.dataframe import data_frame
from clipkit.display.html import bullets, card, table
from clipkit.errors import DataError
from clipkit.evaluation.bootstrap import Estimate, interval, resamples
from clipkit.models.embed_source import EncodedPairs, cached_pairs
from clipkit.models.encoder import BatchSize, Encoder
from clipkit.models.loading import load_model
from clipkit.progress import progress_bar

ZERO_SHOT = "zero-shot"
MOST_HELD_OUT = 4
"""Held-out examples of a class, which choose hyperparameters: one per shot, at most four."""
TEST_SHARE = 0.5
"""The share of each class that is tested on if no test data are given."""


@dataclass(frozen=True)
class ProbeResult:
    """One method with one number of shots.

    Attributes:
        method: its name.
        shots: labelled images per class; 0 for zero-shot.
        accuracy: the mean over the seeds, with a 95 % interval over seeds and test images.
        mean_per_class: the mean of the accuracies of the classes, likewise.
        by_seed: the accuracy with each seed.
    """

    method: str
    shots: int
    accuracy: Estimate
    mean_per_class: Estimate
    by_seed: list[float]


@dataclass(frozen=True)
class ProbeReport:
    """The accuracy of few-shot classifiers.

    Attributes:
        model: the model.
        data: the name of the training data, which are also the test data if no others are given.
        classes: the labels.
        tested: the number of test images.
        results: zero-shot first, then method after method.
        best: the classifier with the best accuracy on the held-out examples, among those with the
            most shots and the first seed.
        notes: caveats, as sentences.
    """

    model: ModelRef
    data: str
    classes: list[str]
    tested: int
    results: list[ProbeResult]
    best: Classifier = field(repr=False)
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "model": str(self.model),
            "fingerprint": self.model.fingerprint,
            "data": self.data,
            "classes": len(self.classes),
            "tested": self.tested,
            "rows": [asdict(one) for one in self.results],
            "best": self.best.kind,
            "notes": self.notes,
        }

    def to_pandas(self) -> Any:
        """A data frame with a row for each method and number of shots.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return data_frame(
            {
                "method": [one.method for one in self.results],
                "shots": [one.shots for one in self.results],
                "accuracy": [one.accuracy.value for one in self.results],
                "low": [one.accuracy.low for one in self.results],
                "high": [one.accuracy.high for one in self.results],
                "mean_per_class": [one.mean_per_class.value for one in self.results],
            }
        )

    def _repr_html_(self) -> str:
        rows = [
            (
                one.method,
                str(one.shots),
                f"{one.accuracy.value:.3f}",
                f"{one.accuracy.low:.3f} to {one.accuracy.high:.3f}",
                f"{one.mean_per_class.value:.3f}",
            )
            for one in self.results
        ]
        title = f"few-shot classification of {self.data}: {self.tested:,} images, {self.model}"
        header = ("method", "shots", "accuracy", "95 % interval", "mean per class")
        return card(title, []) + table(header, rows) + bullets(self.notes)


def probe(
    data: Data,
    encoder: Encoder | None = None,
    *,
    test: Data | None = None,
    labels: Sequence[str | Label] | str | Path | None = None,
    templates: Templates = None,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 5,
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> ProbeReport:
    """Fit classifiers on a few labelled images per class, and measure their accuracy.

    The images are encoded once. Each seed draws the shots of each class, and as many held-out
    examples (at most four) that choose the hyperparameters.

    Args:
        data: images with labels.
        encoder: the model; None for the default model.
        test: data to test on; None for half of each class.
        labels: the classes: a list, or a file with one label per line; None for those of the data.
        templates: captions with a ``{}`` in place of the label, as for ``evaluate_zero_shot``.
        shots: numbers of labelled images per class.
        methods: of ``METHODS``.
        seeds: the number of draws.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: ``labels`` or ``methods`` is a single string instead of a list.
        ConfigError: a method is unknown.
        DataError: no labels, a label of the test data that is not among the classes, or a class
            with too few images even for the fewest shots.
        CaptionError: labels or templates that cannot be used.
    """
    require_encoder(encoder)
    methods, captions = require_methods(methods), list_templates(templates)
    given = None if labels is None else read_labels_or_classifier(labels)
    if isinstance(given, Classifier):
        raise TypeError("labels is a classifier, expected labels to fit classifiers for")
    source = open_source(data, caption="")
    test_source = None if test is None else open_source(test, caption="")
    encoder = encoder or load_model()
    encode = partial(
        cached_pairs,
        encoder,
        batch_size=batch_size,
        workers=workers,
        with_captions=False,
        progress=progress,
    )
    classes, pool = _labelled(encode(source), source.spec, given)
    if test_source is None:
        pool, tested = _split(pool)
    else:
        _, tested = _labelled(encode(test_source), test_source.spec, classes)
    text = ZeroShotClassifier.from_labels(encoder, classes, captions)
    names = [str(label) for label in classes]
    possible, notes = _possible_shots(pool, names, sorted(set(shots)), source)
    results = [_result(ZERO_SHOT, 0, [_hits(text, tested)], tested)]
    best: tuple[float, Classifier] = (-1.0, text)
    work = [(method, count) for method in methods for count in possible]
    fits = len(work) * seeds
    with one_thread(), progress_bar(total=fits, desc="probing", shown=progress) as bar:
        for method, count in work:
            hits = []
            for seed in range(seeds):
                train, held_out = draw(pool, count, seed)
                head = METHODS[method](train, held_out, text)
                hits.append(_hits(head, tested))
                if count == possible[-1] and seed == 0:
                    best = max(best, (accuracy(head, held_out), head), key=lambda one: one[0])
                bar.update()
            results.append(_result(method, count, hits, tested))
    return ProbeReport(
        encoder.model, source.spec, names, len(tested.targets), results, best[1], notes
    )


def draw(pool: Labelled, shots: int, seed: int) -> tuple[Labelled, Labelled]:
    """Training examples of each class, and held-out examples that choose hyperparameters.

    Args:
        pool: at least ``shots + 1`` examples of each class.
        shots: training examples per class.
        seed: of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(pool.targets))
    train, held_out = [], []
    for number in np.unique(pool.targets):
        mine = order[pool.targets[order] == number]
        train.append(mine[:shots])
        held_out.append(mine[shots : shots + min(shots, MOST_HELD_OUT)])
    first, second = np.concatenate(train), np.concatenate(held_out)
    return (
        Labelled(pool.vectors[first], pool.targets[first]),
        Labelled(pool.vectors[second], pool.targets[second]),
    )


def _labelled(
    pairs: EncodedPairs, spec: str, labels: Sequence[Label] | None
) -> tuple[list[Label], Labelled]:
    """The classes, and the vectors of the images that have a label."""
    classes = own_labels(pairs.labels, spec) if labels is None else list(labels)
    rows, targets = targets_of(pairs.labels, classes, spec)
    return classes, Labelled(pairs.images[rows], targets)


def _split(pool: Labelled) -> tuple[Labelled, Labelled]:
    """The training pool and the test part, the same for all seeds."""
    order = np.random.default_rng(0).permutation(len(pool.targets))
    tested = []
    for number in np.unique(pool.targets):
        mine = order[pool.targets[order] == number]
        tested.append(mine[: max(1, round(TEST_SHARE * len(mine)))])
    mask = np.zeros(len(pool.targets), bool)
    mask[np.concatenate(tested)] = True
    return (
        Labelled(pool.vectors[~mask], pool.targets[~mask]),
        Labelled(pool.vectors[mask], pool.targets[mask]),
    )


def _possible_shots(
    pool: Labelled, names: Sequence[str], shots: Sequence[int], source: Source
) -> tuple[list[int], list[str]]:
    """The numbers of shots for which every class has enough images, and a note on the others."""
    counts = np.bincount(pool.targets, minlength=len(names))
    fewest = int(counts.argmin())
    possible = [count for count in shots if 0 < count < counts[fewest]]
    if not possible:
        raise DataError(
            f"{source.spec} has {counts[fewest]} training images of {names[fewest]!r}, expected "
            f"{max(1, min(shots)) + 1} or more (the shots, and a held-out image to choose "
            "hyperparameters); add images, leave the class out, or give separate test data"
        )
    left_out = [count for count in shots if count not in possible]
    if not left_out:
        return possible, []
    note = (
        f"{', '.join(map(str, left_out))} shots are left out: {names[fewest]!r} has "
        f"{counts[fewest]} training images, one of which is held out"
    )
    return possible, [note]


def _hits(head: Classifier, tested: Labelled) -> NDArray[np.float64]:
    """1 for each test image with a correct prediction, else 0."""
    found = head.logits(tested.vectors).argmax(axis=1)
    return np.asarray(found == tested.targets, np.float64)


def _result(
    method: str, shots: int, hits: Sequence[NDArray[np.float64]], tested: Labelled
) -> ProbeResult:
    """Means over seeds and test images; the bootstrap resamples both."""
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
    return ProbeResult(method, shots, estimates[0], estimates[1], table.mean(axis=1).tolist())
