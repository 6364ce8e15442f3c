"""Tables and pictures of docs/ from the results of benchmarks/retrieval.py: Markdown, and SVG that is light or dark as
its reader is.

A table stands between two comments of its page, and is replaced there; a picture is a file of docs/images. Both follow
from the declared rows and their lines alone, so that a test can make them again.

Two settings are a tie where the 95 % interval of their paired differences, seed by seed, has 0 in it (Student's t):
three seeds make it wide, and nothing smaller than that is claimed.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scipy import stats

from dist_proxygml.cluster.grid import Spread, format_spread
from dist_proxygml.reporting.charts import QUIET, SERIES, TEXT, draw, style_axes
from dist_proxygml.reporting.render import render
from dist_proxygml.storage.files import publish_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.tables import Row, Table

Lines = Mapping[tuple[str, int], dict[str, Any]]  # results by row and seed
IMAGES = "docs/images"
WIDTH, HEIGHT, HEADER = 680, 330, 62


class Shown(NamedTuple):
    """What a page shows of a table."""

    markdown: str
    pictures: Mapping[str, str] = {}  # SVG by file name


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


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The first minus the second, over the seeds that both have."""
    paired = [first[seed] - second[seed] for seed in first if seed in second]
    if len(paired) < 2:
        return Difference(paired[0] if paired else math.nan, math.inf)
    error = statistics.stdev(paired) / math.sqrt(len(paired))
    return Difference(statistics.fmean(paired), float(stats.t.ppf(0.975, len(paired) - 1)) * error)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(values: Mapping[int, float]) -> str:
    """Percent: "71.20 ± 0.41"; empty without a number."""
    return format_spread(spread(list(values.values()))) if values else ""


