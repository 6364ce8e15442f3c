"""Tables and pictures of docs/ are those of the results that lie beside them; ties are called ties."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures
from benchmarks.figures import difference, say_difference
from benchmarks.retrieval import finished
from benchmarks.tables import GROWN, RULES, TABLES, Row, Table
from dist_proxygml.cluster.grid import Spread

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TABLES)
def test_a_page_shows_what_its_results_say(name: str) -> None:
    table = TABLES[name]
    lines = finished(table)
    assert lines, "no result counts under the settings that the table declares now"
    made = table.show(table, lines)
    page = (ROOT / table.page).read_text()
    assert figures.with_table(page, name, made.markdown) == page, "python -m benchmarks.retrieval --figures"
    for file, text in made.pictures.items():
        drawn, stored = (ElementTree.fromstring(svg) for svg in (text, (ROOT / figures.IMAGES / file).read_text()))
        assert drawn.get("aria-label") == stored.get("aria-label"), file
        assert file in page


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


def result(validation: float, test: float) -> dict[str, Any]:
    return {"validation": {"map@r": validation}, "test": {"recall@1": test, "map@r": test}}


def test_settings_are_picked_by_validation_classes_alone() -> None:
    tuning = [Row(f"tuning-{b}", {"data": "x", "backbone": b, "proxies": 1.0}, (), seeds=(0, 1)) for b in (0.1, 0.2)]
    base = Row("base", {"data": "x", "batch": 1, "rule": "tuned"}, ())
    grown = [Row(rule, {"data": "x", "batch": 2, "rule": rule}, ()) for rule in ("fixed", "linear")]
    table = Table("t", "?", "docs/t.md", [*tuning, base, *grown], figures.learning_rates)
    lines = {("tuning-0.1", seed): result(0.5, 0.1) for seed in (0, 1)}
    lines |= {("tuning-0.2", 0): result(0.7, 0.9), ("tuning-0.2", 1): result(0.2, 0.9)}
    lines |= {("base", seed): result(0.5, 0.5) for seed in (0, 1, 2)}
    lines |= {("fixed", seed): result(0.4, 0.8 + 0.01 * seed) for seed in (0, 1, 2)}
    lines |= {("linear", seed): result(0.6, 0.3) for seed in (0, 1, 2)}
    assert figures.pick_tuned(tuning, lines) == (0.1, 1.0)
    rules, cells = figures.by_rule([base, *grown])
    assert rules == ["fixed", "linear"]
    assert cells == {1: {"fixed": base, "linear": base}, 2: {"fixed": grown[0], "linear": grown[1]}}
    assert figures.pick_rule(cells, lines) == "linear"
    made = table.show(table, lines)
    assert "picked: linear" in made.markdown
    assert "| 0.1 | 50.00 |" in made.markdown
    assert "| 2 | 81.00 ± 1.00 | 30.00 ± 0.00 |" in made.markdown
    assert "| 2 | +51.00 ± 2.48 |" in made.markdown
    assert "| mean | +51.00 ± 2.48 |" in made.markdown
    picture = ElementTree.fromstring(made.pictures["t_x.svg"])
    assert "fixed: 1 50.00 ± 0.00, 2 81.00 ± 1.00" in str(picture.get("aria-label"))


def test_curves_pass_over_what_has_no_number_and_their_names_do_not_cover_each_other() -> None:
    places = {"a": [Spread(0.5, 0.01, (0.5,)), None], "b": [None, Spread(0.4, None, (0.4,))]}
    text = figures.curves("Recall", "two", ["32", "64"], places | {"c": places["b"]}, x_label="batch")
    root = ElementTree.fromstring(text)
    assert "a: 32 50.00 ± 1.00; b: 64 40.00 ± n/a" in str(root.get("aria-label"))
    heights = {}
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        if element.text in places | {"c": 0}:
            heights[element.text] = float(str(element.get("y") or str(element.get("transform")).split()[1].strip(")")))
    assert abs(heights["b"] - heights["c"]) >= 12, heights


@pytest.mark.parametrize("data", GROWN)
def test_the_rates_that_rules_begin_with_are_the_best_of_those_tried_on_validation_classes(data: str) -> None:
    table = TABLES["learning_rates"]
    lines = finished(table)
    tuning = [row for row in table.rows if "backbone" in row.labels and row.labels["data"] == data]
    assert figures.pick_tuned(tuning, lines) == GROWN[data].tuned


def test_rules_are_what_they_are_called() -> None:
    assert [rule(4) for rule in RULES.values()] == [(1, 1), (2, 2), (4, 4), (2, 1)]
