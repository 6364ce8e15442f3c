"""Tables and pictures of docs/ from the results of benchmarks/retrieval.py: Markdown, and SVG that is light or dark as
its reader is.

A table stands between two comments of its page, and is replaced there; a picture is a file of docs/images. Both follow
from the declared rows and their lines alone, so that a test can make them again.

Two settings are a tie where the 95 % interval of their paired differences, seed by seed, has 0 in it (Student's t):
three seeds make it wide, and nothing smaller than that is claimed.
"""

import base64
import math
import re
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from dist_proxygml.cluster.grid import Spread, format_spread
from dist_proxygml.evaluation.bootstrap import Interval, compare_queries
from dist_proxygml.reporting.charts import QUIET, SERIES, TEXT, draw, style_axes
from dist_proxygml.reporting.render import render
from dist_proxygml.storage.files import publish_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.tables import Row, Table

Lines = Mapping[tuple[str, int], dict[str, Any]]  # results by row and seed
IMAGES = "docs/images"
WIDTH, HEIGHT, HEADER = 680, 330, 62
PLACE = (52 / WIDTH, 54 / HEIGHT, (WIDTH - 260) / WIDTH, (HEIGHT - 70) / HEIGHT)  # of axes: left, bottom, width, height


class Shown(NamedTuple):
    """What a page shows of a table."""

    markdown: str
    pictures: Mapping[str, str] = {}  # SVG by file name


class Curve(NamedTuple):
    """A line of a picture."""

    name: str
    points: Sequence[tuple[float, float]]  # in the order of x
    colour: int  # of SERIES
    dashed: bool = False


class Priced(NamedTuple):
    """A point of a picture of what is found against what it costs."""

    name: str  # may be empty
    cost: float
    found: Spread


class Difference(NamedTuple):
    """Paired differences of two settings, seed by seed."""

    mean: float
    half_width: float  # of the 95 % interval of the mean; infinite for one seed

    @property
    def is_tie(self) -> bool:
        """Whether no difference is as plausible as this one."""
        return abs(self.mean) <= self.half_width


# ---- numbers ---------------------------------------------------------------------------------------------------------


def values_of(row: "Row", lines: Lines, number: Callable[[dict[str, Any]], float]) -> dict[int, float]:
    """A number of each seed of a row that has finished."""
    return {seed: number(lines[row.name, seed]) for seed in row.seeds if (row.name, seed) in lines}


def metric(name: str, *, on: str = "test") -> Callable[[dict[str, Any]], float]:
    """How to read a metric of a line; NaN where that split was not evaluated."""
    return lambda line: line[on].get(name, math.nan)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (of a sample)."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))


def spread_over_seeds(row: "Row", lines: Lines, number: Callable[[dict[str, Any]], float]) -> Spread | None:
    """Mean and deviation of a number of a row; None before a seed has finished."""
    values = list(values_of(row, lines, number).values())
    return spread(values) if values else None


def say_seeds(rows: Sequence["Row"], lines: Lines) -> str:
    """How many seeds the finished rows have."""
    counts = sorted({count for row in rows if (count := sum((row.name, seed) in lines for seed in row.seeds))})
    if counts in ([], [1]):
        return "one seed"
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean ± standard deviation of {number} seeds"


def count_seeds(row: "Row", lines: Lines) -> str:
    """How many seeds of a row have finished, and of how many if not all."""
    num_done = len([seed for seed in row.seeds if (row.name, seed) in lines])
    return str(num_done) if num_done == len(row.seeds) else f"{num_done} of {len(row.seeds)}"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The first minus the second, over the seeds that both have."""
    paired = [first[seed] - second[seed] for seed in first if seed in second]
    if len(paired) < 2:
        return Difference(paired[0] if paired else math.nan, math.inf)
    return Difference(statistics.fmean(paired), half_width(statistics.stdev(paired), len(paired)))


def half_width(deviation: float, count: int) -> float:
    """Of the 95 % interval of a mean, from the standard deviation of `count` numbers of a sample (Student's t)."""
    return float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)


def pack_hits(hits: np.ndarray) -> str:
    """Numbers of queries and of right first answers by class, [2, classes], as short text."""
    return base64.b64encode(zlib.compress(hits.astype("<u2").tobytes(), 9)).decode()


