"""Exact and random negatives: settings are those that validation classes pick, and unfinished rows leave gaps."""

from typing import Any

import numpy as np
import pytest

from benchmarks.figures import pack_hits
from benchmarks.retrieval import finished
from benchmarks.tables import TABLES, negatives
from benchmarks.tables.negatives import HEADS, ROWS, picked


@pytest.mark.parametrize("head", HEADS)
def test_scale_and_rate_are_those_that_validation_classes_pick(head: str) -> None:
    assert picked(head, finished(TABLES["negatives"])) in (HEADS[head].tuned, None)  # None: some are not finished


def result(recall: float) -> dict[str, Any]:
    hits = pack_hits(np.stack([np.ones(100), np.arange(100) < 100 * recall]))
    return {"test": {"recall@1": recall}, "validation": {}, "hits": hits, "head_ms": 12.4}


def test_a_page_shows_the_differences_to_all_and_pictures_with_gaps() -> None:
    names = {(row.labels["negatives"], row.labels["share"], row.labels["classes"]): row.name for row in ROWS}
    lines = {(names["nearest", 0.1, 20000], seed): result(0.8) for seed in (0, 1)}
    lines |= {(names["all", 1.0, 20000], seed): result(0.5 + 0.1 * seed) for seed in (0, 1)}
    lines |= {(names["nearest", 0.1, 1000], 0): result(0.25)}
    made = negatives.show(TABLES["negatives"], lines)
    row = next(line for line in made.markdown.splitlines() if line.startswith("| nearest | 10 % |"))
    assert row.startswith("| nearest | 10 % | 25.00 ± n/a |  |  | 80.00 ± 0.00 | +25.00 [")
    assert row.endswith("tie | 12 |")  # over seeds: 30 and 20 points
    assert "| random | 1 % |  |  |  |  |  |  |" in made.markdown
    assert (
        "nearest 10 %: 1,000 25.00 ± n/a, 20,000 80.00 ± 0.00; all: 20,000 55.00"
        in made.pictures["negatives_by_classes.svg"]
    )
    assert "nearest: 10 % 80.00 ± 0.00, 100 % 55.00" in made.pictures["negatives_by_share.svg"]
