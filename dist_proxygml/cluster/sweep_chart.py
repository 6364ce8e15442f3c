"""The picture of a sweep: one SVG file that shows itself, in a browser, on a page, in print.

    no or one key: a curve with error bars, and a dot for each seed    two: a heat map with the numbers in its cells
    more: a heat map of the first two for every combination of the others

Chosen: SVG written by hand, as charts.py does for the report; there the page brings the colours, here the file brings
its own. Values stand in the order and at the distance of the command line: grids are rarely even, and their distances
say nothing. Declined: matplotlib, which would bring six packages for rectangles with numbers in them.
"""

import itertools
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from dist_proxygml.cluster.grid import Cell, Grid, Spread, format_spread, show_value
from dist_proxygml.reporting.charts import ticks

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', 'Noto Sans', sans-serif"
_TEXT, _QUIET, _LINE, _FAILED, _SERIES = "#1c1e21", "#62676e", "#e3e4e6", "#c93434", "#2563c9"
_LOW, _HIGH = (233, 241, 251), (16, 66, 135)  # colours of the least and the greatest mean
_LETTER = 6.9  # width of one at 12 px, about
_MARGIN = 20
_CELL_HEIGHT = 52
_HEADER = 62
_PANELS_PER_ROW = 3


def draw_sweep(name: str, grid: Grid, cells: Sequence[Cell], metric: str) -> str:
    """The picture of one metric, in percent, as an SVG document. Points without a number say why.

    Args:
        name: of the sweep.
        grid: its keys and values.
        cells: its points, the last key changing fastest.
        metric: which one to show.
    """
    draw = _heat_maps if len(grid) > 1 else _curve
    parts, width, height = draw(grid, cells, metric)
    most = max(len(cell.statuses) for cell in cells)
    over = f"mean ± standard deviation of {most} seeds" if most > 1 else "one seed"
    title, subtitle = f"{metric}, percent", f"{name}: {over}"
    width = max(width, 2 * _MARGIN + len(title) * 10, 2 * _MARGIN + len(subtitle) * _LETTER)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="{_FONT}" font-size="12" fill="{_TEXT}" role="img" '
        f'aria-label="{escape(_spoken(grid, cells, metric), quote=True)}">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + _text(_MARGIN, 28, title, size=16, weight=650)
        + _text(_MARGIN, 46, subtitle, fill=_QUIET)
        + "".join(parts)
        + "</svg>\n"
    )


# ---- heat maps -------------------------------------------------------------------------------------------------------


