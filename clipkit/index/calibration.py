"""Calibration: what the scores of a text query say, as two probabilities.

An inner product of 0.31 means little: it depends on the model, on the wording of the query and on
the content of the index. Logistic regression (Platt 1999) on the margin, the distance of a score
above the query's mean score over the whole index, gives

- the probability that a hit matches the query, and
- the probability that any of the ten best hits does (``any_match``).

It is fitted to captions of indexed images, each searched for twice: with its own image in the index
and without. The own image matches. Other images match to a degree, which ``grade_hits`` takes from
their captions, without the model. Half of the queries thus describe an image of the index, and half
only what else it holds. Both probabilities are checked on captions that did not fit them.

Without captions there is no evidence of matches. The best hit is then only compared with those of
random words.
"""

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import ArtifactError
from clipkit.evaluation.calibration import Bin, expected_calibration_error, reliability
from clipkit.evaluation.classification import auroc
from clipkit.index.exact import Floats, Integers, search_exact
from clipkit.index.sample_queries import FEWEST, SampleQueries

TOP = 10
"""Hits of each query that are graded, and that ``any_match`` is about."""
FOLDS = 5
"""The errors are measured on captions that the regression has not seen, a fifth at a time."""
LEAST_AUROC = 0.6
"""Least AUROC of captions against random words for which anything is said; 0.5 is chance."""
GOOD = 0.5
"""With a lower probability of any match, a search has no good match."""
NOISE = 0.95
"""Share of random-word queries whose best hit counts as no match, if there are no captions."""
RIDGE = 1e-3
"""Keeps the slope finite if the two kinds of scores do not overlap."""
GRAM = 4
"""Characters of the word fragments by which captions are compared: "dog" and "dogs" share one."""

Numbers = NDArray[np.float64]
Blocks = Callable[[], Iterable[Floats]]
"""Gives the vectors in row order, in arrays of any sizes, each time it is called."""
CaptionsOf = Callable[[Integers], Mapping[int, Sequence[str]]]
"""Gives the captions of rows, by row."""


@dataclass(frozen=True)
class Logistic:
    """A probability as a function of the margin, and its check on queries that did not fit it.

    Attributes:
        slope: change of the log-odds per unit of margin.
        constant: log-odds at a margin of zero.
        error: expected calibration error (Guo et al. 2017, eq. 3), cross-fitted.
        reliability: the bins of the reliability diagram, cross-fitted.
    """

    slope: float
    constant: float
    error: float
    reliability: tuple[Bin, ...]

    def __call__(self, margins: Numbers) -> Numbers:
        """Probabilities of margins, of the same shape."""
        return _sigmoid(self.slope * margins + self.constant)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "slope": round(self.slope, 6),
            "constant": round(self.constant, 6),
            "error": round(self.error, 4),
            "reliability": [
                {name: round(value, 4) for name, value in asdict(one).items()}
                for one in self.reliability
            ],
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """What ``to_dict`` gave."""
        bins = tuple(Bin(**one) for one in raw["reliability"])
        return cls(float(raw["slope"]), float(raw["constant"]), float(raw["error"]), bins)


@dataclass(frozen=True)
class Assessment:
    """What the scores of one text query say.

    Attributes:
        probabilities: float32 [k], that each hit matches the query; None without evidence.
        any_match: probability that any of the ten best hits matches; None without evidence.
        matched: False if there is no good match; True if ``any_match`` is at least ``GOOD``; None
            if neither can be said.
    """

    probabilities: Floats | None = None
    any_match: float | None = None
    matched: bool | None = None


