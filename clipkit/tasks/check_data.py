"""Report the content and the problems of a data source: ``clipkit data check DATA``."""

from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.duplicates import near_groups
from clipkit.data.open_source import Data, Source, open_source
from clipkit.data.statistics import EXAMPLES, Problem, Spread, Survey, survey
from clipkit.models.tokenizer import CONTEXT, CaptionSurvey, Repeated, TruncationReport, shorten

SHOWN = 10


@dataclass(frozen=True)
class Groups:
    """Groups of duplicates: number of groups, images in them, and keys of the largest few."""

    groups: int
    images: int
    examples: list[list[str]]


@dataclass(frozen=True)
class Leaks:
    """Images and captions that two sets share.

    Attributes:
        against: the other set.
        exact, near: number of images of this set with the same, or nearly the same, pixels as an
            image of the other.
        captions: number of distinct captions that both contain.
        exact_examples, near_examples: pairs of keys, of this set and the other.
        caption_examples: some of the shared captions.
    """

    against: str
    exact: int
    near: int
    captions: int
    exact_examples: list[tuple[str, str]]
    near_examples: list[tuple[str, str]]
    caption_examples: list[str]


@dataclass(frozen=True)
class DataReport:
    """The content and the problems of a data source.

    Attributes:
        spec, kind: the source and its format.
        rows: number of rows, readable or not.
        images: number of readable images.
        bytes: total size of the readable images as stored.
        captions: number of captions.
        captions_per_image: number of images by number of captions.
        labels, formats: number of images by label and by format, the most frequent first.
        widths, heights: in pixels; None without readable images.
        notes: how the source was read, and what in it was not used.
        problems: problems by kind, the most frequent first.
        caption_tokens: caption lengths with start and end token, before truncation.
        cut: truncated captions.
        repeated: captions that occur more than once.
        exact, near: groups of images with the same pixels, and of those that look nearly the same.
        leaks: what the source shares with ``against``; None without it.
    """

    spec: str
    kind: str
    rows: int
    images: int
    bytes: int
    captions: int
    captions_per_image: dict[int, int]
    labels: dict[str, int]
    formats: dict[str, int]
    widths: Spread | None
    heights: Spread | None
    notes: list[str]
    problems: list[Problem]
    caption_tokens: Spread | None
    cut: TruncationReport
    repeated: Repeated
    exact: Groups
    near: Groups
    leaks: Leaks | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)

    def render(self) -> str:
        """The report as text."""
        lines = [f"{self.spec} ({self.kind})", *_render_content(self), *_render_captions(self)]
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join([*lines, *_render_problems(self), *_render_leaks(self.leaks)])


def check_data(
    data: Data,
    against: Data | None = None,
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    image_root: str | Path | None = None,
    encoding: str | None = None,
) -> DataReport:
    """Read a data source once and report its content and its problems.

    Args:
        data: any source that ``open_source`` opens.
        against: a second source, read in the same way; shared images and captions are reported as
            leaks.
        image, caption, label, image_root, encoding: as for ``open_source``.

    Raises:
        DataError: a source cannot be opened.
    """
    # Both are opened before the first is read, so that a misspelt name fails early.
    sources = [
        open_source(
            one, image=image, caption=caption, label=label, image_root=image_root, encoding=encoding
        )
        for one in (data, against)
        if one is not None
    ]
    captions = CaptionSurvey()
    found = survey(sources[0], captions.add)
    leaks = _find_leaks(found, captions, sources[1]) if against is not None else None
    return _report(sources[0], found, captions, leaks)


def _report(
    source: Source, found: Survey, captions: CaptionSurvey, leaks: Leaks | None
) -> DataReport:
    near = near_groups(found.looks).tolist()
    originals = {content: i for i, content in reversed(list(enumerate(found.contents)))}
    firsts = sorted(originals.values())
    return DataReport(
        spec=source.spec,
        kind=source.kind,
        rows=found.rows,
        images=len(found.keys),
        bytes=found.size,
        captions=len(captions.tokens),
        captions_per_image=dict(sorted(found.per_image.items())),
        labels=dict(found.labels.most_common()),
        formats=dict(found.forms.most_common()),
        widths=Spread.of(found.widths) if found.keys else None,
        heights=Spread.of(found.heights) if found.keys else None,
        notes=list(source.notes),
        problems=sorted(found.problems.values(), key=lambda problem: -problem.count),
        caption_tokens=Spread.of(captions.tokens) if captions.tokens else None,
        cut=captions.cut,
        repeated=captions.repeated(),
        exact=_groups(zip(found.contents, found.keys, strict=True)),
        near=_groups((near[i], found.keys[i]) for i in firsts),
        leaks=leaks,
    )


