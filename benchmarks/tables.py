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

SMALLEST = 32  # batch, of which rates are tuned
# Factors on the rates of backbone and proxies for a batch that is so many times as large.
RULES: dict[str, Callable[[float], tuple[float, float]]] = {
    "fixed": lambda times: (1.0, 1.0),
    "square root": lambda times: (math.sqrt(times), math.sqrt(times)),
    "linear": lambda times: (times, times),
    "square root, proxies fixed": lambda times: (math.sqrt(times), 1.0),
}
SCALED_ALIKE = ("fixed", "square root", "linear")  # those with one factor for both


class Grown(NamedTuple):
    """A data set, the rates of its smallest batch, and the rules that its larger batches follow."""

    config: str
    overrides: Sequence[str]
    num_images: int  # that train, about: which classes are held out depends on the seed
    tried: Sequence[tuple[float, float]]  # rates of backbone and proxies, with seed 0
    tuned: tuple[float, float]  # the best of them on validation classes
    rules: Mapping[int, Sequence[str]]  # by batch
    prefix: str = ""  # of its rows' names


GROWN = {
    "emoji": Grown(
        "configs/demo_cpu.json",
        (),
        2375,
        [
            *itertools.product((0.001, 0.002, 0.004), (0.01, 0.02, 0.04)),
            *((0.002, 0.08), (0.004, 0.08), (0.008, 0.04)),
        ],
        (0.004, 0.04),
        {64: SCALED_ALIKE, 128: tuple(RULES), 256: SCALED_ALIKE, 512: tuple(RULES), 1024: SCALED_ALIKE},
    ),
    "glyphs": Grown(
        "configs/glyphs_cpu.json",
        ("data.shards=shards/glyphs_small", "data.num_workers=0"),
        1610,
        [
            *itertools.product((0.002, 0.004, 0.008), (0.01, 0.02)),
            *((0.004, 0.005), (0.004, 0.04)),
        ],
        (0.004, 0.02),
        dict.fromkeys((64, 128, 256, 512, 1024), SCALED_ALIKE),
        prefix="glyphs_",
    ),
}


def _learning_rate_rows(data: str, grown: Grown) -> list[Row]:
    epochs = 12

    def row(name: str, batch: int, rates: tuple[float, float], labels: Mapping[str, Any], **more: Any) -> Row:
        steps_per_epoch = math.ceil(grown.num_images / batch)
        overrides = [
            *SHORT,
            *grown.overrides,
            f"training.epochs={epochs}",
            f"training.batch_size={batch}",
            "backbone.options.width=8",
            f"schedule.warmup_steps={steps_per_epoch}",  # a twelfth of all
            f"telemetry.log_every_steps={steps_per_epoch}",
            f"optimizer.backbone_lr={rates[0]:.6g}",
            f"optimizer.proxies_lr={rates[1]:.6g}",
        ]
        return Row(grown.prefix + name, {"data": data, **labels}, overrides, grown.config, **more)

    rows = [
        row(f"tuning_backbone-{b}_proxies-{p}", SMALLEST, (b, p), {"backbone": b, "proxies": p}, seeds=(0,))
        for b, p in grown.tried
    ]
    rows.append(row(f"batch-{SMALLEST}", SMALLEST, grown.tuned, {"batch": SMALLEST, "rule": "tuned"}))
    for batch, rules in grown.rules.items():
        for rule in rules:
            backbone, proxies = RULES[rule](batch / SMALLEST)
            name = f"batch-{batch}_{rule.replace(', ', '-').replace(' ', '-')}"
            rates = (grown.tuned[0] * backbone, grown.tuned[1] * proxies)
            rows.append(row(name, batch, rates, {"batch": batch, "rule": rule}))
    return rows


TABLES = {
    table.name: table
    for table in (
        Table(
            "learning_rates",
            "How do learning rates follow the batch size, at equal epochs?",
            "docs/learning_rates.md",
            [row for data, grown in GROWN.items() for row in _learning_rate_rows(data, grown)],
            figures.learning_rates,
        ),
    )
}