@dataclass(frozen=True)
class Calibration:
    """How scores of an index become probabilities.

    Attributes:
        background: float32 [dim], the mean vector of the index.
        auroc: how surely the best hit of a caption scores above that of random words; 0.5 is
            chance.
        noise: margin that the best hits of 95 % of random-word queries stay below.
        captions: how many captions were searched for.
        source: where those come from.
        hit: the probability that a hit matches; None if the captions are not those of the images.
        any_match: the probability that any of the ten best hits matches; None likewise.
        grading: how images other than a caption's own were graded; None likewise.
    """

    background: Floats
    auroc: float
    noise: float
    captions: int
    source: str
    hit: Logistic | None = None
    any_match: Logistic | None = None
    grading: str | None = None

    @property
    def informative(self) -> bool:
        """Whether the model's scores say anything."""
        rising = self.hit is None or self.any_match is None or self.hit.slope > 0
        return self.auroc >= LEAST_AUROC and rising

    @property
    def gives_probabilities(self) -> bool:
        """Whether hits have a probability."""
        return self.informative and self.hit is not None

    def assess(self, query: Floats, scores: Floats) -> Assessment:
        """What the scores of a text query say.

        Args:
            query: float32 [dim], the text's vector.
            scores: float32 [k], of its hits, from the best one on.
        """
        if not self.informative or not len(scores):
            return Assessment()
        margins = scores.astype(np.float64) - float(query @ self.background)
        if self.hit is None or self.any_match is None:
            return Assessment(matched=False if margins[0] < self.noise else None)
        found = float(self.any_match(margins[0]))
        # One hit cannot be likelier to match than any of ten.
        probabilities = np.minimum(self.hit(margins), found).astype(np.float32)
        return Assessment(probabilities, found, found >= GOOD)

    def figures(self) -> dict[str, Any]:
        """What is known of the calibration, as plain data."""
        fitted = {"hit": self.hit, "any_match": self.any_match}
        return {
            "informative": self.informative,
            "auroc": round(self.auroc, 4),
            "captions": self.captions,
            "source": self.source,
            "grading": self.grading,
            **{name: None if one is None else one.to_dict() for name, one in fitted.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a manifest."""
        background = base64.b64encode(self.background.astype("<f4").tobytes()).decode()
        return {"background": background, "noise": round(self.noise, 6), **self.figures()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any], dim: int, path: str = "INDEX") -> Self:
        """What ``to_dict`` gave.

        Args:
            raw: the plain data.
            dim: width of the index's vectors.
            path: the index, for the message of an error.

        Raises:
            ArtifactError: it is damaged, or of a clipkit whose probabilities were too high.
        """
        repair = f"run `clipkit index calibrate {path}` again"
        if "weights" in raw:
            raise ArtifactError(
                f"{path} was calibrated by an older clipkit, whose probabilities were too high; "
                f"{repair}"
            )
        try:
            background = np.frombuffer(base64.b64decode(raw["background"]), "<f4")
            if background.shape != (dim,):
                raise ValueError(f"a background of {len(background)} numbers")
            hit, any_match = (
                None if raw[name] is None else Logistic.from_dict(raw[name])
                for name in ("hit", "any_match")
            )
            figures = float(raw["auroc"]), float(raw["noise"]), int(raw["captions"])
            return cls(background, *figures, str(raw["source"]), hit, any_match, raw["grading"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the calibration in the manifest of {path} cannot be read ({error}), expected "
                f"one written by `clipkit index calibrate`; {repair}"
            ) from None


def calibrate(queries: SampleQueries, blocks: Blocks, captions_of: CaptionsOf) -> Calibration:
    """Fit probabilities to the scores of sample queries.

    Args:
        queries: captions of images of the index, at least two, or generic ones; and random words.
        blocks: gives the vectors of the index.
        captions_of: gives the captions of its rows.
    """
    count = sum(len(block) for block in blocks())
    total = sum(block.sum(axis=0, dtype=np.float64) for block in blocks())
    background = np.asarray(total / count, np.float32)
    means = (queries.captions @ background)[:, None]
    scores, hits = search_exact(queries.captions, blocks(), TOP + 1)
    margins = scores.astype(np.float64) - means
    noise = search_exact(queries.nonsense, blocks(), 1)[0][:, 0] - queries.nonsense @ background
    facts = (
        background,
        auroc(margins[:, 0], noise),
        float(np.quantile(noise, NOISE)),
        len(queries.captions),
    )
    if not len(queries.rows):
        return Calibration(*facts, queries.source)
    grades, grading = grade_hits(
        queries.texts, queries.rows, hits, captions_of(np.union1d(hits, queries.rows))
    )
    own = hits == queries.rows[:, None]
    # Without its own image, a query has the other hits, in the same order.
    shown = hits.shape[1] - 1
    others = np.argsort(own, axis=1, kind="stable")[:, :shown]
    with_own = margins[:, :shown], grades[:, :shown]
    without = [np.take_along_axis(one, others, axis=1) for one in (margins, grades)]
    margins, grades = (np.stack(one) for one in zip(with_own, without, strict=True))
    return Calibration(
        *facts,
        queries.source,
        _fit_hits(margins, grades),
        _fit_any_match(margins, grades, noise.astype(np.float64)),
        grading,
    )


def _fit_hits(margins: Numbers, grades: Numbers) -> Logistic:
    """The probability of hits, [2, m, k] with and without the own image; better ranks count more.

    Rank r has the weight 1/r, so that the first hits, at which people look, are fitted best.
    """
    numbers = np.broadcast_to(np.arange(margins.shape[1])[:, None], margins.shape)
    weights = np.broadcast_to(1 / np.arange(1, margins.shape[2] + 1), margins.shape)
    return _cross_fitted(margins.ravel(), grades.ravel(), weights.ravel(), numbers.ravel())


def _fit_any_match(margins: Numbers, grades: Numbers, noise: Numbers) -> Logistic:
    """The probability of any match among the hits [2, m, k]; random words [g] have none.

    Half of the weight is on queries with their own image in the index; captions without it and
    random words have a quarter each. The best grade is a lower bound of the probability that any of
    the hits matches.
    """
    parts = [(margins[0, :, 0], grades[0].max(axis=1), 0.5)]
    parts += [(margins[1, :, 0], grades[1].max(axis=1), 0.25), (noise, np.zeros(len(noise)), 0.25)]
    best, target = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
    weights = np.concatenate([np.full(len(part[0]), part[2] / len(part[0])) for part in parts])
    numbers = np.concatenate([np.arange(len(part[0])) for part in parts])
    return _cross_fitted(best, target, weights, numbers)


def _cross_fitted(
    margins: Numbers, targets: Numbers, weights: Numbers, numbers: Integers
) -> Logistic:
    """Fit all [n], and measure the error with fits that have not seen a query's number."""
    chance = np.empty(len(margins))
    for fold in range(FOLDS):
        seen = numbers % FOLDS != fold
        slope, constant = _fit(margins[seen], targets[seen], weights[seen])
        chance[~seen] = _sigmoid(slope * margins[~seen] + constant)
    error = float(expected_calibration_error(chance, targets, weights[None])[0])
    bins = tuple(reliability(chance, targets, weights))
    return Logistic(*_fit(margins, targets, weights), error, bins)


def _fit(margins: Numbers, targets: Numbers, weights: Numbers) -> tuple[float, float]:
    """Slope and constant of a weighted logistic regression on targets in [0, 1], by Newton."""
    centre, scale = margins.mean(), margins.std() + 1e-12
    inputs = np.stack([(margins - centre) / scale, np.ones(len(margins))], axis=1)
    share = weights / weights.sum()
    ridge = np.diag([RIDGE, 0.0])
    found = np.zeros(2)
    for _ in range(30):
        chance = _sigmoid(inputs @ found)
        slope = inputs.T @ (share * (chance - targets)) + ridge @ found
        curve = (inputs.T * (share * chance * (1 - chance))) @ inputs + ridge
        step = np.linalg.solve(curve + 1e-12 * np.eye(2), slope)
        found = found - step
        if np.abs(step).max() < 1e-9:
            break
    return float(found[0] / scale), float(found[1] - found[0] * centre / scale)


def _sigmoid(values: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-np.clip(values, -50, 50)))


def grade_hits(
    texts: Sequence[str],
    rows: Integers,
    hits: Integers,
    captions: Mapping[int, Sequence[str]],
) -> tuple[Numbers, str]:
    """How probably each hit matches its query, judged by captions alone.

    The image a query was written for matches: grade 1. For another image, the agreement of its
    captions with the query counts: the share of the query's word fragments that they hold, rare
    ones weighing more. The reference is the agreement of the query with the remaining captions of
    its own image. A hit that agrees at least as well as the median of those has the full grade, a
    lower one twice the share of them that it reaches. All grades are scaled down by how far random
    pairs reach grades as well.

    On Flickr8k dev, 28 % of 120 best hits that were not the query's own photo were found to match,
    at most with minor errors, when looked at; their mean grade is 0.27.

    With one caption per image there is no reference; another image then matches if its captions
    hold all of the query. That understates matches.

    Args:
        texts: m queries.
        rows: int64 [m], the row each was written for.
        hits: int64 [m, k], rows.
        captions: captions of all these rows.

    Returns:
        Grades, float64 [m, k], and how they were made, in words.
    """
    fragments = {row: [_fragments(text) for text in written] for row, written in captions.items()}
    own = [int(row) for row in rows]
    counts = Counter(f for row in set(own) for f in set().union(*fragments[row]))
    queries = [
        {fragment: np.log((len(own) + 1) / max(1, counts[fragment])) for fragment in found}
        for found in map(_fragments, texts)
    ]
    # As many captions vouch for a hit as are left of the own image.
    left = [
        [one for one, text in zip(fragments[row], captions[row], strict=True) if text != query]
        for row, query in zip(own, texts, strict=True)
    ]

    def agreement(number: int, written: Sequence[set[str]]) -> float:
        query = queries[number]
        shared = set(query).intersection(set().union(*written[: max(1, len(left[number]))]))
        total = max(sum(query.values()), 1e-12)
        return float(sum(query[fragment] for fragment in shared) / total)

    reference = np.sort([agreement(n, written) for n, written in enumerate(left) if written])
    vouched = len(reference) >= FEWEST
    if not vouched:
        reference = np.ones(1)

    def grade(values: Any) -> Numbers:
        # Sums of the same fragments in another order differ by rounding.
        reached = np.searchsorted(reference, np.asarray(values) + 1e-9, side="right")
        return np.asarray(np.minimum(1, 2 * reached / len(reference)), np.float64)

    # Neighbouring rows are often alike, such as photos of one folder.
    pairs = enumerate(np.random.default_rng(0).permutation(len(own)))
    chance = grade(
        [agreement(n, left[m] or fragments[own[m]]) for n, m in pairs if own[m] != own[n]]
    )
    trust = max(0.0, 1 - float(chance.mean() / grade(reference).mean())) if len(chance) else 0.0
    grades = trust * grade(
        [[agreement(n, fragments[int(hit)]) for hit in line] for n, line in enumerate(hits)]
    )
    grades[hits == rows[:, None]] = 1
    how = "other images graded by their captions" if vouched else "other images rarely match"
    return grades, how


def _fragments(text: str) -> set[str]:
    """The overlapping fragments of ``GRAM`` characters of the words, which spaces surround."""
    words = (f" {word} " for word in re.findall(r"\w+", text.lower()))
    return {word[at : at + GRAM] for word in words for at in range(max(1, len(word) - GRAM + 1))}
