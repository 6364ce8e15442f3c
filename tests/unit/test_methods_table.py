"""Methods: what was picked is the best trial on validation classes, and differences to ProxyGML say when they tie."""

from typing import Any

import numpy as np
import pytest

from benchmarks.figures import pack_hits
from benchmarks.retrieval import finished
from benchmarks.tables import TABLES, methods
from benchmarks.tables.methods import DATA, METHODS, finals, trials
from benchmarks.tables.table import pick
from dist_proxygml.training import presets


@pytest.mark.parametrize("data", DATA)
def test_what_is_tested_is_the_best_trial_on_validation_classes(data: str) -> None:
    lines = finished(TABLES["methods"])
    for method, number in DATA[data].picked.items():
        best = pick(trials(data, method), lines)
        assert best is not None, f"{method} has unfinished trials"
        assert best.labels["trial"] == number, method
        first = pick(trials(data, method)[:4], lines)
        assert first is not None
        assert first.labels["trial"] == DATA[data].first[method], method


def test_first_configurations_have_the_scale_that_the_trials_pick() -> None:
    for data in DATA:
        picked = trials(data, "ProxyGML")[DATA[data].picked["ProxyGML"]]
        assert f"proxies.scale={presets.SCALE:g}" in picked.overrides, data


def test_a_method_has_six_trials_or_with_a_margin_eight_and_no_two_are_the_same() -> None:
    for data in DATA:
        rows = [row for method in METHODS for row in trials(data, method)]
        assert len({tuple(sorted(row.overrides)) for row in rows}) == len(rows)
        assert len(rows) == 6 * 6 + 3 * 8
        assert all("data.validation_classes=0.2" in row.overrides for row in rows)
        assert not any("validation" in text for row in finals(data).values() for text in row.overrides)


def result(hits: list[int], **more: Any) -> dict[str, Any]:
    recall = sum(hits) / (4 * len(hits))
    numbers = {"recall@1": recall, "map@r": recall / 2}
    packed = pack_hits(np.stack([np.full(len(hits), 4), hits]))
    curve = {str(step): recall * step / 60 for step in range(10, 70, 10)}
    return {"test": numbers, "validation": {}, "hits": packed, "curve": curve, "head_ms": 2.0, "memory_mib": 1500}


def test_a_page_shows_differences_to_proxygml_and_rows_that_are_not_finished() -> None:
    rows = {method: row.name for method, row in finals("emoji").items()}
    lines = {(rows["ProxyGML"], seed): result([2, 3, 2, 1]) for seed in (0, 1)}
    lines |= {(rows["CosFace"], seed): result([3, 4, 3, 2]) for seed in (0, 1)}
    lines |= {(rows["ArcFace"], seed): result([4, 1, 2 + seed, 1]) for seed in (0, 1)}
    made = methods.show(TABLES["methods"], lines)
    assert "| ProxyGML | 2 | 50.00 ± 0.00 |  | 25.00 ± 0.00 | 2.0 | 1,500 |" in made.markdown
    assert "| CosFace | 2 | 75.00 ± 0.00 | +25.00 [+25.00, +25.00] |" in made.markdown
    assert "| ArcFace | 2 | 53.12 ± 4.42 | +3.12 [-34.38, +37.50], tie |" in made.markdown
    assert "| SoftTriple | 0 |  |  |  |  |  |" in made.markdown
    assert "CosFace: 4 12.50 ± 0.00, 8 25.00 ± 0.00" in made.pictures["methods_emoji.svg"]