def _groups(pairs: Iterable[tuple[Hashable, str]]) -> Groups:
    """Group the keys of (group, key) pairs; keeps groups of at least two keys."""
    members: dict[Hashable, list[str]] = {}
    for group, key in pairs:
        members.setdefault(group, []).append(key)
    groups = sorted((keys for keys in members.values() if len(keys) > 1), key=len, reverse=True)
    examples = [keys[:EXAMPLES] for keys in groups[:EXAMPLES]]
    return Groups(len(groups), sum(map(len, groups)), examples)


def _find_leaks(found: Survey, captions: CaptionSurvey, against: Source) -> Leaks:
    other_captions = CaptionSurvey(known=captions.counts)
    other = survey(against, other_captions.add)
    near = near_groups(np.concatenate([found.looks, other.looks])).tolist()
    identical = dict(zip(other.contents, other.keys, strict=True))
    alike = dict(zip(near[len(found.keys) :], other.keys, strict=True))
    exact_pairs, near_pairs = [], []
    for key, content, group in zip(found.keys, found.contents, near, strict=False):
        if content in identical:
            exact_pairs.append((key, identical[content]))
        elif group in alike:
            near_pairs.append((key, alike[group]))
    shared = [key for key in captions.counts if key in other_captions.counts]
    return Leaks(
        against=against.spec,
        exact=len(exact_pairs),
        near=len(near_pairs),
        captions=len(shared),
        exact_examples=exact_pairs[:EXAMPLES],
        near_examples=near_pairs[:EXAMPLES],
        caption_examples=[other_captions.texts[key] for key in shared[:EXAMPLES]],
    )


def _render_content(report: DataReport) -> list[str]:
    lines = [f"images    {report.images} readable of {report.rows}, {_megabytes(report.bytes)}"]
    if report.widths and report.heights:
        lines.append(f"widths    {report.widths} pixels")
        lines.append(f"heights   {report.heights} pixels")
        lines.append(f"formats   {_counts(report.formats)}")
    if report.labels:
        lines.append(f"labels    {len(report.labels)}: {_counts(report.labels)}")
    for name, groups in (("exact", report.exact), ("near", report.near)):
        lines.append(f"{name + ' duplicates':18}{groups.images} images in {groups.groups} groups")
        lines += [f"  {' = '.join(keys)}" for keys in groups.examples]
    return lines


def _render_captions(report: DataReport) -> list[str]:
    if not report.caption_tokens:
        return ["captions  none"]
    per_image = ", ".join(f"{n} with {k}" for k, n in report.captions_per_image.items())
    repeated = report.repeated
    return [
        f"captions  {report.captions} (images: {per_image})",
        f"tokens    {report.caption_tokens}, of {CONTEXT}",
        *report.cut.render().splitlines(),
        f"repeated  {repeated.repeats} captions repeat one of {repeated.distinct} distinct",
        *(f"  {count} × {shorten(text, 100)}" for text, count in repeated.top),
    ]


def _render_problems(report: DataReport) -> list[str]:
    if not report.problems:
        return ["problems  none"]
    lines = [f"problems  {sum(problem.count for problem in report.problems)}"]
    for problem in report.problems:
        lines.append(f"  {problem.count} × {problem.reason}")
        lines += [f"    {item.key}: {item.reason}" for item in problem.examples]
    return lines


def _render_leaks(leaks: Leaks | None) -> list[str]:
    if leaks is None:
        return []
    lines = [
        f"shared with {leaks.against}: {leaks.exact} images exactly, {leaks.near} nearly, "
        f"{leaks.captions} captions"
    ]
    lines += [f"  {key} = {other}" for key, other in leaks.exact_examples]
    lines += [f"  {key} ≈ {other}" for key, other in leaks.near_examples]
    return lines + [f"  “{shorten(text, 100)}”" for text in leaks.caption_examples]


def _counts(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:SHOWN])
    return shown + ", …" if len(counts) > SHOWN else shown


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
