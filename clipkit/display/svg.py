"""Curves as inline SVG that takes its colours from the page, and so follows its dark mode.

Written by hand rather than with matplotlib: a curve of 10,000 points takes 7 ms and 8 KB here,
against 72 ms, 0.6 s of import and 53 KB with matplotlib's SVG backend (2026-11-27), whose colours
are fixed in the file.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
MAX_POINTS = 600
"""Points drawn of a curve: about one per pixel."""
_COLOURS = ("var(--blue)", "var(--green)", "var(--amber)")
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 34


@dataclass(frozen=True)
class Series:
    """A curve: its name and its points.

    A point whose x is not beyond that of the last one starts a new line; a point that is not finite
    leaves a gap.
    """

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Scale:
    """The y axis: its lower end, the least upper end (None: fitted to the points), and its type."""

    low: float | None = None
    high: float | None = None
    log: bool = False


def chart(
    series: Sequence[Series],
    unit: str,
    scale: Scale,
    *,
    level: tuple[str, float | None] = ("", None),
    small: bool = False,
) -> str:
    """Draw curves over a common x axis.

    Args:
        series: at most three.
        unit: of the x axis.
        scale: of the y axis.
        level: name and y of a dashed line; None as y for no line.
        small: for a third of the width of a page.
    """
    width, height = (360, 200) if small else (720, 260)
    lines = [list(_lines(one.points, scale.log)) for one in series]
    drawn = [point for parts in lines for part in parts for point in part]
    if not drawn:
        return '<p class="soft">No data.</p>'
    name, dashed = level
    values = [y for _, y in drawn] + ([] if dashed is None else [dashed])
    bottom, top = _range(values, scale)
    start, end = min(x for x, _ in drawn), max(x for x, _ in drawn)
    start, end = min(0.0, start), end if end > start else start + 1
    frame = _Frame(start, end, bottom, top, width, height)
    parts = [*_grid(frame, unit, scale.log)]
    if dashed is not None:
        y = frame.y(dashed)
        parts.append(
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--soft)" stroke-dasharray="5 5"/>'
            f'<text x="{width - _RIGHT}" y="{y - 6:.1f}" text-anchor="end">{escape(name)}'
            "</text>"
        )
    for colour, one in zip(_COLOURS, lines, strict=False):
        parts += [frame.polyline(part, colour) for part in one]
    drawing = (
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(", ".join(one.name for one in series))}">{"".join(parts)}</svg>'
    )
    return drawing + (_legend(series) if len(series) > 1 else "")


@dataclass(frozen=True)
class _Frame:
    """Maps values to pixels."""

    start: float
    end: float
    bottom: float
    top: float
    width: int
    height: int

    def x(self, value: float) -> float:
        inner = self.width - _LEFT - _RIGHT
        return _LEFT + inner * (value - self.start) / (self.end - self.start)

    def y(self, value: float) -> float:
        inner = self.height - _TOP - _BOTTOM
        return self.height - _BOTTOM - inner * (value - self.bottom) / (self.top - self.bottom)

    def polyline(self, points: Sequence[Point], colour: str) -> str:
        places = points if len(points) > 1 else [*points, *points]  # a round end is a dot
        text = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in places)
        return (
            f'<polyline points="{text}" fill="none" stroke="{colour}" '
            f'stroke-width="{2 if len(points) > 1 else 6}" stroke-linejoin="round" '
            'stroke-linecap="round"/>'
        )


def _grid(frame: _Frame, unit: str, log: bool) -> Iterator[str]:
    """Grid lines with their values, and the tick labels of the x axis."""
    ticks = _powers if log else _ticks
    for value in ticks(frame.bottom, frame.top, 4):
        y, name = frame.y(value), _number(10**value if log else value)
        yield (
            f'<line x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="var(--line)"/><text x="{_LEFT - 8}" y="{y + 4:.1f}" '
            f'text-anchor="end">{name}</text>'
        )
    below = f'y="{frame.height - 12}"'
    # The unit is in the corner; tick labels near it are left out.
    for value in _ticks(frame.start, frame.end, max(2, frame.width // 120)):
        if frame.x(value) < frame.width - 14 - 9 * len(unit) - 22:
            yield f'<text x="{frame.x(value):.1f}" {below} text-anchor="middle">'
            yield f"{_number(value)}</text>"
    yield f'<text x="{frame.width - _RIGHT}" {below} text-anchor="end">{escape(unit)}</text>'


def _legend(series: Sequence[Series]) -> str:
    names = " ".join(
        f'<span style="color:{colour}">●</span> {escape(one.name)}'
        for colour, one in zip(_COLOURS, series, strict=False)
    )
    return f'<p class="legend">{names}</p>'


def _lines(points: Sequence[Point], log: bool) -> Iterator[list[Point]]:
    """Points as unbroken lines, thinned to the visible resolution."""
    line: list[Point] = []
    for x, value in points:
        usable = math.isfinite(value) and (value > 0 or not log)
        if line and (not usable or x <= line[-1][0]):
            yield _thin(line)
            line = []
        if usable:
            line.append((x, math.log10(value) if log else value))
    if line:
        yield _thin(line)


def _thin(points: list[Point]) -> list[Point]:
    """The lowest and the highest point of each part, so that no spike is lost."""
    size = -(-2 * len(points) // MAX_POINTS)
    if size <= 2:
        return points
    kept: list[Point] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _range(values: Sequence[float], scale: Scale) -> Point:
    bottom, top = min(values), max(values)
    if scale.high is not None:
        top = max(top, scale.high)
    bottom = scale.low if scale.low is not None else bottom - 0.05 * (top - bottom)
    if top <= bottom:  # all values are equal
        bottom, top = bottom - (abs(bottom) or 1) / 2, bottom + (abs(bottom) or 1) / 2
    return bottom, top if scale.high is not None else top + 0.06 * (top - bottom)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two values: about so many, in steps of 1, 2 or 5 × a power of ten."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.99)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float, about: int) -> list[float]:
    """Logarithms of round numbers between two logarithms: powers of ten if these are enough."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 2, 5), (1, 2, 3, 5, 7)):
        logs = [power + math.log10(factor) for power in powers for factor in factors]
        found = [value for value in logs if low <= value <= high]
        if len(found) >= about / 2:
            break
    return found if len(found) > 1 else _ticks(low, high, about)


def _number(value: float) -> str:
    """A tick label."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
