"""What a table of retrieval results is made of: rows, each a configuration with overrides, and how docs/ shows them.

Rows differ in whatever `--set` takes. Settings of one table are as equal as its question allows: data, network, budget,
and the share of warm-up. Without `show` its page gets a line for each row. The page has the two comments between which
tables stand:

    <!-- table NAME -->
    <!-- end of table NAME -->
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import figures

# What trains on emoji, and on characters: the recipes (configs/) have moved on with what the tables found.
EMOJI, CHARACTERS = "benchmarks/tables/emoji.json", "benchmarks/tables/characters.json"


class Row(NamedTuple):
    """A setting of a table, trained with each seed."""

    name: str  # of its folder, so: letters, digits, points, hyphens, underscores
    labels: Mapping[str, Any]  # what it is, by column
    overrides: Sequence[str]  # {seed} in them is the seed
    config: str = EMOJI
    seeds: Sequence[int] = (0, 1, 2)
    ranks: int = 1
    imports: Sequence[str] = ()  # modules that the run needs before it starts, such as one that registers a loss


class Table(NamedTuple):
    """Rows, and what is shown of them."""

    name: str
    question: str
    page: str  # file of docs/
    rows: list[Row]
    show: Callable[["Table", Mapping[tuple[str, int], dict[str, Any]]], figures.Shown] = figures.plain


# What every row leaves out, so that its time is that of training.
BARE = (
    "evaluation.at_start=false",
    "evaluation.every_epochs=0",
    "evaluation.raw_pixels=false",
    "evaluation.kmeans_seeds=0",
    "telemetry.projector=false",
    "telemetry.progress_bar=false",
)
TUNING = "data.validation_classes=0.2"  # classes that are neither trained nor tested
SHORT = (TUNING, *BARE)


def pick(rows: Sequence[Row], lines: figures.Lines) -> Row | None:
    """The row with the highest MAP@R on validation classes, averaged over the seeds that all rows have, since they
    differ in the classes they hold out; None before there is one.
    """
    found = [figures.values_of(row, lines, figures.metric("map@r", on="validation")) for row in rows]
    seeds = set.intersection(*(set(values) for values in found))
    if not seeds:
        return None
    means = [statistics.fmean(values[seed] for seed in sorted(seeds)) for values in found]
    return rows[means.index(max(means))]
