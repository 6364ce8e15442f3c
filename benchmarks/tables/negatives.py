"""Exact against random negatives as the number of classes grows.

Characters (docs/glyphs.md) of which 1,000 to 20,000 train, the same number of steps for each, and the same test: one
picture of each of 22,000 other characters is searched for among those of another typeface. A head compares each image
with the nearest share of all proxies, with as large a share of the classes drawn at random, or with all.

Scale and learning rate of the proxies are tuned for each head and number of classes, four trials each with one seed:
what is best with 3,000 classes fails with 20,000 (docs/log.md). Trials and test ask the same question of different
characters: of the characters outside of training, every other one is searched for in a trial, and the rest in the
test, among the pictures of all. MAP@R within held-out training classes, as other tables pick by, ranks scales
otherwise: there most typefaces of a character look alike.

Which classes train depends on the seed, so seeds differ by them, too. A size is tested once `tuned` says what its
trials have found; other shares than the one that is tuned are tried with the largest size alone.

Budget: a run takes 80 s (1,000 classes) to 2.5 minutes (20,000) of one core, with more steps up to 7; the trials of the
four sizes take 90 minutes, the other seeds, shares and steps three hours.
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
    pack_hits,
    say_interval,
    say_seeds,
    spread_over_seeds,
    unpack_hits,
    values_of,
)
from benchmarks.tables.methods import METHODS
from benchmarks.tables.table import BARE, Row, Table
from dist_proxygml.cluster.grid import Spread

NUM_STEPS, MORE_STEPS = 2500, 6500  # the more are tried with the largest size alone
SIZES = (1000, 3000, 10000, 20000)


class Head(NamedTuple):
    """Which proxies an image is compared with, at which shares, and what was tuned."""

    label: str
    overrides: str  # with the share in it
    shares: tuple[float, ...]
    tuning_share: float
    tuned: Mapping[int, tuple[float, float]]  # by number of classes, the best of `tried`
    setting: str = "proxies.scale"
    values: tuple[float, float] = (4, 16)
    rate: str = "optimizer.proxies_lr"
    rates: tuple[float, float] = (0.003, 0.01)

    @property
    def of_settings(self) -> list[tuple[str, tuple[float, float]]]:
        """What is tried of each setting."""
        return [(self.setting, self.values), (self.rate, self.rates)]

    @property
    def tried(self) -> list[tuple[float, float]]:
        """Values of the setting and of the rate."""
        return list(itertools.product(self.values, self.rates))


HEADS = {
    "topk": Head(
        "nearest",
        "proxies.ratio={share}",
        (0.01, 0.025, 0.05, 0.1, 0.2, 0.5),
        0.1,
        {1000: (4, 0.01), 3000: (16, 0.01), 20000: (16, 0.003)},
    ),
    "sampled": Head(
        "random",
        "proxies.ratio=null proxies.negatives=sampled proxies.share={share}",
        (0.01, 0.1, 0.25, 0.5),
        0.1,
        {1000: (16, 0.003), 3000: (16, 0.003), 20000: (16, 0.003)},
    ),
    "all": Head(
        "all",
        "proxies.ratio=null proxies.negatives=all",
        (1.0,),
        1.0,
        {1000: (16, 0.01), 3000: (16, 0.003), 20000: (16, 0.01)},
    ),
}


def _other(method: str, share: float, tuned: tuple[float, float] | None, **more: Any) -> Head:
    """A method of the table of methods, with the same values of its own setting."""
    of = METHODS[method]
    head = Head(method, of.overrides, (share,), share, {} if tuned is None else {SIZES[-1]: tuned}, **more)
    return head._replace(setting=of.tuned, values=of.values)


# Methods that are tried with the largest size alone. Without proxies there is but the network's rate.
OTHERS = {
    "margin": _other("ProxyGML, margin", 0.1, None),
    "cosface": _other("CosFace", 1.0, None),
    "arcface": _other("ArcFace", 1.0, None),
    "softtriple": _other("SoftTriple", 1.0, None),
    "proxy-anchor": _other("Proxy-Anchor", 1.0, None),
    "multi-similarity": _other("multi-similarity", 1.0, None, rate="optimizer.backbone_lr", rates=(0.002, 0.004)),
}


def _row(name: str, classes: int, share: float, tried: tuple[float, float], num_steps: int = NUM_STEPS) -> Row:
    """A row of one head, of three seeds if it is tested."""
    head, (value, rate) = (HEADS | OTHERS)[name], tried
    overrides = [
        *BARE,
        *head.overrides.replace("{share}", f"{share:g}").split(),
        f"data.train_classes={classes}",
        "data.num_workers=0",
        "backbone.options.width=16",
        f"{head.setting}={value:g}",
        f"{head.rate}={rate:g}",
        "training.epochs=100",  # of which max_steps leaves a part
        f"training.max_steps={num_steps}",
        "telemetry.log_every_steps=50",
    ]
    labels = {"classes": classes, "negatives": head.label, "share": share, "value": value, "rate": rate}
    parts = [
        str(classes),
        f"{name}-{share:g}" if share < 1 else name,
        f"{head.setting.rpartition('.')[2]}-{value:g}",
        f"rate-{rate:g}",
        *([f"steps-{num_steps}"] if num_steps != NUM_STEPS else []),
    ]
    seeds = (0, 1, 2) if tried == head.tuned.get(classes) else (0,)
    return Row("_".join(parts), labels, overrides, "configs/glyphs_cpu.json", seeds)


def trials(name: str, classes: int) -> list[Row]:
    """What is tried of a head; the first seed of what is tested among them."""
    head = (HEADS | OTHERS)[name]
    return [_row(name, classes, head.tuning_share, tried) for tried in head.tried]


def tested(name: str, classes: int) -> list[Row]:
    """The shares of a head, at what its trials have found; none before."""
    head = (HEADS | OTHERS)[name]
    if classes not in head.tuned:
        return []
    shares = head.shares if classes == SIZES[-1] else (head.tuning_share,)
    return [_row(name, classes, share, head.tuned[classes]) for share in shares]


def longer(name: str) -> list[Row]:
    """A head with the largest size and more steps, at what its trials have found; nothing before."""
    head = HEADS[name]
    if SIZES[-1] not in head.tuned:
        return []
    return [_row(name, SIZES[-1], head.tuning_share, head.tuned[SIZES[-1]], MORE_STEPS)]


def every_other(line: Mapping[str, Any], start: int) -> dict[str, Any]:
    """A result of every other test character alone: of those that trials ask for from 0, of the others from 1."""
    hits_2C = unpack_hits(line["hits"])[:, start::2]
    recall = float(hits_2C[1].sum() / hits_2C[0].sum())
    return {**line, "hits": pack_hits(hits_2C), "test": {"recall@1": recall}}


def show(table: Table, lines: Lines) -> Shown:
    """The tuning; Recall@1 by number of classes, then by share with the most, with what a step costs; two pictures."""
    rows = {
        (row.labels["negatives"], row.labels["share"], row.labels["classes"]): row
        for classes in SIZES
        for name in HEADS
        for row in tested(name, classes)
    }
    of_test = {key: every_other(line, 1) for key, line in lines.items()}
    recall = metric("recall@1")
    largest = SIZES[-1]

    def row_of(negatives: str, share: float, classes: int) -> Row | None:
        return rows.get((negatives if share < 1 else "all", share, classes))

    def said_of(negatives: str, share: float, classes: int) -> tuple[str, str, str]:
        """Recall@1, what it is above the nearest's, and milliseconds of a step's head; empty without numbers."""
        row, nearest = row_of(negatives, share, classes), row_of("nearest", HEADS["topk"].tuning_share, classes)
        if row is None:
            return "", "", ""
        taken = values_of(row, of_test, lambda line: line["head_ms"])
        above = "" if row is nearest or nearest is None else say_interval(row, nearest, of_test)
        return cell(values_of(row, of_test, recall)), above, f"{min(taken.values()):.0f}" if taken else ""

    def spread_of(negatives: str, share: float, classes: int) -> Spread | None:
        row = row_of(negatives, share, classes)
        return None if row is None else spread_over_seeds(row, of_test, recall)

    # 1. Tables, of what there is a number of.
    tried = [f"scale {scale}, rate {rate}" for scale, rate in HEADS["topk"].tried]
    of_trials = {key: every_other(line, 0) for key, line in lines.items() if key[1] == 0}
    tuning = [
        [f"{classes:,}", head.label, *_tried(trials(name, classes), head.tuned.get(classes), of_trials)]
        for classes in SIZES
        for name, head in HEADS.items()
    ]
    by_classes = [
        [f"{classes:,}", head.label, f"{100 * head.tuning_share:g} %", *said_of(head.label, head.tuning_share, classes)]
        for classes in SIZES
        for head in HEADS.values()
    ]
    by_share = [
        [head.label, f"{100 * share:g} %", *said_of(head.label, share, largest)]
        for head in HEADS.values()
        for share in head.shares
    ]
    by_steps = [
        [
            head.label,
            f"{100 * head.tuning_share:g} %",
            *(cell(values_of(row, of_test, recall)) for row in rows_of),
            say_interval(rows_of[-1], longer("topk")[0], of_test) if name != "topk" else "",
        ]
        for name, head in HEADS.items()
        if (
            rows_of := [
                *(row for row in tested(name, largest) if row.labels["share"] == head.tuning_share),
                *longer(name),
            ]
        )
    ]
    by_share = [row for row in by_share if any(row[2:])]
    shown = ["Recall@1", f"above the nearest {100 * HEADS['topk'].tuning_share:g} %", "head, ms"]
    parts = [
        "**The trials**: Recall@1 of the characters that trials ask for",
        markdown(["classes", "negatives", *tried], [row for row in tuning if any(row[2:])]),
        "**Recall@1 of the others** by the number of classes that train",
        markdown(["classes", "negatives", "share", *shown], [row for row in by_classes if any(row[3:])]),
        f"**Recall@1 of the others** by the number of steps, of {largest:,} classes",
        markdown(
            ["negatives", "share", f"{NUM_STEPS:,} steps", f"{MORE_STEPS:,} steps", "above the nearest"], by_steps
        ),
    ]

    # 2. Pictures.
    shares = sorted({share for head in HEADS.values() for share in head.shares})
    said = say_seeds(list(rows.values()), lines)
    compared = (("nearest 10 %", "nearest", 0.1), ("all", "all", 1), ("random 10 %", "random", 0.1))
    pictures = {
        "negatives_by_classes.svg": curves(
            "Recall@1 of unseen characters, percent",
            f"as classes grow, at equal steps; {said}",
            [f"{classes:,}" for classes in SIZES],
            {name: [spread_of(negatives, share, classes) for classes in SIZES] for name, negatives, share in compared},
            x_label="classes that train",
        ),
    }
    if len(by_share) > len(HEADS):  # of more shares than the one that is tuned
        parts += [
            f"**Recall@1 of the others** by the share that an image is compared with, of {largest:,} classes",
            markdown(["negatives", "share", *shown], by_share),
        ]
        pictures["negatives_by_share.svg"] = curves(
            f"Recall@1 of unseen characters, percent, with {largest:,} classes",
            f"by the share of all proxies that an image is compared with; {said}",
            [f"{100 * share:g} %" for share in shares],
            {
                negatives: [spread_of(negatives, share, largest) for share in shares]
                for negatives in ("nearest", "random")
            },
            x_label="share of all proxies",
        )
    parts += _shown_others(of_trials, of_test)
    parts.append(f"{len(lines)} of {sum(len(row.seeds) for row in table.rows)} runs are finished.")
    return Shown("\n\n".join(parts), pictures)


def _shown_others(of_trials: Lines, of_test: Lines) -> list[str]:
    """The trials of other methods, and what they find beside the nearest; nothing before the first trial."""
    largest = SIZES[-1]
    (nearest,) = (row for row in tested("topk", largest) if row.labels["share"] == HEADS["topk"].tuning_share)
    tuning, found = [], []
    for name, head in OTHERS.items():
        first, second = (f"`{setting}` {low:g} or {high:g}" for setting, (low, high) in head.of_settings)
        said = _tried(trials(name, largest), head.tuned.get(largest), of_trials)
        tuning.append([head.label, first, second, *said])
        for row in tested(name, largest):
            taken = values_of(row, of_test, lambda line: line["head_ms"])
            found.append(
                [
                    head.label,
                    cell(values_of(row, of_test, metric("recall@1"))),
                    say_interval(row, nearest, of_test),
                    f"{min(taken.values()):.0f}" if taken else "",
                ]
            )
    parts = []
    if any(any(row[3:]) for row in tuning):
        header = ["method", "setting", "rate", "low, low", "low, high", "high, low", "high, high"]
        parts += [f"**Other methods, the trials** with {largest:,} classes", markdown(header, tuning)]
    if found:
        header = ["method", "Recall@1", "above the nearest 10 %", "head, ms"]
        parts += [f"**Recall@1 of the others** by method, of {largest:,} classes", markdown(header, found)]
    return parts


def _tried(rows: list[Row], picked: tuple[float, float] | None, lines: Lines) -> list[str]:
    """Recall@1 of trials, in percent; what was picked is bold."""
    found = [values_of(row, lines, metric("recall@1")) for row in rows]
    said = [f"{100 * values[0]:.2f}" if values else "" for values in found]
    is_picked = [(row.labels["value"], row.labels["rate"]) == picked for row in rows]
    return [f"**{text}**" if text and bold else text for text, bold in zip(said, is_picked, strict=True)]


def _rows() -> list[Row]:
    rows = {}
    for classes in SIZES:
        for name in HEADS:
            rows |= {row.name: row for row in (*trials(name, classes), *tested(name, classes))}
    for name in HEADS:
        rows |= {row.name: row for row in longer(name)}
    for name in OTHERS:
        rows |= {row.name: row for row in (*trials(name, SIZES[-1]), *tested(name, SIZES[-1]))}
    return list(rows.values())


TABLE = Table(
    "negatives", "Do exact negatives beat random ones, and all, as classes grow?", "docs/results.md", _rows(), show
)
