"""Fewer proxies: what is picked, by what, and that every number of proxies gets the same trials."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Lines, pack_hits
from benchmarks.retrieval import Run, finished
from benchmarks.tables import TABLES, fewer_proxies
from benchmarks.tables.fewer_proxies import TRIALS
from benchmarks.tables.table import pick
from dist_proxygml.head.selection import num_kept_proxies


def result(validation: float, test: float) -> dict[str, Any]:
    hits = pack_hits(np.array([[10] * 10, [round(10 * test)] * 10]))
    return {"validation": {"map@r": validation}, "test": {"recall@1": test, "map@r": test / 2}, "hits": hits}


def test_the_trial_of_each_number_of_proxies_is_picked_by_validation_classes_alone() -> None:
    lines: Lines = {
        **{(f"joined-emoji_n-{n}_r-{r:g}_total-{t:g}", 0): result(0.1, 0.9) for n in (1, 4) for r, t in TRIALS},
        **{("joined-emoji_n-1_r-0.05_total-16", seed): result(0.3, 0.5) for seed in range(3)},
        **{("joined-emoji_n-1_r-0.02_total-16", seed): result(0.2, 0.9) for seed in range(3)},
        **{("joined-emoji_n-4_r-0.05_total-64", seed): result(0.4, 0.6 + 0.1 * seed) for seed in range(3)},
        **{("joined-emoji_n-4_r-0.2_total-16", 0): result(0.3, 1.0)},
        # Seeds that other trials lack, with classes that are found more easily, pick nothing.
        **{("joined-emoji_n-1_r-1_total-16", seed): result(0.9, 0.9) for seed in (3, 4)},
    }
    made = fewer_proxies.show(TABLES["fewer_proxies"], lines)
    assert "| 1 | 12 of 20, unfinished | 0.05 | 16 | 50.00 ± 0.00 | 25.00 ± 0.00 |  |  |" in made.markdown
    apart = "+20.00 ± 24.84, tie | +20.00 [+20.00, +20.00], tie"
    assert f"| 4 | 8 of 20, unfinished | 0.05 | 64 | 70.00 ± 10.00 | 35.00 ± 5.00 | {apart} |" in made.markdown
    assert "| 8 | 0 of 20, unfinished |  |  | unfinished |  |  |  |" in made.markdown
    of_one = "+10.00 [+10.00, +10.00], one seed"
    assert f"| 0.2 | 16 | 90.00 ± n/a |  | 100.00 ± n/a |  | {of_one} |" in made.markdown
    assert "| 0.05 | 64 | 10.00 ± n/a |  | 40.00 ± 0.00 |  |" in made.markdown
    spoken = str(ElementTree.fromstring(made.pictures["fewer_proxies_joined_emoji.svg"]).get("aria-label"))
    assert "N = 1: 0.02 90.00 ± 0.00, 0.05 50.00 ± 0.00, 0.2 90.00" in spoken


def test_every_number_of_proxies_gets_the_same_trials_and_keeps_negatives() -> None:
    table = TABLES["fewer_proxies"]
    for data, of in fewer_proxies.DATA.items():
        trials: dict[int, list[tuple[float, float]]] = {}
        for row in table.rows:
            if row.labels["data"] != data:
                continue
            trials.setdefault(row.labels["N"], []).append((row.labels["r"], row.labels["s*N"]))
            proxies = Run(table, row, 0, Path()).config.proxies
            assert proxies.scale * proxies.per_class == row.labels["s*N"]
            assert proxies.per_class == row.labels["N"]
            if proxies.negatives == "topk":
                num_classes = {"emoji": 439, "joined emoji": 111, "glyphs": 1000}[data]
                assert proxies.ratio == row.labels["r"]
                assert num_kept_proxies(num_classes, proxies.per_class, proxies.ratio or 0) > 2 * proxies.per_class
            else:
                assert row.labels["r"] == 1.0
        assert set(trials) == set(of.per_class)
        assert all(found == list(TRIALS) for found in trials.values())


def test_five_seeds_have_what_three_pick() -> None:
    table = TABLES["fewer_proxies"]
    lines = finished(table)
    for (data, number), picked in fewer_proxies.PICKED.items():
        best = pick([row for row in table.rows if (row.labels["data"], row.labels["N"]) == (data, number)], lines)
        assert best is not None
        assert (best.labels["r"], best.labels["s*N"]) == picked
        assert len(best.seeds) == 5
