"""Exact and random negatives: settings are those that validation classes pick, and unfinished rows leave gaps."""

from typing import Any

import numpy as np
import pytest

from benchmarks.figures import pack_hits
from benchmarks.retrieval import finished
from benchmarks.tables import TABLES, negatives
from benchmarks.tables.negatives import HEADS, ROWS, SIZES, trials
from benchmarks.tables.table import pick


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("head", HEADS)
def test_scale_and_rate_are_those_that_validation_classes_pick(head: str, classes: int) -> None:
    best = pick(trials(head, classes), finished(TABLES["negatives"]))
    assert best is not None, "a size has rows once its trials have finished"
    assert (best.labels["scale"], best.labels["rate"]) == HEADS[head].tuned[classes]


def result(recall: float) -> dict[str, Any]:
    hits = pack_hits(np.stack([np.ones(100), np.arange(100) < 100 * recall]))
    return {"test": {"recall@1": recall}, "validation": {}, "hits": hits, "head_ms": 12.4}


def test_a_page_shows_the_differences_to_all_and_pictures_with_gaps() -> None:
    largest = SIZES[-1]
    names = {(row.labels["negatives"], row.labels["share"], row.labels["classes"]): row.name for row in ROWS}
    lines = {(names["nearest", 0.1, largest], seed): result(0.8) for seed in (0, 1)}
    lines |= {(names["all", 1.0, largest], seed): result(0.5 + 0.1 * seed) for seed in (0, 1)}
    made = negatives.show(TABLES["negatives"], lines)
    row = next(line for line in made.markdown.splitlines() if line.startswith("| nearest | 10 % |"))
    assert "| 80.00 ± 0.00 | +25.00 [" in row
    assert row.endswith("tie | 12 |")  # over seeds: 30 and 20 points
    assert next(line for line in made.markdown.splitlines() if line.startswith("| random | 1 % |")).endswith(
        "|  |  |  |"
    )
    assert "nearest: 10 % 80.00 ± 0.00, 100 % 55.00" in made.pictures["negatives_by_share.svg"]
    assert bool(made.pictures["negatives_by_classes.svg"]) == (len(SIZES) > 1)  # one size makes no curve
