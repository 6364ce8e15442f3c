"""The picture of a sweep: one SVG file that shows itself: in a browser, on a page, in print, light or dark.

    no or one key: a curve with error bars, and a dot for each seed    two: a heat map with the numbers in its cells
    more: a heat map of the first two for every combination of the others

Values stand in the order and at the distance of the command line: grids are rarely even, and their distances say
nothing.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_proxygml.cluster.grid import Cell, Grid, format_spread, show_value
from dist_proxygml.reporting.charts import LINE, QUIET, SERIES, TEXT, WRONG, draw, style_axes
from dist_proxygml.reporting.render import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#e9f1fb", "#104287")  # of the least and the greatest mean
_INK = "#1c1e20"  # on a light cell, in the dark as well
_LETTER = 6.9  # width of one at 12 px, about
_CELL_HEIGHT = 52
_HEADER = 62  # height of the two lines above
_PANELS_PER_ROW = 3


def draw_sweep(name: str, grid: Grid, cells: Sequence[Cell], metric: str) -> str:
    """The picture of one metric, in percent, as an SVG document. Points without a number say why.

    Args:
        name: of the sweep.
        grid: its keys and values.
        cells: its points, the last key changing fastest.
        metric: which one to show.
    """
    most = max(len(cell.statuses) for cell in cells)
    lines = (
        f"{metric}, percent",
        f"{name}: {f'mean ± standard deviation of {most} seeds' if most > 1 else 'one seed'}",
    )
    longest = [max(len(show_value(value)) for value in values) * _LETTER for values in grid.values()]
    if len(grid) > 1:
        rows, columns, *others = (len(values) for values in grid.values())
        num_panels = math.prod(others)
        across = min(num_panels, _PANELS_PER_ROW)
        width = across * (74 + longest[0] + columns * max(104, 12 + longest[1])) + 60
        height = -(-num_panels // across) * (_CELL_HEIGHT * rows + (74 if others else 54))
    else:
        width = 84 + len(cells) * max(96, 12 + max(longest, default=0))
        height = 290

    def paint(figure: "Figure") -> None:
        figure.set_layout_engine("constrained", rect=(20 / width, 0, 1 - 40 / width, 1))
        (_paint_maps if len(grid) > 1 else _paint_curve)(figure, grid, cells, metric)

    return render(
        "sweep.svg",
        lines=lines,
        spoken=_spoken(grid, cells, metric),
        drawing=draw(paint, name=metric, width=width, height=height),
        width=round(max(width, *(40 + len(line) * 9 for line in lines))),
        height=_HEADER + height,
        header=_HEADER,
    )


def _paint_maps(figure: "Figure", grid: Grid, cells: Sequence[Cell], metric: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import FancyBboxPatch

    (row_key, rows), (column_key, columns), *others = grid.items()
    of_values = {json.dumps(cell.values): cell for cell in cells}
    means = [100 * cell.spreads[metric].mean for cell in cells if metric in cell.spreads] or [0.0]
    low, high = min(means), max(means)
    colours = LinearSegmentedColormap.from_list("", _COLOURS, N=40)
    combinations = list(itertools.product(*(values for _, values in others)))
    across = min(len(combinations), _PANELS_PER_ROW)
    panels = list(figure.subplots(-(-len(combinations) // across), across, squeeze=False).flat)
    for axes in panels[len(combinations) :]:
        axes.set_axis_off()
    for axes, rest in zip(panels, combinations, strict=False):
        axes.set_frame_on(False)
        axes.tick_params(left=False, bottom=False, labelsize=12, labelcolor=TEXT)
        named = ", ".join(f"{key} {show_value(value)}" for (key, _), value in zip(others, rest, strict=True))
        axes.set_title(named, loc="left", fontsize=12, fontweight="bold")
        is_short = len(row_key) * _LETTER < _CELL_HEIGHT * len(rows)
        axes.set_ylabel(row_key if is_short else row_key.rpartition(".")[2], color=QUIET, fontsize=12)
        axes.set_xlabel(column_key, color=QUIET, fontsize=12)
        axes.set_xticks(range(len(columns)), [show_value(value) for value in columns])
        axes.set_yticks(range(len(rows)), [show_value(value) for value in rows])
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
            cell = of_values[json.dumps((row, column, *rest))]
            spread = cell.spreads.get(metric)
            share = 0.5 if spread is None or low == high else (100 * spread.mean - low) / (high - low)
            colour = LINE if spread is None else colours(share)
            box = "round,pad=0,rounding_size=0.03"
            axes.add_patch(FancyBboxPatch((j - 0.49, i - 0.48), 0.98, 0.96, box, facecolor=colour, linewidth=0))
            if spread is None:
                _word(axes, j, i, cell)
                continue
            ink = _INK if share <= 0.5 else "#ffffff"
            missing = f", {cell.num_finished} of {len(cell.statuses)}" if cell.word else ""
            mean, _, deviation = format_spread(spread).partition(" ")
            axes.text(j, i - 0.02, mean, color=ink, ha="center", va="bottom", fontsize=14, fontweight="bold")
            axes.text(j, i + 0.1, deviation + missing, color=ink, ha="center", va="top", fontsize=11)
    if low < high:
        scale = ScalarMappable(Normalize(low, high), colours)
        bar = figure.colorbar(scale, ax=panels, ticks=[low, high], format="%.1f", aspect=6 * figure.get_figheight())
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set(edgecolor="face", linewidth=1)  # no seams between the steps
        bar.ax.tick_params(right=False, labelsize=11, labelcolor=QUIET)


def _paint_curve(figure: "Figure", grid: Grid, cells: Sequence[Cell], metric: str) -> None:
    axes = figure.subplots()
    style_axes(axes)
    spreads = [cell.spreads.get(metric) for cell in cells]
    for place, (cell, spread) in enumerate(zip(cells, spreads, strict=True)):
        if spread is None or cell.word:
            _word(axes, place, 0.06, cell, transform=axes.get_xaxis_transform())
        if spread is not None:
            values = [100 * value for value in spread.values]
            axes.plot(
                [place] * len(values),
                values,
                "o",
                color=SERIES[0],
                markersize=5,
                markeredgewidth=0,
                alpha=0.45,
                clip_on=False,
            )
    axes.errorbar(
        range(len(cells)),
        [math.nan if spread is None else 100 * spread.mean for spread in spreads],
        yerr=[100 * spread.deviation if spread and spread.deviation else math.nan for spread in spreads],
        color=SERIES[0],
        fmt="o-",
        markersize=9,
        linewidth=1.8,
        elinewidth=1.4,
        capsize=5,
        clip_on=False,
    )
    labels = [show_value(value) for cell in cells for value in cell.values] or [""]
    axes.set_xticks(range(len(cells)), labels, color=TEXT, fontsize=12)
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_xlabel(next(iter(grid), ""), color=QUIET, fontsize=12)


def _word(axes: "Axes", x: float, y: float, cell: Cell, **place: Any) -> None:
    """Draw the state of seeds without a number, in the middle of a place."""
    number = f"{cell.num_finished} of {len(cell.statuses)}, " if cell.num_finished else ""
    colour = WRONG if cell.word == "failed" and not number else QUIET
    weight = "normal" if number else "bold"
    axes.text(x, y, number + cell.word, color=colour, ha="center", va="center", fontsize=11, fontweight=weight, **place)


def _spoken(grid: Grid, cells: Sequence[Cell], metric: str) -> str:
    """The numbers in words, for who cannot see the picture."""
    spoken = []
    for cell in cells:
        named = ", ".join(f"{key} {show_value(v)}" for key, v in zip(grid, cell.values, strict=True))
        spoken.append(f"{named}: {format_spread(cell.spreads.get(metric)) or cell.word}")
    return f"{metric} in percent. " + "; ".join(spoken)
