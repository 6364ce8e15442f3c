"""Line charts and histograms as SVG for a page: text stays text, colours are those of templates/colours.css.

Drawn by matplotlib's object interface, without pyplot. Output is deterministic: no date, ids from the chart's title.
A drawing in the colours below follows light and dark mode, because they are replaced by the style sheet's.
Long series are averaged into a few hundred points first, so that a page stays small whatever the length of the run.

matplotlib is imported on first use, so ranks other than 0 never import it.
"""

import io
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26  # room for the axes' numbers

DECADES = 1e4  # of a logarithmic axis, which values near zero would otherwise fill
TEXT, QUIET, LINE, WRONG = "#1c1e21", "#62676e", "#e3e4e6", "#c93434"
SERIES = ("#2563c9", "#c2610c", "#1a7f6b", "#8a4fbf", "#6b7280", "#a8883a")
_IN_PAGES = {TEXT: "currentColor", QUIET: "var(--quiet)", LINE: "var(--line)", WRONG: "var(--wrong)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)
}


class Series(NamedTuple):
    """One line: points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class Histogram(NamedTuple):
    """Counts of values between consecutive edges."""

    name: str
    edges: Sequence[float]  # one more than counts, ascending
    counts: Sequence[int]


class Chart(NamedTuple):
    """A figure of a page."""

    title: str
    subtitle: str
    legend: list[tuple[str, bool]]  # names, and whether they are dashed, in the order of SERIES
    spoken: str  # alternative text
    drawing: Markup  # what is inside of the <svg>
    width: int = WIDTH
    height: int = HEIGHT


def draw(paint: Callable[["Figure"], None], *, name: str, width: float, height: float) -> Markup:
    """Render the content of the <svg> of a figure, painted in the colours of this module.

    Args:
        paint: adds to the empty figure, in which a point is a pixel.
        name: makes its ids unique on the page.
        width: in pixels.
        height: in pixels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "text.color": TEXT}
    style |= {"axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0}
    stream = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # regardless of any matplotlibrc
        matplotlib.rcParams.update(style)
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # the browser has other fonts
        figure = Figure((width / 72, height / 72))
        paint(figure)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    inside = re.sub(r"^.*?</metadata>|</svg>\s*$|<style.*?</style>", "", stream.getvalue(), flags=re.DOTALL)
    inside = re.sub(r' font-family: [^;"]+;?|(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"', "", inside)
    return Markup(re.sub("#[0-9a-f]{6}", lambda found: _IN_PAGES.get(found[0], found[0]), inside))


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, logarithmic: bool = False, markers: bool = False
) -> Chart | None:
    """Draw lines over steps; None if there is nothing to draw.

    Args:
        title: what the lines show, with the unit.
        series: at most six lines; equal ones are merged. Non-finite points are omitted, as are non-positive ones on a
            logarithmic axis.
        x_label: what x counts.
        logarithmic: the scale of y.
        markers: whether each point gets a dot.
    """
    thinned = [line._replace(points=_thinned(line.points)) for line in series]
    highest = max((y for line in thinned for _, y in line.points if math.isfinite(y)), default=0.0)
    floor = max(highest / DECADES, sys.float_info.min) if logarithmic else -math.inf
    names: dict[tuple[tuple[tuple[float, float], ...], bool], list[str]] = {}
    for line in thinned:
        points = tuple((x, y) for x, y in line.points if math.isfinite(y) and y >= floor)
        if points:
            names.setdefault((points, line.dashed), []).append(line.name)
    shown = [Series(", ".join(equal), points, dashed) for (points, dashed), equal in names.items()]
    if not shown:
        return None
    xs, ys = ([point[axis] for line in shown for point in line.points] for axis in (0, 1))

    def paint(figure: "Figure") -> None:
        axes = _axes(figure, logarithmic=logarithmic)
        for colour, line in zip(SERIES, shown, strict=False):
            look = {"dashes": (3.5, 3.5), "linewidth": 1.5} if line.dashed else {"linewidth": 2}
            if markers and not line.dashed:
                look |= {"marker": "o", "markersize": 6, "markeredgewidth": 0}
            axes.plot(*zip(*line.points, strict=True), color=colour, clip_on=False, solid_capstyle="round", **look)
        axes.set_xlim(min(xs), max(*xs, min(xs) + 1))
        low, high = axes.get_ylim()
        if not logarithmic and low < max(ys) < high:
            axes.set_ylim(low, max(ys))  # a line at the top may be missing, a gap not

    spoken = "; ".join(f"{line.name} ends at {_number(line.points[-1][1])}" for line in shown)
    drawing = draw(paint, name=title, width=WIDTH, height=HEIGHT)
    return Chart(title, f"over {x_label}", [(line.name, line.dashed) for line in shown], spoken, drawing)