def unpack_hits(text: str) -> np.ndarray:
    """What pack_hits has packed."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u2").reshape(2, -1).astype(np.int64)


def over_classes(first: "Row", second: "Row", lines: Lines, *, num_resamples: int = 2000) -> Interval | None:
    """Recall@1 of the first row minus that of the second, mean of the seeds that both have, with the interval that
    other test classes would give (paired bootstrap over classes); None without such a seed.
    """
    packed = [
        (lines[first.name, seed]["hits"], lines[second.name, seed]["hits"])
        for seed in first.seeds
        if (first.name, seed) in lines and (second.name, seed) in lines
    ]
    if not packed:
        return None
    counts = [[unpack_hits(text) for text in pair] for pair in zip(*packed, strict=True)]
    queries_C = counts[0][0][0]
    if not all(np.array_equal(of_seed_PC[0], queries_C) for of_row in counts for of_seed_PC in of_row):
        raise ValueError(f"expected the same test classes for {first.name} and {second.name}, got others; repeat both")
    scores_2C = np.array(counts)[:, :, 1].mean(axis=1) / queries_C
    scores = [{"recall@1": np.repeat(scores_C, queries_C)} for scores_C in scores_2C]
    class_Q = np.repeat(np.arange(len(queries_C)), queries_C)
    found = compare_queries(scores, class_Q, reference=1, by_class=True, num_resamples=num_resamples, seed=0)
    return found[0]["recall@1"]


# ---- Markdown --------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(values: Mapping[int, float]) -> str:
    """Percent: "71.20 ± 0.41"; empty without a number."""
    return format_spread(spread(list(values.values()))) if values else ""


def say_difference(found: Difference) -> str:
    """Points with the interval, or that it is a tie; empty without numbers."""
    if math.isnan(found.mean):
        return ""
    if math.isinf(found.half_width):
        return f"{100 * found.mean:+.2f}, one seed"
    said = f"{100 * found.mean:+.2f} ± {100 * found.half_width:.2f}"
    return f"{said}, tie" if found.is_tie else said


def say_interval(first: "Row", second: "Row", lines: Lines) -> str:
    """Recall@1 of the first row above that of the second, with the 95 % interval over test classes; a tie where that
    or the interval over seeds has 0 in it. Of fewer than two seeds: without a verdict.
    """
    found = over_classes(first, second, lines)
    if found is None:
        return ""
    said = f"{100 * found.difference:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    recall = metric("recall@1")
    of_seeds = difference(values_of(first, lines, recall), values_of(second, lines, recall))
    if math.isinf(of_seeds.half_width):
        return f"{said}, one seed"
    return f"{said}, tie" if found.is_tie or of_seeds.is_tie else said


def say_finished(rows: Sequence["Row"], lines: Lines) -> str:
    """How many runs of rows there are, and how many of them have finished if not all."""
    done = sum((row.name, seed) in lines for row in rows for seed in row.seeds)
    wanted = sum(len(row.seeds) for row in rows)
    return str(wanted) if done == wanted else f"{done} of {wanted}, unfinished"


def plain(table: "Table", lines: Lines) -> Shown:
    """A line for each row: its labels, results, and what they took."""
    columns = list(dict.fromkeys(label for row in table.rows for label in row.labels))
    header = [*columns, "seeds", "Recall@1", "MAP@R", "MAP@R, validation", "seconds", "head, ms", "peak, MiB"]
    body = []
    for row in table.rows:
        found = [lines[row.name, seed] for seed in row.seeds if (row.name, seed) in lines]
        taken = [
            [sum(line["seconds"].values()) for line in found],
            [line["head_ms"] for line in found if "head_ms" in line],
            [line["memory_mib"] for line in found],
        ]
        body.append(
            [
                *(str(row.labels.get(column, "")) for column in columns),
                count_seeds(row, lines),
                cell(values_of(row, lines, metric("recall@1"))),
                cell(values_of(row, lines, metric("map@r"))),
                cell(values_of(row, lines, metric("map@r", on="validation"))),
                *(f"{statistics.median(values):.3g}" if values else "" for values in taken),
            ]
        )
    return Shown(markdown(header, body))


def write_pages(table: "Table", lines: Lines, root: Path) -> list[Path]:
    """Put what a table shows into its page and the folder of pictures; returns the files that changed.

    Raises:
        ValueError: the page has no place for it.
    """
    return write_page(root / table.page, table.name, table.show(table, lines), root)


def write_page(page: Path, name: str, made: Shown, root: Path) -> list[Path]:
    """Put the table of a name into a page and its pictures into their folder; returns the files that changed.

    Raises:
        ValueError: the page has no place for it.
    """
    contents = {page: with_table(page.read_text(encoding="utf-8"), name, made.markdown)}
    contents |= {root / IMAGES / name: text for name, text in made.pictures.items() if text}
    changed = [path for path, text in contents.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in changed:
        publish_text(path, contents[path])
    return changed


def with_table(page: str, name: str, table: str) -> str:
    """A page with another table between its two comments.

    Raises:
        ValueError: it does not have them.
    """
    start, end = f"<!-- table {name} -->", f"<!-- end of table {name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one line {start} and one {end} in the page of table {name}; add them")
    inside = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    return inside.sub(lambda _: f"{start}\n\n{table}\n\n{end}", page)


# ---- pictures --------------------------------------------------------------------------------------------------------


def curves(
    title: str, subtitle: str, places: Sequence[str], series: Mapping[str, Sequence[Spread | None]], *, x_label: str
) -> str:
    """Curves with error bars over named places, in percent, each with its name at its right end, as an SVG document;
    empty while fewer than two places have a number.

    Args:
        title: what is shown, with the unit.
        subtitle: of what.
        places: on the horizontal axis, evenly.
        series: by name, a value for each place; the line passes over None.
        x_label: meaning of the places.
    """
    if sum(any(spreads[place] is not None for spreads in series.values()) for place in range(len(places))) < 2:
        return ""

    def paint(figure: "Figure") -> None:
        axes = figure.add_axes(PLACE)
        style_axes(axes)
        ends = []
        for number, (name, spreads) in enumerate(series.items()):
            shift = 0.06 * (number - (len(series) - 1) / 2)  # or error bars would hide each other
            known = [(x + shift, value) for x, value in enumerate(spreads) if value is not None]
            _with_bars(axes, [x for x, _ in known], [value for _, value in known], SERIES[number])
            if known:
                ends.append((100 * known[-1][1].mean, name, SERIES[number]))
        axes.set_xlim(-0.2, len(places) - 0.8)
        axes.set_xticks(range(len(places)), places, color=TEXT, fontsize=12)
        axes.set_xlabel(x_label, color=QUIET, fontsize=12)
        _name_ends(axes, ends)

    spoken = "; ".join(
        f"{name}: " + ", ".join(f"{place} {format_spread(s)}" for place, s in zip(places, spreads, strict=True) if s)
        for name, spreads in series.items()
    )
    return _picture(title, subtitle, f"{title}. {spoken}", paint)


def growth(title: str, subtitle: str, series: Sequence[Curve], *, x_label: str) -> str:
    """Curves over two logarithmic axes, each with its name at the right, as an SVG document.

    Args:
        title: what is shown, with the unit.
        subtitle: of what.
        series: one without points is left out.
        x_label: meaning of x.
    """
    shown = [curve for curve in series if curve.points]

    def paint(figure: "Figure") -> None:
        axes = figure.add_axes(PLACE)
        style_axes(axes, logarithmic=True)
        axes.set_xscale("log")
        axes.minorticks_off()
        for curve in shown:
            look: dict[str, Any] = {"dashes": (3.5, 3.5)} if curve.dashed else {}
            colour = SERIES[curve.colour]
            axes.plot(
                *zip(*curve.points, strict=True), "o-", color=colour, markersize=6, linewidth=1.8, clip_on=False, **look
            )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.tick_params(axis="x", labelsize=12, labelcolor=TEXT)
        axes.set_xlabel(x_label, color=QUIET, fontsize=12)
        _name_ends(axes, [(curve.points[-1][1], curve.name, SERIES[curve.colour]) for curve in shown])

    spoken = "; ".join(f"{c.name}: " + ", ".join(f"{x:,} {y:.3g}" for x, y in c.points) for c in shown)
    return _picture(title, subtitle, f"{title}. {spoken}", paint)


def against(title: str, subtitle: str, series: Mapping[str, Sequence[Priced]], *, x_label: str, lowest: float) -> str:
    """What is found, in percent and with error bars, by what it costs, on a logarithmic axis, as an SVG document; empty
    without points. Those of a series are joined, with their names beside them, and that of the series at the right.
    Points below the axis stand at its foot, with their numbers.

    Args:
        title: what is found, with the unit.
        subtitle: of what.
        series: by name; one without points is left out.
        x_label: meaning of the cost.
        lowest: percent at the foot of the axis.
    """
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return ""

    def paint(figure: "Figure") -> None:
        axes = figure.add_axes(PLACE)
        style_axes(axes)
        axes.set_xscale("log")
        axes.minorticks_off()
        ends = []
        for number, (name, points) in enumerate(shown.items()):
            colour = SERIES[number]
            ends.append((max(lowest, 100 * points[-1].found.mean), name, colour))
            drawn = [point for point in points if 100 * point.found.mean >= lowest]
            _with_bars(axes, [point.cost for point in drawn], [point.found for point in drawn], colour)
            for place, point in enumerate(points):
                side = "right" if place == 0 else "left" if place == len(points) - 1 else "center"  # away from the next
                said = point.name
                if point not in drawn:
                    said, side = f"{said}: {100 * point.found.mean:.0f}", side.replace("center", "left")
                    axes.plot(point.cost, lowest, "v", color=colour, markersize=7, clip_on=False)
                axes.annotate(
                    said,
                    (point.cost, max(lowest, 100 * point.found.mean)),
                    (0, -18 if number % 2 and point in drawn else 9),  # above or below: lines may lie close together
                    textcoords="offset pixels",
                    ha=side,
                    color=colour,
                    fontsize=11,
                )
        costs = [point.cost for points in shown.values() for point in points]
        ticks = [digit * 10.0**power for power in range(-2, 6) for digit in (1, 2, 5)]
        axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
        inside = [tick for tick in ticks if min(costs) / 1.3 <= tick <= max(costs) * 1.3]
        axes.set_xticks(inside, [f"{tick:g}" for tick in inside], color=TEXT, fontsize=12)
        axes.set_xlabel(x_label, color=QUIET, fontsize=12)
        axes.set_ylim(bottom=lowest)
        _name_ends(axes, ends)

    spoken = "; ".join(
        f"{name}: " + ", ".join(f"{p.name} {format_spread(p.found)} at {p.cost:.3g}".strip() for p in points)
        for name, points in shown.items()
    )
    return _picture(title, subtitle, f"{title}, by {x_label}. {spoken}", paint)


def _with_bars(axes: "Axes", xs: Sequence[float], spreads: Sequence[Spread], colour: str) -> None:
    """Draw a line of means, in percent, with their deviations."""
    axes.errorbar(
        xs,
        [100 * spread.mean for spread in spreads],
        yerr=[100 * (spread.deviation or 0.0) for spread in spreads],
        color=colour,
        fmt="o-",
        markersize=6,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=3,
        clip_on=False,
    )


def _name_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names to the right, each where its line ends unless another is there: (height, name, colour)."""
    axes.get_ylim()  # settles the limits
    to_share = axes.transData + axes.transAxes.inverted()
    below, gap = -math.inf, 0.066
    for share, name, colour in sorted((to_share.transform((1, height))[1], *rest) for height, *rest in ends):
        below = max(share, below + gap)
        axes.text(
            1.02, below, name, color=colour, va="center", fontweight="bold", fontsize=12, transform=axes.transAxes
        )


def _picture(title: str, subtitle: str, spoken: str, paint: Callable[["Figure"], None]) -> str:
    return render(
        "sweep.svg",
        lines=(title, subtitle),
        spoken=spoken,
        drawing=draw(paint, name=title, width=WIDTH, height=HEIGHT),
        width=WIDTH,
        height=HEADER + HEIGHT,
        header=HEADER,
    )
