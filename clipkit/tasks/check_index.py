"""Examine an index: ``clipkit index check``."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import ArtifactError
from clipkit.index.build import sealed
from clipkit.index.exact import search_exact, take_rows
from clipkit.index.sample_queries import OLD_FILE, read_sample_queries
from clipkit.index.tuning import exact_milliseconds, remeasure
from clipkit.index.vector_index import VectorIndex
from clipkit.store.shards import UNIT_TOLERANCE, Vectors

SAMPLE = 200
"""Images that are searched for among all; each takes a product with every vector."""
K = 10
MOST_REMOVED = 0.2
"""A larger share of removed rows is advised to be compacted away: they cost time in each search."""
MOST_LATER, FEWEST_LATER = 0.2, 10_000
"""The same of rows behind the base, which are searched one by one, where they are that many."""
LOW = 0.9
"""A lower recall calls for training again, or for another spec."""
DROP = 0.02
"""Captions that find so much less of their ten best than was recorded call for it, too."""
EQUAL = 1e-5
"""Scores that differ by less count as equal: products are summed in different orders."""


@dataclass
class IndexReport:
    """What was found.

    Attributes:
        path: the index.
        vectors: how many it holds.
        segments: of how many pieces it consists.
        removed: share of its rows that are removed.
        later: share of its rows in segments after the base.
        found: share of sampled images that a search with their own vector finds first.
        recall: of the ten nearest images to sampled ones, the share that the index finds.
        text_recall: the same for captions whose vectors were stored when the index was tuned or
            calibrated.
        recorded_recall: what they found then.
        milliseconds: median time of a single such caption.
        recorded_milliseconds: what it took then.
        exact_milliseconds: what exact search takes.
        not_measured: why captions were not measured; None if they were.
        problems: what is wrong with it.
        advice: what would make it better.
    """

    path: Path
    vectors: int
    segments: int
    removed: float
    later: float
    found: float | None = None
    recall: float | None = None
    text_recall: float | None = None
    recorded_recall: float | None = None
    milliseconds: float | None = None
    recorded_milliseconds: float | None = None
    exact_milliseconds: float | None = None
    not_measured: str | None = None
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {**vars(self), "path": str(self.path)}


def check_index(path: str | Path) -> IndexReport:
    """Examine an index: its files, its rows, and what searching it finds.

    Every byte is read. The recall is measured against exact search with a sample of its own
    vectors, equal scores counting as found, and with captions whose vectors were stored when it was
    tuned or calibrated, so that no model is needed.

    Raises:
        ArtifactError: it cannot be opened at all.
    """
    index = VectorIndex.open(path)
    rows = sum(segment.rows for segment in index.segments)
    behind = sum(len(segment) for segment in index.segments[1:])
    report = IndexReport(
        Path(path),
        len(index),
        len(index.segments),
        removed=1 - len(index) / rows if rows else 0.0,
        later=behind / max(len(index), 1),
    )
    report.problems = list(_files(index)) or list(_rows(index))
    if report.problems:
        report.advice = ["build the index again, or take its last good copy"]
        return report
    if len(index) and all(segment.vectors is not None for segment in index.segments):
        _search(index, report)
        _ask(index, report)
    report.advice = list(_advice(index, report, behind))
    return report


def _files(index: VectorIndex) -> Iterator[str]:
    for segment in index.segments:
        for name, (_, expected) in segment.parts.files.items():
            try:
                _, found = sealed(index.path / name)
            except OSError as error:
                raise ArtifactError(
                    f"{index.path / name} cannot be read ({error.strerror}), maybe because the "
                    "index was changed meanwhile; check it again"
                ) from None
            if found != expected:
                yield f"{name} is not as it was written: its SHA-256 has changed"


def _rows(index: VectorIndex) -> Iterator[str]:
    keys, ids = index.keys, index.records()["id"].to_numpy()
    if len(set(keys)) < len(keys):
        yield f"{len(keys) - len(set(keys))} keys are repeated"
    if len(np.unique(ids)) < len(ids):
        yield f"{len(ids) - len(np.unique(ids))} ids are repeated"
    next_id = index.manifest.detail.get("next_id", len(ids))
    if len(ids) and (ids.min() < 0 or ids.max() >= next_id):
        yield f"ids run from {ids.min()} to {ids.max()}, expected 0 to {next_id - 1}"
    whole = all(segment.vectors is not None for segment in index.segments)
    if bad := sum(_off_unit(vectors) for vectors, _ in index.shards()) if whole else 0:
        yield f"{bad} vectors are not of unit length"


def _off_unit(vectors: Vectors) -> int:
    lengths = np.linalg.norm(vectors, axis=1)
    # Written so that NaN, for which every comparison is false, counts as bad.
    return int(np.count_nonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE)))


def _search(index: VectorIndex, report: IndexReport) -> None:
    """Search for a sample of the vectors, and compare with exact search."""
    chosen = np.sort(
        np.random.default_rng(0).choice(len(index), min(SAMPLE, len(index)), replace=False)
    )
    keys = np.array(index.keys, object)[chosen]
    sample = take_rows((vectors for vectors, _ in index.shards()), chosen)
    k = min(K, len(index))
    exact, _ = search_exact(sample, (vectors for vectors, _ in index.shards()), k)
    first = found = 0
    for hits, key, best in zip(index.search_vectors(sample, k), keys, exact, strict=True):
        reached = [hit for hit in hits if hit.score >= best[-1] - EQUAL]
        found += len(reached)
        # A copy of an image may rank before it.
        first += any(hit.key == key or hit.score >= best[0] - EQUAL for hit in hits[:1])
    report.found, report.recall = first / len(sample), found / (k * len(sample))


def _ask(index: VectorIndex, report: IndexReport) -> None:
    """Search with the captions stored beside the index, and compare with the recorded figures."""
    recorded = index.manifest.detail.get("measured", {})
    report.recorded_recall = recorded.get("recall")
    report.recorded_milliseconds = recorded.get("milliseconds")
    try:
        captions = read_sample_queries(index.path, index.dim)
    except ArtifactError as error:
        report.not_measured = str(error)
        return
    if captions is None:
        report.not_measured = (
            "no captions are stored with it, as `clipkit index build --spec auto` and "
            "`clipkit index calibrate` do"
        )
        return
    found = remeasure(index, captions)
    report.text_recall, report.milliseconds = found.recall, found.milliseconds
    report.exact_milliseconds = exact_milliseconds(index, captions)


def _advice(index: VectorIndex, report: IndexReport, behind: int) -> Iterator[str]:
    compact = f"`clipkit index compact {index.path}`"
    if (index.path / OLD_FILE).exists():
        yield (
            f"{OLD_FILE} holds captions, but other tools take it for vectors of images: "
            f"`clipkit index calibrate {index.path}` replaces it"
        )
    if report.removed > MOST_REMOVED:
        yield f"{report.removed:.0%} of its rows are removed: {compact} makes it smaller and faster"
    if index.spec != "Flat" and report.later > MOST_LATER and behind > FEWEST_LATER:
        yield (
            f"{report.later:.0%} of its images came after {index.spec} was trained and are "
            f"searched one by one: {compact} trains it again"
        )
    if report.recall is not None and report.recall < LOW:
        yield (
            f"of the ten nearest images it finds {report.recall:.0%}: {compact} trains it again; "
            "where that does not help, build it with another --spec"
        )
    found, before = report.text_recall, report.recorded_recall
    if found is not None and before is not None and found < before - DROP:
        yield (
            f"captions find {found:.1%} of their ten best, {before:.1%} when that was recorded: "
            f"{compact} trains it again; where that does not help, build it again with --spec auto"
        )
    if len(index) and report.recall is None:
        yield "an older clipkit built it without exact vectors: build it again to check it"