def roc_chart(title: str, series: Sequence[Series], *, x_label: str) -> Chart | None:
    """Draw y, from 0 to 100, over shares x on a logarithmic axis up to 1; None if there is nothing to draw.

    Args:
        title: the meaning of y.
        series: at most six lines, x ascending, drawn as steps, since a value holds until the next. Points at x = 0 are
            omitted.
        x_label: the meaning of x.
    """
    shown = [line._replace(points=[(x, y) for x, y in line.points if x > 0]) for line in series]
    shown = [line for line in shown if line.points]
    if not shown:
        return None
    lowest = min(line.points[0][0] for line in shown)

    def paint(figure: "Figure") -> None:
        axes = _axes(figure)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        for colour, line in zip(SERIES, shown, strict=False):
            axes.step(*zip(*line.points, strict=True), where="post", color=colour, linewidth=2, clip_on=False)
        axes.set_xlim(min(lowest, 0.1), 1)
        axes.set_ylim(0, 100)

    spoken = "; ".join(f"{line.name} begins at {_number(line.points[0][1])}" for line in shown)
    drawing = draw(paint, name=title, width=WIDTH, height=HEIGHT)
    return Chart(title, f"over the {x_label}", [(line.name, False) for line in shown], spoken, drawing)


def histogram_chart(title: str, histograms: Sequence[Histogram], *, x_label: str) -> Chart | None:
    """Draw the outlines of histograms, each in percent of its own values; None if all are empty.

    Args:
        title: what was counted.
        histograms: up to six. Empty bins at either end are trimmed.
        x_label: meaning of the edges and the height.

    Raises:
        ValueError: a histogram does not have one more edge than counts.
    """
    lines = []
    for name, edges, counts in histograms:
        if len(edges) != len(counts) + 1:
            raise ValueError(f"expected {len(counts) + 1} edges of {len(counts)} counts, got {len(edges)}")
        filled = [place for place, count in enumerate(counts) if count > 0]
        if filled:
            kept = slice(filled[0], filled[-1] + 1)
            shares = [100 * count / math.fsum(counts) for count in counts[kept]]
            lines.append((name, [*edges[kept], edges[filled[-1] + 1]], shares))
    if not lines:
        return None

    def paint(figure: "Figure") -> None:
        axes = _axes(figure)
        for colour, (_, edges, shares) in zip(SERIES, lines, strict=False):
            axes.stairs(
                shares, edges, fill=True, facecolor=(colour, 0.28), edgecolor=colour, linewidth=1.5, clip_on=False
            )
        axes.set_xlim(min(edges[0] for _, edges, _ in lines), max(edges[-1] for _, edges, _ in lines))
        axes.set_ylim(0, max(max(shares) for _, _, shares in lines))

    spoken = "; ".join(f"{name}, most at {_number(edges[shares.index(max(shares))])}" for name, edges, shares in lines)
    drawing = draw(paint, name=title, width=WIDTH, height=HEIGHT)
    return Chart(title, x_label, [(name, False) for name, _, _ in lines], spoken, drawing)


def style_axes(axes: "Axes", *, logarithmic: bool = False) -> None:
    """Draw horizontal grid lines and muted numbers, no frame."""
    from matplotlib.ticker import MaxNLocator

    if logarithmic:
        axes.set_yscale("log")
    for axis in (axes.xaxis,) if logarithmic else (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _number(value))
    axes.set_frame_on(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.tick_params(left=False, bottom=False, labelsize=11.5, labelcolor=QUIET, pad=7)
    axes.tick_params(which="minor", left=False, bottom=False, labelleft=False)


def _axes(figure: "Figure", *, logarithmic: bool = False) -> "Axes":
    place = (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
    axes = figure.add_axes(place)
    style_axes(axes, logarithmic=logarithmic)
    return axes


def _thinned(points: Sequence[tuple[float, float]], *, most: int = 300) -> list[tuple[float, float]]:
    """Average neighbouring points until at most `most` are left."""
    size = max(1, -(-len(points) // most))
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(block[-1][0], math.fsum(y for _, y in block) / len(block)) for block in blocks]


def _number(value: float) -> str:
    """Format a number briefly: 12,000, 0.25, 1e-4."""
    if value != 0 and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
