"""Charts as SVG: points where the axes say, long series short, histograms in shares, colours of the page."""

import re

import matplotlib
import numpy as np
import pytest

from dist_proxygml.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Histogram, Series, roc_chart
from dist_proxygml.reporting.charts import histogram_chart as draw_histograms
from dist_proxygml.reporting.charts import line_chart as draw_lines


def line_chart(title: str, series: list[Series], *, logarithmic: bool = False, markers: bool = False) -> Chart:
    chart = draw_lines(title, series, x_label="steps", logarithmic=logarithmic, markers=markers)
    assert chart is not None
    return chart


def paths(chart: Chart, style: str) -> list[list[tuple[float, float]]]:
    """The points of all paths with some text in their style."""
    found = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', chart.drawing)
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
        for path, styled in found
        if style in styled
    ]


def test_a_chart_puts_its_points_where_its_axes_say() -> None:
    chart = line_chart("Loss", [Series("total", [(0, 0.0), (10, 5.0)])])
    assert paths(chart, "stroke: var(--series-0)") == [[(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]]
    assert (chart.title, chart.subtitle, chart.spoken) == ("Loss", "over steps", "total ends at 5")
    assert draw_lines("Loss", [Series("total", [])], x_label="steps") is None
    assert draw_lines("Loss", [Series("total", [(0, float("nan"))])], x_label="steps") is None


def test_its_numbers_are_text_and_its_colours_those_of_the_page() -> None:
    points = [(10, 1000.0), (94, 2500.0)]
    chart = line_chart("Loss", [Series("total", points), Series("level", [(10, 2e3), (94, 2e3)], dashed=True)])
    assert re.findall(r">([^<>\s]+)</text>", chart.drawing) == [
        "20",
        "40",
        "60",
        "80",
        "1,000",
        "1,500",
        "2,000",
        "2,500",
    ]
    assert set(re.findall(r"<text style=\"[^\"]*fill: ([^;\"]+)", chart.drawing)) == {"var(--quiet)"}
    assert not re.search("#[0-9a-f]{6}|font-family|http|<style|<metadata", chart.drawing)
    assert len(paths(chart, "stroke-dasharray")) == 1
    assert chart.legend == [("total", False), ("level", True)]
    assert line_chart("Loss", [Series("total", points)], markers=True).drawing.count("<use ") == 2


def test_the_same_numbers_are_the_same_text_and_ids_are_of_one_chart() -> None:
    series = [Series("total", [(0, 1.0), (1, 2.0)])]
    first, again, other = (line_chart(title, series, markers=True).drawing for title in ("Loss", "Loss", "Rate"))
    assert first == again
    with matplotlib.rc_context({"axes.facecolor": "red", "axes.grid": True, "font.size": 20, "lines.linewidth": 9}):
        assert line_chart("Loss", series, markers=True).drawing == first
        assert matplotlib.rcParams["font.size"] == 20, "settings of whoever draws beside it stay"
    ids, others = (set(re.findall(r'id="(\w+)"', drawing)) for drawing in (first, other))
    assert ids
    assert not ids & others


def test_a_long_series_is_averaged_into_a_few_hundred_points() -> None:
    points = [(step, float(step % 2)) for step in range(100_000)]
    chart = line_chart("Loss", [Series("total", points)])
    assert len(chart.drawing) < 20_000
    (line,) = paths(chart, "--series-0")
    assert len({y for _, y in line}) == 1  # every average of zeros and ones is one half


def test_a_logarithmic_chart_leaves_out_what_falls_to_zero() -> None:
    series = [Series("backbone", [(0, 1e-3), (1, 1e-4), (2, 1e-12), (3, 0.0)])]
    (line,) = paths(line_chart("Rate", series, logarithmic=True), "--series-0")
    assert len(line) == 2
    assert draw_lines("Rate", [Series("zero", [(0, 0.0)])], x_label="steps", logarithmic=True) is None


def test_equal_lines_are_drawn_once_under_both_names() -> None:
    points = [(0, 1.0), (1, 2.0)]
    chart = line_chart("Rate", [Series("one", points), Series("two", points)])
    assert len(paths(chart, "--series-")) == 1
    assert chart.legend == [("one, two", False)]


def test_a_roc_is_a_step_curve_over_decades_and_has_no_point_at_zero() -> None:
    points = [(0.0, 10.0), (1e-2, 25.0), (1e-1, 50.0), (1.0, 100.0)]
    chart = roc_chart("TAR", [Series("after", points), Series("before", [(0.0, 1.0)])], x_label="FAR")
    assert chart is not None
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    corners = [(0, 0.25), (0.5, 0.25), (0.5, 0.5), (1, 0.5), (1, 1.0)]
    expected = [(LEFT + x * width, HEIGHT - BOTTOM - y * height) for x, y in corners]
    found = [point for path in paths(chart, "stroke: var(--series-0)") for point in path]
    assert np.array(found) == pytest.approx(np.array(expected), abs=1e-3)
    assert (chart.legend, chart.spoken) == ([("after", False)], "after begins at 25")
    assert roc_chart("TAR", [Series("after", [(0.0, 1.0)])], x_label="FAR") is None


def test_a_histogram_has_the_area_of_its_shares_and_no_empty_ends() -> None:
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    few, many = Histogram("few", edges, [0, 1, 3, 0]), Histogram("many", edges, [0, 0, 1000, 1000])
    chart = draw_histograms("Similarity", [few, many, Histogram("none", edges, [0] * 4)], x_label="cosine")
    assert chart is not None
    outlines = paths(chart, "fill-opacity")
    assert len(outlines) == 2
    # From 0.25 to 1 in x, 0 to 75 % in y: 25 % and 75 % of the one, 50 % twice of the other.
    bottom, height = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    shares = [[round(75 * (bottom - y) / height) for _, y in outline] for outline in outlines]
    assert shares == [[0, 25, 25, 75, 75, 0], [0, 50, 50, 50, 50, 0]]
    assert [outlines[0][0][0], outlines[1][-1][0]] == [LEFT, WIDTH - RIGHT]
    assert chart.spoken == "few, most at 0.5; many, most at 0.5"


def test_a_histogram_without_values_is_not_drawn_and_one_without_its_edges_is_refused() -> None:
    assert draw_histograms("Similarity", [Histogram("none", [0.0, 1.0], [0])], x_label="cosine") is None
    with pytest.raises(ValueError, match="3 edges"):
        draw_histograms("Similarity", [Histogram("odd", [0.0, 1.0], [1, 2])], x_label="cosine")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_line_that_does_not_rise_or_has_one_point_is_drawn(logarithmic: bool) -> None:
    for points in ([(0, 0.5), (9, 0.5)], [(4, 1e-3)]):
        chart = line_chart("Rate", [Series("flat", points)], logarithmic=logarithmic, markers=True)
        assert "nan" not in chart.drawing
        assert chart.drawing.count("<use ") == len(points)
