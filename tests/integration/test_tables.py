"""A row of each table of results trains for two steps as it is declared, and its numbers get to the page."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pytest

from benchmarks import retrieval
from benchmarks.figures import unpack_hits
from benchmarks.tables import TABLES
from benchmarks.tables.table import CHARACTERS
from dist_proxygml.shard import main

pytestmark = pytest.mark.ci

FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
TWO_STEPS = ("training.max_steps=2", "schedule.warmup_steps=1", "telemetry.log_every_steps=1")


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
    everywhere = {(run.row.name, run.seed): line for run in retrieval.runs_of(TABLES[name], tmp_path)}
    cells = {word for row in TABLES[name].show(TABLES[name], everywhere).markdown.split("|") for word in row.split()}
    queries_C, hits_C = unpack_hits(line["hits"])
    halves = [hits_C[start::2].sum() / queries_C[start::2].sum() for start in (0, 1)]  # which a table may show instead
    numbers = [100 * line[split][metric] for split in ("test", "validation") for metric in line[split]]
    numbers += [100 * recall for recall in halves]
    assert cells & {text for number in numbers for text in (f"{number:.2f}", f"{number:.4g}")}
