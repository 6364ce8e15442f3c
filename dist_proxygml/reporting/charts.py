"""Line charts and histograms as inline SVG: no script, no picture file, colours from the page's style sheet.

A chart scales with its column and follows light and dark through CSS classes (`series-0`,
`series-1`, ...). Long series are averaged into a few hundred points first, so that a page stays
small whatever the length of the run.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26  # room for the axes' numbers

DECADES = 1e4  # of a logarithmic axis: what falls to zero would otherwise take all of it


class Series(NamedTuple):
    """One line: points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    logarithmic: bool = False,
    markers: bool = False,
) -> str:
    """A figure with a title, a legend and the lines; an empty string when there is nothing to draw.

    Args:
        title: what the lines show, with the unit.
        series: the lines; equal ones become one. Points that are not finite are left out, and so is
            what a logarithmic axis cannot show.
        x_label: what x counts.
        logarithmic: the scale of y.
        markers: whether each point gets a dot.
    """
    shown = [
        Series(
            line.name,
            [(x, y) for x, y in _thinned(line.points) if math.isfinite(y) and (y > 0 or not logarithmic)],
            line.dashed,
        )
        for line in series
    ]
    shown = _merged([line for line in shown if line.points])
    if not shown:
        return ""
    if logarithmic:
        floor = max(y for line in shown for _, y in line.points) / DECADES
        shown = [line._replace(points=[(x, y) for x, y in line.points if y >= floor]) for line in shown]
        shown = [line for line in shown if line.points]
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points]
    y_ticks = _powers_of_ten(min(ys), max(ys)) if logarithmic else ticks(min(ys), max(ys), count=5)
    frame = _Frame(
        (min(xs), max(max(xs), min(xs) + 1)),
        (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))),
        logarithmic,
    )
    parts = frame.axes(ticks(min(xs), max(xs), count=5), y_ticks)
    for number, line in enumerate(shown):
        placed = [frame.place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dashed = " dashed" if line.dashed else ""
        parts.append(f'<polyline class="series-{number}{dashed}" points="{path}"/>')
        if markers and not line.dashed:
            parts += [f'<circle class="series-{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed]
    spoken = "; ".join(f"{line.name} ends at {_number(line.points[-1][1])}" for line in shown)
    return _figure(title, f"over {x_label}", _legend(shown), parts, spoken)


class Histogram(NamedTuple):
    """How many values fell between neighbouring edges."""

    name: str
    edges: Sequence[float]  # one more than counts, ascending
    counts: Sequence[int]


def histogram_chart(title: str, histograms: Sequence[Histogram], *, x_label: str) -> str:
    """A figure with the outlines of histograms, each in percent of its own values; empty when none has any.

    Args:
        title: what was counted.
        histograms: up to six. Edges without values on either end are cut off.
        x_label: what the edges are, and the height.

    Raises:
        ValueError: a histogram has another number of edges than of counts and one.
    """
    lines = []
    for histogram in histograms:
        total = math.fsum(histogram.counts)
        points = [
            (float(edge), 100 * count / total)
            for left, right, count in zip(histogram.edges[:-1], histogram.edges[1:], histogram.counts, strict=True)
            for edge in (left, right)
            if total
        ]
        filled = [number for number, (_, share) in enumerate(points) if share > 0]
        if filled:
            inside = points[filled[0] : filled[-1] + 1]
            lines.append((histogram.name, [(inside[0][0], 0.0), *inside, (inside[-1][0], 0.0)]))
    if not lines:
        return ""
    xs, ys = ([point[axis] for _, points in lines for point in points] for axis in (0, 1))
    y_ticks = ticks(0.0, max(ys), count=5)
    frame = _Frame((min(xs), max(xs)), (0.0, max(y_ticks[-1], max(ys))))
    parts = frame.axes(ticks(min(xs), max(xs), count=5), y_ticks)
    for number, (_, points) in enumerate(lines):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(*point) for point in points))
        parts.append(f'<polygon class="series-{number}" points="{path}"/>')
    spoken = "; ".join(
        f"{name}, most at {_number(max(points, key=lambda point: point[1])[0])}" for name, points in lines
    )
    return _figure(title, x_label, _legend([Series(name, points) for name, points in lines]), parts, spoken)


class _Frame(NamedTuple):
    """The part of the picture that lines are drawn in."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the picture."""
        x_share = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (*self.y_range, y))
        return (
            LEFT + x_share * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
        """Lines across for y, and the numbers of both axes, those of x that lie within it."""
        parts = []
        for tick in y_ticks:
            _, y = self.place(self.x_range[0], tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 3.5:.1f}">{_number(tick)}</text>')
        for tick in x_ticks:
            if self.x_range[0] <= tick <= self.x_range[1]:
                x, _ = self.place(tick, self.y_range[0])
                parts.append(f'<text class="tick middle" x="{x:.1f}" y="{HEIGHT - 8}">{_number(tick)}</text>')
        return parts


def _legend(shown: Sequence[Series]) -> str:
    return "".join(
        f'<span><i class="swatch series-{number}{" dashed" if line.dashed else ""}"></i>{escape(line.name)}</span>'
        for number, line in enumerate(shown)
    )


def _figure(title: str, subtitle: str, legend: str, parts: Sequence[str], spoken: str) -> str:
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<small>{escape(subtitle)}</small></figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {spoken}", quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _merged(series: Sequence[Series]) -> list[Series]:
    """Lines with equal points drawn once, under all their names."""
    merged: list[Series] = []
    for line in series:
        twin = next((i for i, other in enumerate(merged) if other.points == line.points), None)
        if twin is None:
            merged.append(line)
        else:
            merged[twin] = merged[twin]._replace(name=f"{merged[twin].name}, {line.name}")
    return merged


def _thinned(points: Sequence[tuple[float, float]], *, most: int = 300) -> list[tuple[float, float]]:
    """Neighbouring points averaged until at most `most` are left."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(block[-1][0], math.fsum(y for _, y in block) / len(block)) for block in blocks]


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """About `count` round numbers that enclose or fill the range."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _powers_of_ten(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    """Short and readable: 12,000, 0.25, 1e-4."""
    if value != 0 and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
