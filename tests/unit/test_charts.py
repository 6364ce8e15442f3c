"""Charts as SVG: points where the axes say, long series short, histograms in shares."""

import re

import pytest

from dist_proxygml.reporting.charts import Histogram, Series, histogram_chart, line_chart


def test_a_chart_puts_its_points_where_its_axes_say() -> None:
    chart = line_chart("Loss", [Series("total", [(0, 0.0), (10, 5.0)])], x_label="steps")
    assert re.findall(r'points="([^"]+)"', chart) == ["52.0,224.0 510.0,10.0"]
    assert 'aria-label="Loss: total ends at 5"' in chart
    assert line_chart("Loss", [Series("total", [])], x_label="steps") == ""
    nothing = [Series("total", [(0, float("nan"))])]
    assert line_chart("Loss", nothing, x_label="steps") == ""


def test_a_long_series_is_averaged_into_a_few_hundred_points() -> None:
    points = [(step, float(step % 2)) for step in range(100_000)]
    chart = line_chart("Loss", [Series("total", points)], x_label="steps")
    assert len(chart) < 20_000
    heights = {point.split(",")[1] for point in re.findall(r'points="([^"]+)"', chart)[0].split()}
    assert len(heights) == 1  # every average of zeros and ones is one half


def test_a_logarithmic_chart_leaves_out_what_falls_to_zero() -> None:
    series = [Series("backbone", [(0, 1e-3), (1, 1e-4), (2, 1e-12), (3, 0.0)])]
    chart = line_chart("Rate", series, x_label="steps", logarithmic=True)
    assert len(re.findall(r'points="([^"]+)"', chart)[0].split()) == 2


def test_equal_lines_are_drawn_once_under_both_names() -> None:
    points = [(0, 1.0), (1, 2.0)]
    chart = line_chart("Rate", [Series("one", points), Series("two", points)], x_label="steps")
    assert chart.count("<polyline") == 1
    assert "one, two" in chart


def test_a_histogram_has_the_area_of_its_shares_and_no_empty_ends() -> None:
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    few, many = Histogram("few", edges, [0, 1, 3, 0]), Histogram("many", edges, [0, 0, 1000, 1000])
    chart = histogram_chart("Similarity", [few, many, Histogram("none", edges, [0] * 4)], x_label="cosine")
    outlines = [[tuple(map(float, point.split(","))) for point in text.split()] for text in polygons(chart)]
    assert len(outlines) == 2
    # From 0.25 to 1 in x, 0 to 75 % in y: 25 % and 75 % of the one, 50 % twice of the other.
    bottom, height = 224.0, 214.0
    shares = [[round(75 * (bottom - y) / height) for _, y in outline] for outline in outlines]
    assert shares == [[0, 25, 25, 75, 75, 0], [0, 50, 50, 50, 50, 0]]
    assert [outlines[0][0][0], outlines[1][-1][0]] == [52.0, 510.0]
    assert 'aria-label="Similarity: few, most at 0.5; many, most at 0.5"' in chart


def polygons(chart: str) -> list[str]:
    return re.findall(r'<polygon class="series-\d" points="([^"]+)"', chart)


def test_a_histogram_without_values_is_not_drawn_and_one_without_its_edges_is_refused() -> None:
    assert histogram_chart("Similarity", [Histogram("none", [0.0, 1.0], [0])], x_label="cosine") == ""
    with pytest.raises(ValueError, match="zip"):
        histogram_chart("Similarity", [Histogram("odd", [0.0, 1.0], [1, 2])], x_label="cosine")


def test_numbers_of_an_axis_lie_within_it() -> None:
    chart = line_chart("Loss", [Series("total", [(10, 1.0), (94, 2.0)])], x_label="steps")
    placed = [float(x) for x in re.findall(r'class="tick middle" x="([-0-9.]+)"', chart)]
    assert len(placed) == 4
    assert min(placed) >= 52
