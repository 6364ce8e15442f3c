"""Parts of the loss: what is picked, by what, and what a row compares."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.figures import Lines, pack_hits
from benchmarks.retrieval import Run
from benchmarks.tables import TABLES, parts
from benchmarks.tables.parts import ALL


def result(validation: float, test: float) -> dict[str, Any]:
    queries_C = np.full(10, 10)
    hits = pack_hits(np.stack([queries_C, np.full(10, round(10 * test))]))
    return {"validation": {"map@r": validation}, "test": {"recall@1": test, "map@r": test / 2}, "hits": hits}


def shown_row(markdown: str, start: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines()[:13] if line.startswith(start)]
    return [text.strip() for text in line.strip("|").split("|")]


def test_a_scale_is_picked_by_validation_classes_alone_and_what_is_missing_is_called_unfinished() -> None:
    table = TABLES["parts"]
    name = {on: f"{parts.name_of(on)}_scale-" for on in parts.SETTINGS}
    lines: Lines = {
        **{(name[ALL] + "1", seed): result(0.3, 0.9) for seed in range(5)},
        **{(name[ALL] + "4", seed): result(0.4, 0.4 + 0.1 * seed) for seed in range(5)},
        **{(name[ALL] + "16", seed): result(0.2, 0.9) for seed in range(5)},
        **{(name[True, True, False] + "16", seed): result(0.2, 0.2 + 0.1 * seed) for seed in range(2)},
        **{(name[True, True, False] + scale, 0): result(0.1, 0.9) for scale in "14"},
        **{(name[False, True, True] + scale, 0): result(0.1, 0.25) for scale in ("1", "4", "16")},
        ("product_scale-4", 0): result(0.1, 0.6),  # at the scale of all parts, whatever its own trials say
        (name[False, False, False] + "1", 0): result(0.9, 0.9),  # nothing is picked before all trials are there
    }
    made = parts.show(table, lines)
    assert shown_row(made.markdown, "| yes | yes | yes |")[3:] == [
        "15",
        "4",
        "60.00 ± 15.81",
        "30.00 ± 7.91",
        "",
        "",
        "85.5",
    ]
    product = shown_row(made.markdown, "| yes (the product's head)")
    assert product[3:6] == ["1 of 3, unfinished", "4", "60.00 ± n/a"]
    assert product[7:9] == ["+20.00, one seed", "+20.00 [+20.00, +20.00], one seed"]
    without = shown_row(made.markdown, "| yes | yes |  |")
    assert without[3:6] == ["4 of 15, unfinished", "16", "25.00 ± 7.07"]
    assert without[7:] == ["-20.00 ± 0.00", "-20.00 [-20.00, -20.00]", "84.0"]
    assert shown_row(made.markdown, "|  |  |  |")[3:6] == ["1 of 15, unfinished", "", "unfinished"]
    assert "| yes | yes | yes | 30.00 ± 0.00 | 40.00 ± 0.00 | 20.00 ± 0.00 |" in made.markdown
    spoken = str(ElementTree.fromstring(made.pictures["parts.svg"]).get("aria-label"))
    assert (
        "with regulariser: masked softmax 25.00 ± n/a, both 60.00 ± 15.81; without regulariser: both 25.00 ± 7.07"
        in spoken
    )


@pytest.mark.parametrize("seed", [0, 2])
def test_rows_with_all_parts_have_the_settings_of_the_head_of_the_product(seed: int) -> None:
    rows = TABLES["parts"].rows
    for product, ablated in zip(
        parts.trials_of(rows, "product", ALL), parts.trials_of(rows, "ablated", ALL), strict=True
    ):
        ours, theirs = (Run(TABLES["parts"], row, seed, Path()).config for row in (ablated, product))
        assert ours.loss is not None
        options = ours.loss.options
        assert (options.pop("forced_positives"), options.pop("masked_softmax")) == (True, True)
        assert options.pop("proxies_per_class") == theirs.proxies.per_class
        assert options.pop("seed") == theirs.seed == seed
        assert options == {name: getattr(theirs.proxies, name) for name in options}
        assert ours.model_dump(exclude={"name", "loss", "proxies"}) == theirs.model_dump(
            exclude={"name", "loss", "proxies"}
        )
    command = Run(TABLES["parts"], parts.trials_of(rows, "ablated", ALL)[0], seed, Path()).command
    assert command[:2] == ["python", "-c"]
    assert "benchmarks.ablated_loss" in command[2]
