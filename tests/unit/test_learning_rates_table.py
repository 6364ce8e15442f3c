"""Learning rates by the batch size: what is picked, and by what."""

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from benchmarks.retrieval import finished
from benchmarks.tables import TABLES, Row, Table, learning_rates
from benchmarks.tables.learning_rates import GROWN, RULES
from benchmarks.tables.table import pick


def result(validation: float, test: float) -> dict[str, Any]:
    return {"validation": {"map@r": validation}, "test": {"recall@1": test, "map@r": test}}


def test_settings_are_picked_by_validation_classes_alone() -> None:
    tuning = [Row(f"tuning-{b}", {"data": "x", "backbone": b, "proxies": 1.0}, (), seeds=(0, 1)) for b in (0.1, 0.2)]
    base = Row("base", {"data": "x", "batch": 1, "rule": "tuned"}, ())
    grown = [Row(rule, {"data": "x", "batch": 2, "rule": rule}, ()) for rule in ("fixed", "linear")]
    table = Table("t", "?", "docs/t.md", [*tuning, base, *grown], learning_rates.show)
    lines = {("tuning-0.1", seed): result(0.5, 0.1) for seed in (0, 1)}
    lines |= {("tuning-0.2", 0): result(0.7, 0.9), ("tuning-0.2", 1): result(0.2, 0.9)}
    lines |= {("base", seed): result(0.5, 0.5) for seed in (0, 1, 2)}
    lines |= {("fixed", seed): result(0.4, 0.8 + 0.01 * seed) for seed in (0, 1, 2)}
    lines |= {("linear", seed): result(0.6, 0.3) for seed in (0, 1, 2)}
    assert pick(tuning, lines) == tuning[0]
    rules, cells = learning_rates.by_rule([base, *grown])
    assert rules == ["fixed", "linear"]
    assert cells == {1: {"fixed": base, "linear": base}, 2: {"fixed": grown[0], "linear": grown[1]}}
    assert learning_rates.pick_rule(cells, lines) == "linear"
    made = table.show(table, lines)
    assert "picked: linear" in made.markdown
    assert "| 0.1 | 50.00 |" in made.markdown
    assert "| 2 | 81.00 ± 1.00 | 30.00 ± 0.00 |" in made.markdown
    assert "| 2 | +51.00 ± 2.48 |" in made.markdown
    assert "| mean | +51.00 ± 2.48 |" in made.markdown
    assert table.show(table, {}).markdown == "", "nothing before there are results"
    picture = ElementTree.fromstring(made.pictures["t_x.svg"])
    assert "fixed: 1 50.00 ± 0.00, 2 81.00 ± 1.00" in str(picture.get("aria-label"))


@pytest.mark.parametrize("data", GROWN)
def test_the_rates_that_rules_begin_with_are_the_best_of_those_tried_on_validation_classes(data: str) -> None:
    table = TABLES["learning_rates"]
    lines = finished(table)
    tuning = [row for row in table.rows if "backbone" in row.labels and row.labels["data"] == data]
    best = pick(tuning, lines)
    assert best is not None
    assert (best.labels["backbone"], best.labels["proxies"]) == GROWN[data].tuned


def test_rules_are_what_they_are_called() -> None:
    assert [rule(4) for rule in RULES.values()] == [(1, 1), (2, 2), (4, 4), (2, 1)]