def _heat_maps(grid: Grid, cells: Sequence[Cell], metric: str) -> tuple[list[str], float, float]:
    (row_key, rows), (column_key, columns), *others = grid.items()
    of_values = {json.dumps(cell.values): cell for cell in cells}
    means = [cell.spreads[metric].mean for cell in cells if metric in cell.spreads]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    left, title_height = 46 + _longest(rows), 20 if others else 0
    cell_width = max(104.0, 12 + _longest(columns))
    map_width, map_height = len(columns) * cell_width, len(rows) * _CELL_HEIGHT
    panel_width, panel_height = left + map_width + 28, title_height + map_height + 54
    row_label = row_key if len(row_key) * _LETTER < map_height else row_key.rpartition(".")[2]

    def panel(x: float, y: float, rest: tuple[Any, ...]) -> list[str]:
        named = ", ".join(f"{key} {show_value(value)}" for (key, _), value in zip(others, rest, strict=True))
        parts = [_text(x, y + 12, named, weight=600)] if others else []
        y += title_height
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
            cell = of_values[json.dumps((row, column, *rest))]
            parts.append(_heat_cell(x + j * cell_width, y + i * _CELL_HEIGHT, cell_width, cell, metric, (low, high)))
        for i, row in enumerate(rows):
            parts.append(_text(x - 8, y + (i + 0.5) * _CELL_HEIGHT + 4, show_value(row), anchor="end"))
        for j, column in enumerate(columns):
            parts.append(_text(x + (j + 0.5) * cell_width, y + map_height + 18, show_value(column), anchor="middle"))
        parts.append(_text(x - left + 12, y + map_height / 2, row_label, fill=_QUIET, anchor="middle", turned=True))
        parts.append(_text(x + map_width / 2, y + map_height + 38, column_key, fill=_QUIET, anchor="middle"))
        return parts

    combinations = list(itertools.product(*(values for _, values in others)))
    parts = []
    for number, rest in enumerate(combinations):
        down, across = divmod(number, _PANELS_PER_ROW)
        parts += panel(_MARGIN + across * panel_width + left, _HEADER + down * panel_height, rest)
    width = 2 * _MARGIN + min(len(combinations), _PANELS_PER_ROW) * panel_width
    height = _HEADER + -(-len(combinations) // _PANELS_PER_ROW) * panel_height
    if means:
        parts.append(_scale(width - _MARGIN, _HEADER + title_height, map_height, low, high))
    return parts, width + 44, height


def _longest(values: Sequence[Any]) -> float:
    return _LETTER * max(len(show_value(value)) for value in values)


def _heat_cell(x: float, y: float, width: float, cell: Cell, metric: str, reach: tuple[float, float]) -> str:
    spread, (low, high) = cell.spreads.get(metric), reach
    share = 0.5 if spread is None or high == low else (spread.mean - low) / (high - low)
    fill = "#f4f4f5" if spread is None else _colour(share)
    ink = "#ffffff" if spread is not None and share > 0.5 else _TEXT
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{_CELL_HEIGHT - 2}"'
    box, middle = f'<rect {place} rx="3" fill="{fill}"/>\n', x + width / 2
    if spread is None:
        colour = _FAILED if cell.word == "failed" else _QUIET
        return box + _text(middle, y + _CELL_HEIGHT / 2 + 3, cell.word, anchor="middle", fill=colour, weight=600)
    return (
        box
        + _text(middle, y + 22, f"{100 * spread.mean:.2f}", anchor="middle", size=14, weight=600, fill=ink)
        + _text(middle, y + 39, _small_print(cell, spread), anchor="middle", size=11, fill=ink)
    )


def _small_print(cell: Cell, spread: Spread) -> str:
    """The deviation, and what the number does not hold for."""
    missing = f", {cell.num_finished} of {len(cell.statuses)}" if cell.word else ""
    return f"± {format_spread(spread).rpartition(' ')[2]}{missing}"


def _scale(x: float, y: float, height: float, low: float, high: float) -> str:
    stops = "".join(f'<stop offset="{s}" stop-color="{_colour(1 - s)}"/>' for s in (0.0, 0.5, 1.0))
    return (
        f'<defs><linearGradient id="scale" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient></defs>\n'
        f'<rect x="{x - 14:.1f}" y="{y}" width="12" height="{height - 2}" rx="3" fill="url(#scale)"/>\n'
        + _text(x + 4, y + 10, f"{100 * high:.1f}", size=11, fill=_QUIET)
        + _text(x + 4, y + height - 4, f"{100 * low:.1f}", size=11, fill=_QUIET)
    )


def _colour(share: float) -> str:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_LOW, _HIGH, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


# ---- curves ----------------------------------------------------------------------------------------------------------


def _curve(grid: Grid, cells: Sequence[Cell], metric: str) -> tuple[list[str], float, float]:
    labels = [show_value(value) for cell in cells for value in cell.values] or [""]
    step = max(96.0, 12 + _LETTER * max(map(len, labels)))
    left, plot_height = _MARGIN + 44, 230
    right, bottom = left + step * len(cells), _HEADER + plot_height
    spreads = [cell.spreads.get(metric) for cell in cells]
    reach = [
        100 * (spread.mean + sign * max(spread.deviation or 0.0, *(abs(v - spread.mean) for v in spread.values)))
        for spread in spreads
        if spread
        for sign in (-1, 1)
    ]
    low, high = (min(reach), max(reach)) if reach else (0.0, 1.0)
    marks = ticks(low, high, count=5)
    low, high = min(low, marks[0]), max(high, marks[-1])

    def place(number: int, value: float) -> tuple[float, float]:
        return left + (number + 0.5) * step, bottom - (100 * value - low) / (high - low) * plot_height

    parts = []
    for mark in marks:
        _, y = place(0, mark / 100)
        parts.append(f'<line x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_LINE}"/>\n')
        parts.append(_text(left - 8, y + 4, f"{mark:g}", anchor="end", fill=_QUIET))
    for (number, before), after in zip(enumerate(spreads), spreads[1:], strict=False):
        if before and after:  # no line across a point that has no number
            (x1, y1), (x2, y2) = place(number, before.mean), place(number + 1, after.mean)
            parts.append(_stroke(x1, y1, x2, y2, width=1.8))
    for number, (cell, spread, label) in enumerate(zip(cells, spreads, labels, strict=True)):
        x, _ = place(number, 0)
        parts.append(_text(x, bottom + 20, label, anchor="middle"))
        if spread is None:
            colour = _FAILED if cell.word == "failed" else _QUIET
            parts.append(_text(x, bottom - 8, cell.word, anchor="middle", fill=colour, weight=600))
            continue
        parts += [_dot(*place(number, value), radius=2.5, opacity=0.45) for value in spread.values]
        x, y = place(number, spread.mean)
        if spread.deviation is not None:
            (_, top), (_, end) = (
                place(number, spread.mean + spread.deviation),
                place(number, spread.mean - spread.deviation),
            )
            parts += [_stroke(x, top, x, end), _stroke(x - 5, top, x + 5, top), _stroke(x - 5, end, x + 5, end)]
        parts.append(_dot(x, y, radius=4.5))
        if cell.word:
            missing = f"{cell.num_finished} of {len(cell.statuses)}, {cell.word}"
            parts.append(_text(x, bottom - 8, missing, anchor="middle", size=11, fill=_QUIET))
    parts.append(_text((left + right) / 2, bottom + 42, next(iter(grid), ""), anchor="middle", fill=_QUIET))
    return parts, right + _MARGIN, bottom + 58


def _stroke(x1: float, y1: float, x2: float, y2: float, *, width: float = 1.4) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_SERIES}" stroke-width="{width}"/>\n'
    )


def _dot(x: float, y: float, *, radius: float, opacity: float = 1.0) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{_SERIES}" fill-opacity="{opacity}"/>\n'


# ---- both ------------------------------------------------------------------------------------------------------------


def _text(
    x: float,
    y: float,
    text: str,
    *,
    fill: str = _TEXT,
    size: int = 12,
    weight: int = 400,
    anchor: str = "start",
    turned: bool = False,
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}"{turn}>{escape(text)}</text>\n'
    )


def _spoken(grid: Grid, cells: Sequence[Cell], metric: str) -> str:
    """The numbers in words, for who cannot see the picture."""
    told = []
    for cell in cells:
        named = ", ".join(f"{key} {show_value(v)}" for key, v in zip(grid, cell.values, strict=True))
        told.append(f"{named}: {format_spread(cell.spreads.get(metric)) or cell.word}")
    return f"{metric} in percent. " + "; ".join(told)
