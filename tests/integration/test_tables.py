"""A row of each table of results trains for two steps as it is declared, and its numbers stand where the page names
them. A new table needs an entry of SHOWN.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest

from benchmarks import retrieval
from benchmarks.figures import pack_hits, unpack_hits
from benchmarks.retrieval import Line
from benchmarks.tables import TABLES
from benchmarks.tables.table import CHARACTERS
from dist_proxygml.shard import main

pytestmark = pytest.mark.ci

FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
TWO_STEPS = ("training.max_steps=2", "schedule.warmup_steps=1", "telemetry.log_every_steps=1")


class Place(NamedTuple):
    """Where a page shows the last row of a table, and what."""

    title: str  # above the table, or a part of that
    row: str  # the beginning of its line
    columns: dict[str, Callable[[Line], str]]  # by their headers


def mean(metric: str) -> Callable[[Line], str]:
    return lambda line: f"{100 * line['test'][metric]:.2f} ± n/a"


def recall_of_other_half(line: Line) -> str:
    """Every other character is for trials, from the first one on."""
    queries, hits = unpack_hits(line["hits"])[:, 1::2].sum(axis=1)
    return f"{100 * hits / queries:.2f} ± n/a"


def above_nothing(metric: str) -> Callable[[Line], str]:
    """Less the first row, which finds nothing here."""
    return lambda line: f"{100 * line['test'][metric]:+.2g}"


BOTH = {"Recall@1": mean("recall@1"), "MAP@R": mean("map@r")}
SHOWN = {
    "learning_rates": Place("glyphs: Recall@1 of test classes**", "| 1024 |", {"linear": mean("recall@1")}),
    "methods": Place("pretrained network: Recall@1 and MAP@R of test classes", "| multi-similarity |", BOTH),
    "negatives": Place(
        "by the number of steps", "| multi-similarity | 100 % | 4,500 |", {"Recall@1": recall_of_other_half}
    ),
    "parts": Place("Recall@1 of test classes", "|  |  |  |", BOTH),
    "fewer_proxies": Place("glyphs: Recall@1 of test classes** at each", "| 0.05 | 64 |", {"N = 4": mean("recall@1")}),
    "equality": Place(
        "", "| bf16, ", {"Recall@1, points": above_nothing("recall@1"), "MAP@R, points": above_nothing("map@r")}
    ),
    "recipes": Place("Test classes", "| `emoji_cpu` |", BOTH),
}


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the characters of four fonts: 595 train."""
    shards = tmp_path_factory.mktemp("shards") / "glyphs"
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [str(fonts / f"{name}.ttf") for name in FONTS]
    assert main(["build", "glyphs", "--fonts", *files, "--min-images", "3", "--out", str(shards)]) == 0
    return shards


def made_small(overrides: Sequence[str], shards: Path) -> tuple[str, ...]:
    """Settings that ask for as few characters as there are."""
    few = {"data.train_classes": "200", "data.validation_classes": "100", "data.shards": str(shards)}
    return tuple(f"{key}={few[key]}" for key in few if key == "data.shards" or any(key in text for text in overrides))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TABLES)
def test_the_last_row_of_a_table_trains_and_its_numbers_are_shown(name: str, characters: Path, tmp_path: Path) -> None:
    row = TABLES[name].rows[-1]
    small = made_small(row.overrides, characters) if row.config == CHARACTERS else ()
    row = row._replace(overrides=(*row.overrides, *small, *TWO_STEPS), seeds=row.seeds[:1])
    table = TABLES[name]._replace(rows=[row])
    assert retrieval.make([table], runs=tmp_path / "runs", results=tmp_path)
    (line,) = retrieval.finished(table, tmp_path).values()
    assert line["steps"] == 2
    assert math.isfinite(line["loss"])
    others = {
        (run.row.name, run.seed): nothing_found(line)
        for run in retrieval.runs_of(TABLES[name], tmp_path)
        if run.row.name != row.name
    }
    made = TABLES[name].show(TABLES[name], others | {(row.name, line["seed"]): line})
    shown = row_of(made.markdown, SHOWN[name])
    expected = {header: number(line) for header, number in SHOWN[name].columns.items()}
    assert {header: shown[header] for header in expected} == expected


def nothing_found(line: Line) -> Line:
    """What another row has, so that this one is the best on validation classes, and its numbers are nowhere else."""
    queries_C, hits_C = unpack_hits(line["hits"])
    zeros = {split: dict.fromkeys(line[split], 0.0) for split in ("test", "validation")}
    return line | zeros | {"hits": pack_hits(np.stack([queries_C, 0 * hits_C]))}


def row_of(markdown: str, place: Place) -> dict[str, str]:
    """The cells of a row by their columns."""
    below = markdown[markdown.index(place.title) :].split("\n\n")
    header, _, *rows = next(part for part in below if part.startswith("|")).splitlines()
    (row,) = (row for row in rows if row.startswith(place.row))
    columns, cells = ([text.strip() for text in line.strip("|").split("|")] for line in (header, row))
    return dict(zip(columns, cells, strict=True))