def plain(table: "Table", lines: Lines) -> Shown:
    """A line for each row: its labels, results, and what they took."""
    columns = list(dict.fromkeys(label for row in table.rows for label in row.labels))
    header = [*columns, "seeds", "Recall@1", "MAP@R", "MAP@R, validation", "seconds", "head, ms", "peak, MiB"]
    body = []
    for row in table.rows:
        found = [lines[row.name, seed] for seed in row.seeds if (row.name, seed) in lines]
        taken = [
            [sum(line["seconds"].values()) for line in found],
            [line["head_ms"] for line in found],
            [line["memory_mib"] for line in found],
        ]
        body.append(
            [
                *(str(row.labels.get(column, "")) for column in columns),
                str(len(found)) if len(found) == len(row.seeds) else f"{len(found)} of {len(row.seeds)}",
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
    made = table.show(table, lines)
    page = root / table.page
    contents = {page: with_table(page.read_text(encoding="utf-8"), table.name, made.markdown)}
    contents |= {root / IMAGES / name: text for name, text in made.pictures.items()}
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
    """Curves with error bars over named places, in percent, each with its name at its right end, as an SVG document.

    Args:
        title: what is shown, with the unit.
        subtitle: of what.
        places: on the horizontal axis, evenly.
        series: by name, a value for each place; the line passes over None.
        x_label: meaning of the places.
    """

    def paint(figure: "Figure") -> None:
        axes = figure.add_axes((52 / WIDTH, 54 / HEIGHT, (WIDTH - 260) / WIDTH, (HEIGHT - 70) / HEIGHT))
        style_axes(axes)
        ends = []
        for number, (name, spreads) in enumerate(series.items()):
            shift = 0.06 * (number - (len(series) - 1) / 2)  # or error bars would hide each other
            known = [(x + shift, value) for x, value in enumerate(spreads) if value is not None]
            axes.errorbar(
                [x for x, _ in known],
                [100 * value.mean for _, value in known],
                yerr=[100 * (value.deviation or 0.0) for _, value in known],
                color=SERIES[number],
                fmt="o-",
                markersize=6,
                linewidth=1.8,
                elinewidth=1.2,
                capsize=3,
                clip_on=False,
            )
            if known:
                ends.append((100 * known[-1][1].mean, name, SERIES[number]))
        axes.set_xlim(-0.2, len(places) - 0.8)
        axes.set_xticks(range(len(places)), places, color=TEXT, fontsize=12)
        axes.set_xlabel(x_label, color=QUIET, fontsize=12)
        low, high = axes.get_ylim()
        gap, below = 0.066 * (high - low), -math.inf
        for height, name, colour in sorted(ends):
            below = max(height, below + gap)
            axes.text(len(places) - 0.72, below, name, color=colour, va="center", fontsize=12, fontweight="bold")

    spoken = "; ".join(
        f"{name}: " + ", ".join(f"{place} {format_spread(s)}" for place, s in zip(places, spreads, strict=True) if s)
        for name, spreads in series.items()
    )
    return render(
        "sweep.svg",
        lines=(title, subtitle),
        spoken=f"{title}. {spoken}",
        drawing=draw(paint, name=title, width=WIDTH, height=HEIGHT),
        width=WIDTH,
        height=HEADER + HEIGHT,
        header=HEADER,
    )


# ---- learning rates --------------------------------------------------------------------------------------------------


def learning_rates(table: "Table", lines: Lines) -> Shown:
    """The tuning, the rules side by side for each batch on both kinds of unseen classes, and their differences to the
    rule that the validation classes pick; of each data set.
    """
    parts: list[str] = []
    pictures = {}
    for data in dict.fromkeys(row.labels["data"] for row in table.rows):
        rows = [row for row in table.rows if row.labels["data"] == data]
        rules, cells = by_rule([row for row in rows if "batch" in row.labels])
        on_validation, on_test = metric("map@r", on="validation"), metric("recall@1")
        picked = pick_rule(cells, lines)
        others = [rule for rule in rules if rule != picked]
        grown = [batch for batch, of_rule in cells.items() if len({row.name for row in of_rule.values()}) > 1]
        test, validation = (
            {
                rule: {batch: values_of(of[rule], lines, number) if rule in of else {} for batch, of in cells.items()}
                for rule in rules
            }
            for number in (on_test, on_validation)
        )
        apart = [
            [str(batch), *(say_difference(difference(test[rule][batch], test[picked][batch])) for rule in others)]
            for batch in grown
        ]
        means = [difference(over(test[rule], grown), over(test[picked], grown)) for rule in others]
        apart.append(["mean", *map(say_difference, means)])
        parts += [
            f"**{data}: the rates of the smallest batch**, by MAP@R of validation classes",
            tuning_grid([row for row in rows if "backbone" in row.labels], lines),
            f"**{data}: MAP@R of validation classes**, by which a rule is picked: {picked}",
            markdown(["batch", *rules], [[str(b), *(cell(validation[rule][b]) for rule in rules)] for b in cells]),
            f"**{data}: Recall@1 of test classes**",
            markdown(["batch", *rules], [[str(b), *(cell(test[rule][b]) for rule in rules)] for b in cells]),
            f"**{data}: Recall@1 of test classes, in points above the rule that was picked**, with 95 % intervals",
            markdown(["batch", *others], apart),
        ]
        pictures[f"{table.name}_{data}.svg"] = curves(
            "Recall@1 of unseen classes, percent",
            f"{data}, equal epochs; mean ± standard deviation of 3 seeds",
            [str(batch) for batch in cells],
            {
                rule: [spread(list(found.values())) if found else None for found in test[rule].values()]
                for rule in rules
            },
            x_label="images in a batch",
        )
    return Shown("\n\n".join(parts), pictures)


def over(numbers: Mapping[int, Mapping[int, float]], batches: Sequence[int]) -> dict[int, float]:
    """The mean over batches of each seed that has a number for all of them."""
    seeds = set.intersection(*(set(numbers[batch]) for batch in batches)) if batches else set()
    return {seed: statistics.fmean(numbers[batch][seed] for batch in batches) for seed in sorted(seeds)}


def by_rule(rows: Sequence["Row"]) -> tuple[list[str], dict[int, dict[str, "Row"]]]:
    """The rules, and the row of each batch and rule: at the smallest batch all rules are one row."""
    rules = list(dict.fromkeys(row.labels["rule"] for row in rows if row.labels["rule"] != "tuned"))
    cells: dict[int, dict[str, Row]] = {}
    for row in rows:
        names = rules if row.labels["rule"] == "tuned" else [row.labels["rule"]]
        cells.setdefault(row.labels["batch"], {}).update(dict.fromkeys(names, row))
    return rules, cells


def pick_rule(cells: Mapping[int, Mapping[str, "Row"]], lines: Lines) -> str:
    """The rule with the highest MAP@R on validation classes, over seeds and the batches that all rules have."""
    means: dict[str, list[float]] = {}
    all_rules = {rule for of_batch in cells.values() for rule in of_batch}
    for of_batch in cells.values():
        found = {rule: values_of(row, lines, metric("map@r", on="validation")) for rule, row in of_batch.items()}
        if len(found) == len(all_rules) and all(found.values()):
            for rule, values in found.items():
                means.setdefault(rule, []).append(statistics.fmean(values.values()))
    return max(means, key=lambda rule: statistics.fmean(means[rule]))


def pick_tuned(rows: Sequence["Row"], lines: Lines) -> tuple[float, float]:
    """The rates of backbone and proxies with the highest MAP@R on validation classes, averaged over seeds."""
    found = {row.name: values_of(row, lines, metric("map@r", on="validation")) for row in rows}
    best = max((row for row in rows if found[row.name]), key=lambda row: statistics.fmean(found[row.name].values()))
    return best.labels["backbone"], best.labels["proxies"]


def tuning_grid(rows: Sequence["Row"], lines: Lines) -> str:
    """Rates of the backbone downwards, of the proxies to the right."""
    proxies = sorted({row.labels["proxies"] for row in rows})
    body = []
    for backbone in sorted({row.labels["backbone"] for row in rows}):
        of = {row.labels["proxies"]: row for row in rows if row.labels["backbone"] == backbone}
        numbers = [values_of(of[p], lines, metric("map@r", on="validation")) if p in of else {} for p in proxies]
        body.append([f"{backbone:g}", *(f"{100 * statistics.fmean(n.values()):.2f}" if n else "" for n in numbers)])
    return markdown(["backbone ↓ proxies →", *(f"{p:g}" for p in proxies)], body)


def say_difference(found: Difference) -> str:
    """Points with the interval, or that it is a tie; empty without numbers."""
    if math.isnan(found.mean):
        return ""
    said = f"{100 * found.mean:+.2f} ± {100 * found.half_width:.2f}"
    return f"{said}, tie" if found.is_tie else said
