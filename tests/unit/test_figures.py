"""Tables and pictures of docs/ are those of the results that lie beside them; ties are called ties."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from benchmarks import figures
from benchmarks.figures import difference, over_classes, pack_hits, say_difference, unpack_hits
from benchmarks.retrieval import finished
from benchmarks.tables import TABLES, Row
from dist_proxygml.cluster.grid import Spread

ROOT = Path(__file__).parents[2]
COSTS = [("1 %", 3.0, 0.5), ("10 %", 30.0, 0.7), ("", 300.0, 0.6)]


@pytest.mark.parametrize("name", TABLES)
def test_a_page_shows_what_its_results_say(name: str) -> None:
    table = TABLES[name]
    lines = finished(table)
    assert lines, "no result counts under the settings that the table declares now"
    made = table.show(table, lines)
    page = (ROOT / table.page).read_text()
    assert figures.with_table(page, name, made.markdown) == page, "python -m benchmarks.retrieval --figures"
    for file, text in made.pictures.items():
        assert (file in page) == bool(text)
        if text:
            assert text == (ROOT / figures.IMAGES / file).read_text(), "python -m benchmarks.retrieval --figures"


def test_differences_of_seeds_that_disagree_are_a_tie() -> None:
    # differences 1, 2, 3: standard error 1 / sqrt(3), t(0.975, 2) = 4.3027
    found = difference({0: 0.51, 1: 0.62, 2: 0.43}, {0: 0.50, 1: 0.60, 2: 0.40, 3: 0.9})
    assert found.mean == pytest.approx(0.02)
    assert found.half_width == pytest.approx(0.01 * 4.302653 / math.sqrt(3), rel=1e-6)
    assert found.is_tie
    assert say_difference(found) == "+2.00 ± 2.48, tie"
    assert say_difference(difference({0: 0.52, 1: 0.62, 2: 0.43}, {0: 0.50, 1: 0.60, 2: 0.40})) == "+2.33 ± 1.43"
    assert difference({0: 0.9}, {0: 0.1}).is_tie  # one seed shows nothing
    assert say_difference(difference({0: 0.9}, {1: 0.1})) == ""
    assert say_difference(difference({0: 0.9}, {0: 0.5, 1: 0.1})) == "+40.00, one seed"


def test_curves_pass_over_what_has_no_number_and_their_names_do_not_cover_each_other() -> None:
    places = {"a": [Spread(0.5, 0.01, (0.5,)), None], "b": [None, Spread(0.4, None, (0.4,))]}
    text = figures.curves("Recall", "two", ["32", "64"], places | {"c": places["b"]}, x_label="batch")
    root = ElementTree.fromstring(text)
    assert "a: 32 50.00 ± 1.00; b: 64 40.00 ± n/a" in str(root.get("aria-label"))
    assert [f"stroke: var(--series-{number})" in text for number in range(4)] == [True, True, True, False]
    heights = {}
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        if element.text in places | {"c": 0}:
            heights[element.text] = float(str(element.get("y") or str(element.get("transform")).split()[1].strip(")")))
    assert abs(heights["b"] - heights["c"]) >= 12, heights


def test_what_is_found_stands_above_what_it_costs() -> None:
    points = [figures.Priced(name, cost, Spread(found, None, (found,))) for name, cost, found in COSTS]
    series = {"cheap": points[:2], "none": [], "dear": points[2:]}
    text = figures.against("Recall", "all", series, x_label="ms", lowest=45)
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == (
        "Recall, by ms. cheap: 1 % 50.00 ± n/a at 3, 10 % 70.00 ± n/a at 30; dear: 60.00 ± n/a at 300"
    )
    elements = [element for element in root.iter("{http://www.w3.org/2000/svg}text") if element.get("x")]
    places = {element.text: (float(element.attrib["x"]), float(element.attrib["y"])) for element in elements}
    (x_one, y_one), (x_ten, y_ten) = places["1 %"], places["10 %"]
    assert y_ten < y_one  # upwards
    assert x_ten - x_one == pytest.approx(places["200"][0] - places["20"][0])  # a factor of ten
    assert "none" not in places
    assert figures.against("Recall", "all", {"none": []}, x_label="ms", lowest=0) == ""
    assert ">1 %: 50<" in figures.against("Recall", "all", series, x_label="ms", lowest=55)


def test_intervals_over_classes_are_those_of_paired_classes() -> None:
    queries = np.array([2, 4, 1, 3])
    hits = {"a": [[2, 4, 1, 2], [2, 4, 1, 3]], "b": [[1, 3, 1, 1], [2, 2, 0, 1]]}
    rows = {name: Row(name, {}, (), seeds=(0, 1, 2)) for name in hits}
    lines = {
        (name, seed): {"hits": pack_hits(np.stack([queries, counts]))}
        for name, of_seeds in hits.items()
        for seed, counts in enumerate(of_seeds)
    }
    assert unpack_hits(lines["a", 1]["hits"]).tolist() == [[2, 4, 1, 3], [2, 4, 1, 3]]
    found = over_classes(rows["a"], rows["b"], lines)
    assert found is not None
    # means of two seeds: a (2, 4, 1, 2.5), b (1.5, 2.5, 0.5, 1)
    assert found.difference == pytest.approx((0.5 + 1.5 + 0.5 + 1.5) / 10)
    assert 0.25 <= found.low < found.difference < found.high <= 0.5  # of a class: 0.25, 0.375, 0.5, 0.5
    assert over_classes(rows["a"], Row("c", {}, ()), lines) is None
    of_other_classes = lines | {("b", 0): {"hits": pack_hits(np.array([[3] * 40, [1] * 40]))}}
    with pytest.raises(ValueError, match="the same test classes for a and b"):
        over_classes(rows["a"], rows["b"], of_other_classes)
