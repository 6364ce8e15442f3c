"""Exact against random negatives as the number of classes grows.

Characters (docs/glyphs.md) of which 1,000 to 20,000 train, the same number of steps for each, and the same test: one
picture of each of 22,000 other characters is searched for among those of another typeface. A head compares each image
with the nearest share of all proxies, with as large a share of the classes drawn at random, or with all.

Scale and learning rate of the proxies are tuned for each head and number of classes, by MAP@R of 500 classes that are
neither trained nor tested, four trials each: what is best with 3,000 classes fails with 20,000 (docs/log.md). Which
classes train depends on the seed, so seeds differ by them, too. Sizes are added as their trials finish.

Budget: a run takes 1 (1,000 classes) to 4 minutes (20,000) of one core; the trials of a size as long as a seed of it,
in all eight hours.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.figures import (
    Lines,
    Shown,
    cell,
    curves,
    markdown,
    metric,
    say_interval,
    say_seeds,
    spread_over_seeds,
    values_of,
)
from benchmarks.tables.table import BARE, Row, Table
from dist_proxygml.cluster.grid import Spread

NUM_STEPS = 1000
SIZES = (3000,)
TRIED = tuple(itertools.product((4, 16), (0.003, 0.01)))  # scale, learning rate of the proxies


class Head(NamedTuple):
    """Which proxies an image is compared with, at which shares, and what was tuned."""

    label: str
    overrides: str  # with the share in it
    shares: tuple[float, ...]
    tuning_share: float
    tuned: Mapping[int, tuple[float, float]]  # by number of classes, the best of TRIED on validation classes


HEADS = {
    "topk": Head("nearest", "proxies.ratio={share:g}", (0.01, 0.025, 0.05, 0.1, 0.2, 0.5), 0.1, {3000: (4, 0.01)}),
    "sampled": Head(
        "random",
        "proxies.ratio=null proxies.negatives=sampled proxies.share={share:g}",
        (0.01, 0.1, 0.25, 0.5),
        0.1,
        {3000: (4, 0.01)},
    ),
    "all": Head("all", "proxies.ratio=null proxies.negatives=all", (1.0,), 1.0, {3000: (16, 0.01)}),
}


def _row(name: str, classes: int, share: float, tried: tuple[float, float], **more: Any) -> Row:
    """A row of one head; more is what Row takes, and `held_out`, a number of validation classes."""
    head, (scale, rate) = HEADS[name], tried
    held_out = more.pop("held_out", None)
    label = f"{name}-{share:g}" if name != "all" else name
    overrides = [
        *BARE,
        *head.overrides.format(share=share).split(),
        f"data.train_classes={classes}",
        "data.num_workers=0",
        "backbone.options.width=16",
        f"proxies.scale={scale}",
        f"optimizer.proxies_lr={rate}",
        "training.epochs=100",  # of which max_steps leaves a part
        f"training.max_steps={NUM_STEPS}",
        "telemetry.log_every_steps=50",
    ]
    labels: dict[str, Any] = {"classes": classes, "negatives": head.label, "share": share}
    place = f"{classes}_{label}"
    if held_out:
        overrides.append(f"data.validation_classes={held_out}")
        labels |= {"scale": scale, "rate": rate}
        place = f"tuning_{place}_scale-{scale}_rate-{rate}"
    return Row(place, labels, overrides, "configs/glyphs_cpu.json", **more)


def trials(name: str, classes: int) -> list[Row]:
    """What is tried of a head."""
    share = HEADS[name].tuning_share
    return [_row(name, classes, share, tried, seeds=(0,), held_out=500) for tried in TRIED]


ROWS = [
    _row(name, classes, share, head.tuned[classes])
    for classes in SIZES
    for name, head in HEADS.items()
    for share in head.shares
]


def show(table: Table, lines: Lines) -> Shown:
    """The tuning; Recall@1 by head, share and number of classes, with what a step costs; and two pictures."""
    rows = {(row.labels["negatives"], row.labels["share"], row.labels["classes"]): row for row in ROWS}
    recall = metric("recall@1")

    def spread_of(negatives: str, share: float, classes: int) -> Spread | None:
        row = rows.get((negatives if share < 1 else "all", share, classes))
        return None if row is None else spread_over_seeds(row, lines, recall)

    # 1. Tables.
    tried = [f"scale {scale}, rate {rate}" for scale, rate in TRIED]
    on_validation = metric("map@r", on="validation")
    tuning = [
        [f"{classes:,}", head.label, *(cell(values_of(row, lines, on_validation)) for row in trials(name, classes))]
        for classes in SIZES
        for name, head in HEADS.items()
    ]
    largest = SIZES[-1]
    body = []
    for negatives, share in dict.fromkeys((negatives, share) for negatives, share, _ in rows):
        of_size = [rows[negatives, share, classes] for classes in SIZES]
        above = "" if negatives == "all" else say_interval(of_size[-1], rows["all", 1.0, largest], lines)
        taken = values_of(of_size[-1], lines, lambda line: line["head_ms"])
        body.append(
            [
                *(negatives, f"{100 * share:g} %"),
                *(cell(values_of(row, lines, recall)) for row in of_size),
                *(above, f"{min(taken.values()):.0f}" if taken else ""),
            ]
        )
    header = ["negatives", "share", *(f"{classes:,} classes" for classes in SIZES), "above all", "head, ms"]

    # 2. Pictures.
    shares = sorted({share for _, share, _ in rows})
    said = say_seeds(ROWS, lines)
    pictures = {
        "negatives_by_classes.svg": curves(
            "Recall@1 of unseen characters, percent",
            f"as classes grow, at equal steps; {said}",
            [f"{classes:,}" for classes in SIZES],
            {
                name: [spread_of(negatives, share, classes) for classes in SIZES]
                for name, negatives, share in (
                    ("nearest 10 %", "nearest", 0.1),
                    ("all", "all", 1),
                    ("random 10 %", "random", 0.1),
                )
            },
            x_label="classes that train",
        ),
        "negatives_by_share.svg": curves(
            f"Recall@1 of unseen characters, percent, with {largest:,} classes",
            f"by the share of all proxies that an image is compared with; {said}",
            [f"{100 * share:g} %" for share in shares],
            {
                negatives: [spread_of(negatives, share, largest) for share in shares]
                for negatives in ("nearest", "random")
            },
            x_label="share of all proxies",
        ),
    }
    parts = (
        "**The trials**: MAP@R of validation classes",
        markdown(["classes", "negatives", *tried], tuning),
        f"**Recall@1 of unseen characters**; above all, and milliseconds of a step's head, with {largest:,} classes",
        markdown(header, body),
    )
    return Shown("\n\n".join(parts), pictures)


TABLE = Table(
    "negatives",
    "Do exact negatives beat random ones, and all, as classes grow?",
    "docs/results.md",
    [*(row for classes in SIZES for name in HEADS for row in trials(name, classes)), *ROWS],
    show,
)
