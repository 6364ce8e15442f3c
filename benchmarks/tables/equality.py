"""Whether ranks, ZeRO stages and bf16 change what a training finds, beside what another seed changes.

Each row is the training of the first one (1 rank, ZeRO 0, float32) computed otherwise: the same images in the same
steps, so differences are paired by seed. Other ranks add up in another order, and within some tens of steps rounding
makes another training of that (docs/benchmarks/2026-11-29-elastic-resume.md): what can be asked of the end is that it
differs by no more than that of another seed.

The 23 runs take 15 minutes of a quiet core; rows of several ranks start as many processes of one thread.

Declined: rows that resume on another number of ranks, which benchmarks/elastic.py compares step by step.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.figures import Difference, Lines, Shown, count_seeds, difference, markdown, metric, values_of
from benchmarks.tables.table import SHORT, Row, Table

_STEPS_PER_EPOCH = 38  # of 64 images
_TRAINING = (
    *SHORT,
    "training.epochs=6",
    "backbone.options.width=8",
    f"schedule.warmup_steps={_STEPS_PER_EPOCH}",
    f"telemetry.log_every_steps={_STEPS_PER_EPOCH // 2}",
)
# Name, factor and unit of what is compared.
_NUMBERS: dict[str, tuple[float, Callable[[dict[str, Any]], float]]] = {
    "loss": (1.0, lambda line: float(line["loss"])),
    "Recall@1, points": (100.0, metric("recall@1")),
    "MAP@R, points": (100.0, metric("map@r")),
}


def _row(name: str, label: str, *overrides: str, ranks: int = 1, num_seeds: int = 3) -> Row:
    return Row(name, {"row": label}, (*_TRAINING, *overrides), seeds=range(num_seeds), ranks=ranks)


def _rows() -> list[Row]:
    zero = [
        _row(f"zero-{stage}", f"2 ranks, ZeRO {stage}", f"deepspeed.zero_optimization.stage={stage}", ranks=2)
        for stage in (1, 2, 3)
    ]
    return [
        _row("ranks-1", "1 rank, ZeRO 0, float32", num_seeds=5),
        _row("ranks-2", "2 ranks", ranks=2),
        _row("ranks-4", "4 ranks", ranks=4),
        *zero,
        _row("bf16", "bf16", "deepspeed.bf16.enabled=true"),
    ]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(table: Table, lines: Lines) -> Shown:
    """A line for each row: differences to the first one, which stands above them with its deviation over seeds."""
    base, *others = table.rows
    found = {name: values_of(base, lines, number) for name, (_, number) in _NUMBERS.items()}
    body = [
        [
            base.labels["row"],
            count_seeds(base, lines),
            *(_mean(found[n], factor) for n, (factor, _) in _NUMBERS.items()),
        ],
        ["**the same, seed to seed**", "", *(_deviation(found[n], factor) for n, (factor, _) in _NUMBERS.items())],
    ]
    for row in others:
        apart = [
            say(difference(values_of(row, lines, number), found[name]), factor)
            for name, (factor, number) in _NUMBERS.items()
        ]
        body.append([f"{row.labels['row']}, less the first", count_seeds(row, lines), *apart])
    return Shown(markdown(["row", "seeds", *_NUMBERS], body))


def say(found: Difference, factor: float) -> str:
    """A difference with two digits, however small, and its 95 % interval; empty without numbers."""
    if math.isnan(found.mean):
        return ""
    interval = "" if math.isinf(found.half_width) else f" ± {factor * found.half_width:.2g}"
    return ("0" if found.mean == 0 else f"{factor * found.mean:+.2g}") + interval


def _mean(values: dict[int, float], factor: float) -> str:
    return f"{factor * statistics.fmean(values.values()):.4g}" if values else ""


def _deviation(values: dict[int, float], factor: float) -> str:
    return f"± {factor * statistics.stdev(values.values()):.2g}" if len(values) > 1 else ""


TABLE = Table(
    "equality",
    "Do ranks, ZeRO stages and bf16 change what a training finds, beside what another seed changes?",
    "docs/results.md",
    _rows(),
    show,
)
