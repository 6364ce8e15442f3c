"""Where more proxies a class help: their number N and the share r that an image is compared with, on three data sets.

A class's score is a sum over its kept proxies, so that N multiplies the scale: s*N is kept at 16 where r changes, and
tried at 4 and 64 with the published r. So every N gets the same trials, with three seeds, and the best of them on
validation classes, which gets five, is the one that counts. With r = 1 nothing is left out, which is the head that
compares with all.

    emoji           one emoji a class, drawn by up to six artists
    joined emoji    four neighbours in Unicode a class (python -m benchmarks.joined_emoji): classes of several modes
    glyphs          1,000 characters of shards/glyphs (docs/glyphs.md), each by some 15 typefaces

Budget: 40 runs of about 17 s on emoji, 80 of 16 s on joined emoji and 40 of 30 s on glyphs (estimated for one quiet
core): 53 minutes.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.figures import (
    Lines,
    Shown,
    cell,
    curves,
    difference,
    markdown,
    metric,
    say_difference,
    say_finished,
    say_interval,
    say_seeds,
    spread_over_seeds,
    values_of,
)
from benchmarks.tables.parts import BATCH, CHEAP, EMOJI_IMAGES, warm_up
from benchmarks.tables.table import BARE, CHARACTERS, EMOJI, Row, Table, pick

RATIOS = (0.02, 0.05, 0.2, 1.0)
USUAL_RATIO, USUAL_TOTAL = 0.05, 16.0
TOTALS = (4.0, 16.0, 64.0)  # s*N
TRIALS = (*((ratio, USUAL_TOTAL) for ratio in RATIOS), *((USUAL_RATIO, t) for t in TOTALS if t != USUAL_TOTAL))
WEIGHT = 0.3  # lambda, as published
FOUR = 4  # proxies a class, which all three data sets have beside one
# By data set and N, the r and s*N that three seeds pick: these have five.
PICKED = {
    ("emoji", 1): (0.05, 16.0),
    ("emoji", 4): (0.05, 4.0),
    ("joined emoji", 1): (1.0, 16.0),
    ("joined emoji", 2): (0.2, 16.0),
    ("joined emoji", 4): (1.0, 16.0),
    ("joined emoji", 8): (0.2, 16.0),
    ("glyphs", 1): (1.0, 16.0),
    ("glyphs", 4): (1.0, 16.0),
}


class Data(NamedTuple):
    """A data set, with the settings that all its rows have."""

    config: str
    overrides: Sequence[str]
    per_class: Sequence[int]  # N


DATA = {
    "emoji": Data(EMOJI, (*CHEAP, *warm_up(EMOJI_IMAGES, BATCH)), (1, 4)),
    "joined emoji": Data(
        EMOJI,
        (*CHEAP, *warm_up(EMOJI_IMAGES, BATCH), "data.shards=shards/emoji_joined", "data.num_classes=139"),
        (1, 2, 4, 8),
    ),
    "glyphs": Data(
        CHARACTERS,
        (
            *BARE,
            *("data.train_classes=1000", "data.validation_classes=200", "data.num_workers=0"),
            *("training.epochs=2", "backbone.options.width=16", *warm_up(15_300, 128)),
            *("optimizer.backbone_lr=0.004", "optimizer.proxies_lr=0.02"),  # learning_rates.py, on characters
            "proxies.regularization_anchors=256",  # of up to 4,000 proxies
        ),
        (1, 4),
    ),
}


def _rows(data: str, of: Data) -> list[Row]:
    rows = []
    for per_class, (ratio, total) in itertools.product(of.per_class, TRIALS):
        chosen = ("proxies.ratio=null", "proxies.negatives=all") if ratio == 1 else (f"proxies.ratio={ratio:g}",)
        overrides = (
            *of.overrides,
            f"proxies.per_class={per_class}",
            f"proxies.scale={total / per_class:g}",
            f"proxies.regularization_weight={WEIGHT}",
            *chosen,
        )
        name = f"{data.replace(' ', '-')}_n-{per_class}_r-{ratio:g}_total-{total:g}"
        labels = {"data": data, "N": per_class, "r": ratio, "s*N": total}
        seeds = range(5 if PICKED[data, per_class] == (ratio, total) else 3)
        rows.append(Row(name, labels, overrides, of.config, seeds))
    return rows


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(table: Table, lines: Lines) -> Shown:
    """Of each data set begun: each N at what validation classes pick, against one proxy; Recall@1 over r; trials."""
    parts: list[str] = []
    pictures = {}
    for data in dict.fromkeys(row.labels["data"] for row in table.rows if (row.name, row.seeds[0]) in lines):
        rows = [row for row in table.rows if row.labels["data"] == data]
        trials: dict[int, list[Row]] = {}
        for row in rows:
            trials.setdefault(row.labels["N"], []).append(row)
        header = [f"N = {per_class}" for per_class in trials]
        over_ratio = {
            ratio: [row for row in rows if (row.labels["r"], row.labels["s*N"]) == (ratio, USUAL_TOTAL)]
            for ratio in RATIOS
        }  # in the order of N
        recall = metric("recall@1")
        parts += [
            f"**{data}: Recall@1 of test classes**, each N at the r and scale that its validation classes pick",
            _picked(trials, lines),
            f"**{data}: Recall@1 of test classes** at each r and s·N",
            _by_setting(trials, lines, recall, apart=True),
            f"**{data}: MAP@R of validation classes**, of which the best of each N is picked",
            _by_setting(trials, lines, metric("map@r", on="validation")),
        ]
        pictures[f"{table.name}_{data.replace(' ', '_')}.svg"] = curves(
            "Recall@1 of unseen classes, percent",
            f"{data}, s·N = {USUAL_TOTAL:g}; {say_seeds(rows, lines)}",
            [f"{ratio:g}" for ratio in RATIOS],
            {
                name: [spread_over_seeds(row, lines, recall) for row in of_number]
                for name, of_number in zip(header, zip(*over_ratio.values(), strict=True), strict=True)
            },
            x_label="share r of the proxies that an image is compared with",
        )
    return Shown("\n\n".join(parts), pictures)


def _picked(trials: dict[int, list[Row]], lines: Lines) -> str:
    """Each N at what its validation classes pick, and above one proxy."""
    on_test = metric("recall@1")
    single = pick(trials[min(trials)], lines)
    body = []
    for per_class, rows in trials.items():
        row = pick(rows, lines)
        said = [str(per_class), say_finished(rows, lines)]
        if row is None:
            body.append([*said, "", "", "unfinished", "", "", ""])
            continue
        values = values_of(row, lines, on_test)
        apart = ["", ""]
        if single is not None and row is not single:
            by_seed = difference(values, values_of(single, lines, on_test))
            apart = [say_difference(by_seed), say_interval(row, single, lines)]
        chosen = [f"{row.labels['r']:g}", f"{row.labels['s*N']:g}"]
        body.append([*said, *chosen, cell(values), cell(values_of(row, lines, metric("map@r"))), *apart])
    header = ["N", "runs", "r", "s·N", "Recall@1", "MAP@R", "difference to N = 1 by seed", "by class"]
    return markdown(header, body)


def _by_setting(
    trials: dict[int, list[Row]], lines: Lines, number: Callable[[dict[str, Any]], float], *, apart: bool = False
) -> str:
    """A line for each trial, a column for each N, and of Recall@1 one for what four proxies differ by from one."""
    body = []
    for rows in zip(*trials.values(), strict=True):  # the same trial of each N
        of_number = dict(zip(trials, rows, strict=True))
        labels = rows[0].labels
        numbers = [cell(values_of(row, lines, number)) for row in rows]
        said = [say_interval(of_number[FOUR], of_number[1], lines)] if apart else []
        body.append([f"{labels['r']:g}", f"{labels['s*N']:g}", *numbers, *said])
    more = [f"N = {FOUR} less N = 1"] if apart else []
    return markdown(["r", "s·N", *(f"N = {per_class}" for per_class in trials), *more], body)


TABLE = Table(
    "fewer_proxies",
    "Where do more proxies a class help?",
    "docs/results.md",
    [row for data, of in DATA.items() for row in _rows(data, of)],
    show,
)
