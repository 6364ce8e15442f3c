"""The tables of benchmarks/retrieval.py: each a question, the rows that answer it, and how docs/ shows them.

A new one is a function that lists its rows and an entry of TABLES; rows differ in whatever `--set` takes. Without
`show` its page gets a line for each row (figures.plain). The page has the two comments between which tables stand:

    <!-- table NAME -->
    <!-- end of table NAME -->

Settings of one table are as equal as its question allows: data, network, epochs, and the share of warm-up.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import figures


class Row(NamedTuple):
    """A setting of a table, trained with each seed."""

    name: str  # of its folder, so: letters, digits, points, hyphens, underscores
    labels: Mapping[str, Any]  # what it is, by column
    overrides: Sequence[str]
    config: str = "configs/demo_cpu.json"
    seeds: Sequence[int] = (0, 1, 2)


class Table(NamedTuple):
    """Rows, and what is shown of them."""

    name: str
    question: str
    page: str  # file of docs/
    rows: list[Row]
    show: Callable[["Table", Mapping[tuple[str, int], dict[str, Any]]], figures.Shown] = figures.plain


# What every row leaves out, so that its time is that of training, and the classes that settings are picked by.
SHORT = (
    "data.validation_classes=0.2",
    "evaluation.at_start=false",
    "evaluation.every_epochs=0",
    "evaluation.raw_pixels=false",
    "evaluation.kmeans_seeds=0",
    "telemetry.projector=false",
    "telemetry.progress_bar=false",
)


# ---- learning rates when the batch grows -----------------------------------------------------------------------------

BATCHES = (32, 64, 128, 512)
# Factors on the rates of backbone and proxies for a batch that is so many times as large.
RULES: dict[str, Callable[[float], tuple[float, float]]] = {
    "fixed": lambda times: (1.0, 1.0),
    "square root": lambda times: (math.sqrt(times), math.sqrt(times)),
    "linear": lambda times: (times, times),
    "square root, proxies fixed": lambda times: (math.sqrt(times), 1.0),
}
LEFT_OUT = ((64, "square root, proxies fixed"),)
UNTRIED = ((0.001, 0.08), (0.008, 0.01), (0.008, 0.02), (0.008, 0.08))  # corners, far from the best
TUNED = (0.004, 0.04)  # rates of backbone and proxies at batch 32: best on validation classes among those tried


def _learning_rate_rows() -> list[Row]:
    epochs, num_images = 12, 2375

    def row(name: str, batch: int, rates: tuple[float, float], labels: Mapping[str, Any], **more: Any) -> Row:
        steps_per_epoch = math.ceil(num_images / batch)
        overrides = [
            *SHORT,
            f"training.epochs={epochs}",
            f"training.batch_size={batch}",
            "backbone.options.width=8",
            f"schedule.warmup_steps={steps_per_epoch}",  # a twelfth of all
            f"telemetry.log_every_steps={steps_per_epoch}",
            f"optimizer.backbone_lr={rates[0]:.6g}",
            f"optimizer.proxies_lr={rates[1]:.6g}",
        ]
        return Row(name, labels, overrides, **more)

    rows = [
        row(f"tuning_backbone-{b}_proxies-{p}", 32, (b, p), {"data": "emoji", "backbone": b, "proxies": p}, seeds=(0,))
        for b, p in itertools.product((0.001, 0.002, 0.004, 0.008), (0.01, 0.02, 0.04, 0.08))
        if (b, p) not in UNTRIED
    ]
    rows.append(row("batch-32", 32, TUNED, {"data": "emoji", "batch": 32, "rule": "tuned"}))
    for batch in BATCHES[1:]:
        for rule, factors in RULES.items():
            if (batch, rule) in LEFT_OUT:
                continue
            backbone, proxies = factors(batch / BATCHES[0])
            name = f"batch-{batch}_{rule.replace(', ', '-').replace(' ', '-')}"
            rates = (TUNED[0] * backbone, TUNED[1] * proxies)
            rows.append(row(name, batch, rates, {"data": "emoji", "batch": batch, "rule": rule}))
    return rows


TABLES = {
    table.name: table
    for table in (
        Table(
            "learning_rates",
            "How do learning rates follow the batch size, at equal epochs?",
            "docs/learning_rates.md",
            _learning_rate_rows(),
            figures.learning_rates,
        ),
    )
}
