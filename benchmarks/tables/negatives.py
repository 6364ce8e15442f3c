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
trials have found; other shares than the one that is tuned are tried with the largest size alone, and so are other
methods and row-wise Adagrad for the proxies, which otherwise move by AdamW. Rows have three seeds, or five where heads
are close.

Budget: a run takes 80 s (1,000 classes) to 4 minutes (20,000) of one core, with more steps up to 14; the trials of the
four sizes take 90 minutes, the other seeds, shares and steps four hours, other methods and Adagrad six.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.figures import (
    Lines,
    Priced,
    Shown,
    against,
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
from benchmarks.tables.table import BARE, CHARACTERS, Row, Table
from dist_proxygml.cluster.grid import Spread

NUM_STEPS = 2500
SIZES = (1000, 3000, 10000, 20000)
COSTS = ("head, ms", "head, MiB")


class Head(NamedTuple):
    """Which proxies an image is compared with, at which shares, and what was tuned."""

    label: str
    overrides: str  # with the share in it
    shares: tuple[float, ...]
    tuning_share: float
    tuned: Mapping[int, tuple[float, float]]  # by number of classes, the best of `tried`
    more_steps: Mapping[float, tuple[int, ...]] = {}  # by share, with the largest size alone
    setting: str = "proxies.scale"
    values: tuple[float, float] = (4, 16)
    rate: str = "optimizer.proxies_lr"
    rates: tuple[float, float] = (0.003, 0.01)
    num_seeds: int = 3  # of the tuning share; more where heads are close

    @property
    def settings(self) -> list[tuple[str, tuple[float, float]]]:
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
        {1000: (4, 0.01), 3000: (16, 0.01), 10000: (16, 0.01), 20000: (16, 0.003)},
        {0.01: (6500,), 0.05: (6500,), 0.1: (6500,)},
    ),
    "sampled": Head(
        "random",
        "proxies.ratio=null proxies.negatives=sampled proxies.share={share}",
        (0.01, 0.1, 0.25, 0.5),
        0.1,
        {1000: (16, 0.003), 3000: (16, 0.003), 10000: (16, 0.003), 20000: (16, 0.003)},
        {0.1: (5000, 6500)},  # 5,000 take the time that 2,500 of the nearest take on one core
    ),
    "all": Head(
        "all",
        "proxies.ratio=null proxies.negatives=all",
        (1.0,),
        1.0,
        {1000: (16, 0.01), 3000: (16, 0.003), 10000: (16, 0.01), 20000: (16, 0.01)},
        {1.0: (6500,)},
    ),
}


ROW_WISE = "optimizer.proxies_name=rowwise_adagrad optimizer.proxies_weight_decay=0"
UNIT_LENGTH = "proxies.unit_norm=true"


def _other(method: str, share: float, tuned: tuple[float, float] | None = None, **more: Any) -> Head:
    """A method of the table of methods, with the same values of its own setting."""
    of = METHODS[method]
    head = Head(method, of.overrides, (share,), share, {} if tuned is None else {SIZES[-1]: tuned}, **more)
    return head._replace(setting=of.tuned, values=of.values)


def _row_wise(head: Head, shares: tuple[float, ...], tuned: tuple[float, float], **more: Any) -> Head:
    """A head whose proxies move by row-wise Adagrad, which leaves those alone that no image was compared with; of the
    shares the first is tuned.
    """
    label, overrides = f"{head.label}, row-wise", f"{head.overrides} {ROW_WISE} {UNIT_LENGTH}"
    head = head._replace(label=label, overrides=overrides, shares=shares, tuning_share=shares[0])
    return head._replace(**{"tuned": {SIZES[-1]: tuned}, "more_steps": {}, "rates": (0.1, 0.3), **more})


def _nearest(label: str, overrides: str, rates: tuple[float, float]) -> Head:
    """The nearest 5 % with other settings of the proxies."""
    head = HEADS["topk"]
    overrides = f"{head.overrides} {overrides}"
    return head._replace(
        label=label, overrides=overrides, shares=(0.05,), tuning_share=0.05, tuned={}, more_steps={}, rates=rates
    )


# What is tried with the largest size alone, among it row-wise Adagrad and unit length, which go together elsewhere, one
# without the other. Without proxies there is but the network's rate.
OTHERS = {
    "rowwise-topk": _row_wise(HEADS["topk"], (0.05, 0.01, 0.001), (16, 0.1), more_steps={0.05: (6500,)}, num_seeds=5),
    "rowwise-sampled": _row_wise(HEADS["sampled"], (0.1,), (16, 0.3)),
    "rowwise-all": _row_wise(HEADS["all"], (1.0,), (16, 0.1), more_steps={1.0: (6500,)}, num_seeds=5),
    "rowwise-cosface": _row_wise(_other("CosFace", 1.0), (1.0,), (0.3, 0.1), more_steps={1.0: (6500,)}, num_seeds=5),
    "rowwise-any-length": _nearest("nearest, row-wise, any length", ROW_WISE, (0.1, 0.3)),
    "unit-length": _nearest("nearest, unit length", UNIT_LENGTH, (0.003, 0.01)),
    "margin": _other("ProxyGML, margin", 0.1, (0.3, 0.003)),
    "cosface": _other("CosFace", 1.0, (0.3, 0.01)),
    "arcface": _other("ArcFace", 1.0, (0.3, 0.01)),
    "softtriple": _other("SoftTriple", 1.0, (20, 0.003)),
    "proxy-anchor": _other("Proxy-Anchor", 1.0),
    "multi-similarity": _other(
        "multi-similarity",
        1.0,
        (0.5, 0.004),
        rate="optimizer.backbone_lr",
        rates=(0.002, 0.004),
        more_steps={1.0: (6500,)},
        num_seeds=5,
    ),
}
COMPARED = ("rowwise-topk", "topk", "rowwise-all", "all", "sampled", "multi-similarity")  # in the pictures of cost


def _row(name: str, classes: int, share: float, tried: tuple[float, float], num_steps: int = NUM_STEPS) -> Row:
    """A row of one head, of one seed unless it is tested."""
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
    num_seeds = head.num_seeds if share == head.tuning_share and num_steps == NUM_STEPS else 3
    seeds = range(num_seeds) if tried == head.tuned.get(classes) else (0,)
    return Row("_".join(parts), labels, overrides, CHARACTERS, seeds)


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


def longer(name: str, share: float) -> dict[int, Row]:
    """A head with the largest size and more steps, at what its trials have found; nothing before."""
    head, largest = (HEADS | OTHERS)[name], SIZES[-1]
    if largest not in head.tuned:
        return {}
    return {steps: _row(name, largest, share, head.tuned[largest], steps) for steps in head.more_steps.get(share, ())}


def every_other(line: Mapping[str, Any], start: int) -> dict[str, Any]:
    """A result of every other test character alone: of those that trials ask for from 0, of the others from 1."""
    hits_2C = unpack_hits(line["hits"])[:, start::2]
    recall = float(hits_2C[1].sum() / hits_2C[0].sum())
    return {**line, "hits": pack_hits(hits_2C), "test": {"recall@1": recall}}


def show(table: Table, lines: Lines) -> Shown:
    """The trials; Recall@1 by number of classes, steps, share and method, with what a step costs; four pictures."""
    of_trials = {key: every_other(line, 0) for key, line in lines.items() if key[1] == 0}
    of_test = {key: every_other(line, 1) for key, line in lines.items()}
    by_share = _by_share(of_test)
    parts = [*_trials(of_trials), *_by_classes(of_test), *_by_steps(of_test), *by_share, *_others(of_trials, of_test)]
    parts.append(f"{len(lines)} of {sum(len(row.seeds) for row in table.rows)} runs are finished.")
    pictures = {"negatives_by_classes.svg": _picture_of_classes(of_test)}
    if by_share:
        pictures["negatives_by_share.svg"] = _picture_of_shares(of_test)
    pictures |= _pictures_of_cost(of_test)
    return Shown("\n\n".join(parts), pictures)


def _trials(lines: Lines) -> list[str]:
    tried = [f"scale {scale}, rate {rate}" for scale, rate in HEADS["topk"].tried]
    body = [[f"{classes:,}", HEADS[name].label, *_tried(name, classes, lines)] for classes in SIZES for name in HEADS]
    header = ["classes", "negatives", *tried]
    return [
        "**The trials**: Recall@1 of the characters that trials ask for",
        markdown(header, [row for row in body if any(row[2:])]),
    ]


def _by_classes(lines: Lines) -> list[str]:
    body = [
        [f"{classes:,}", head.label, f"{100 * head.tuning_share:g} %", *_found(row, _tuned("topk", classes), lines)]
        for classes in SIZES
        for name, head in HEADS.items()
        if (row := _tuned(name, classes)) is not None
    ]
    header = ["classes", "negatives", "share", "Recall@1", "above the nearest 10 %", *COSTS]
    return [
        "**Recall@1 of the others** by the number of classes that train",
        markdown(header, [row for row in body if any(row[3:])]),
    ]


def _by_steps(lines: Lines) -> list[str]:
    """Of the heads and shares that have been trained for longer, too."""
    largest = SIZES[-1]
    heads = {name: head for name, head in (OTHERS | HEADS).items() if head.more_steps}
    numbers = sorted({NUM_STEPS, *(n for head in heads.values() for more in head.more_steps.values() for n in more)})
    first = longer("rowwise-topk", OTHERS["rowwise-topk"].tuning_share).get(numbers[-1])
    body = []
    for name, head in heads.items():
        for share in head.more_steps:
            rows = {NUM_STEPS: _tested(name, share, largest), **longer(name, share)}
            said = [cell(values_of(row, lines, metric("recall@1"))) if (row := rows.get(n)) else "" for n in numbers]
            last = rows.get(numbers[-1])
            above = say_interval(last, first, lines) if last and first and last.name != first.name else ""
            body.append([head.label, f"{100 * share:g} %", *said, above])
    header = ["negatives", "share", *(f"{steps:,} steps" for steps in numbers), "above the first"]
    return [
        f"**Recall@1 of the others** by the number of steps, of {largest:,} classes",
        markdown(header, [row for row in body if any(row[2:])]),
    ]


def _by_share(lines: Lines) -> list[str]:
    """Nothing before there are more shares than those that are tuned."""
    largest = SIZES[-1]
    body = [
        [HEADS[name].label, f"{100 * share:g} %", *_found(row, _tuned("topk", largest), lines)]
        for name, head in HEADS.items()
        for share, row in zip(head.shares, tested(name, largest), strict=False)
    ]
    body = [row for row in body if any(row[2:])]
    if len(body) <= len(HEADS):
        return []
    header = ["negatives", "share", "Recall@1", "above the nearest 10 %", *COSTS]
    return [
        f"**Recall@1 of the others** by the share that an image is compared with, of {largest:,} classes",
        markdown(header, body),
    ]


def _others(of_trials: Lines, of_test: Lines) -> list[str]:
    """The trials of other methods, and what they find beside the nearest; nothing before the first trial."""
    largest = SIZES[-1]
    best = next(iter(tested("rowwise-topk", largest)), None)
    tuning = []
    for name, head in OTHERS.items():
        settings = (f"`{setting}` {low:g} or {high:g}" for setting, (low, high) in head.settings)
        tuning.append([head.label, f"{100 * head.tuning_share:g} %", *settings, *_tried(name, largest, of_trials)])
    rows = [(head, row) for name, head in OTHERS.items() for row in tested(name, largest)]
    if any(_spread(row, of_test) for _, row in rows):
        rows += [(head, row) for name, head in HEADS.items() if (row := _tuned(name, largest)) is not None]
    found = [[head.label, f"{100 * row.labels['share']:g} %", *_found(row, best, of_test)] for head, row in rows]
    found = [row for row in found if any(row[2:])]
    parts = []
    if any(any(row[4:]) for row in tuning):
        header = ["method", "share", "setting", "rate", "low, low", "low, high", "high, low", "high, high"]
        parts += [f"**The trials of other methods**, with {largest:,} classes", markdown(header, tuning)]
    if found:
        parts += [
            f"**Recall@1 of the others** by method, of {largest:,} classes",
            markdown(["method", "share", "Recall@1", "above the first", *COSTS], found),
        ]
    return parts


def _tuned(name: str, classes: int) -> Row | None:
    """A head with the share that was tuned; None before."""
    return _tested(name, HEADS[name].tuning_share, classes)


def _tested(name: str, share: float, classes: int) -> Row | None:
    return next((row for row in tested(name, classes) if row.labels["share"] == share), None)


def _found(row: Row, reference: Row | None, lines: Lines) -> list[str]:
    """Recall@1, what it is above another row's, and what a step's head takes; empty without numbers."""
    above = "" if reference is None or row.name == reference.name else say_interval(row, reference, lines)
    costs = [_cost(row, lines, name) for name in ("head_ms", "head_mib")]
    said = ["" if cost is None else f"{cost:.0f}" for cost in costs]
    return [cell(values_of(row, lines, metric("recall@1"))), above, *said]


def _cost(row: Row, lines: Lines, name: str) -> float | None:
    """The least of all seeds, of which some may have shared the machine; None before it is measured."""
    return min(
        (lines[row.name, seed][name] for seed in row.seeds if name in lines.get((row.name, seed), {})), default=None
    )


def _tried(name: str, classes: int, lines: Lines) -> list[str]:
    """Recall@1 of trials, in percent; what was picked is bold."""
    rows, picked = trials(name, classes), (HEADS | OTHERS)[name].tuned.get(classes)
    found = [values_of(row, lines, metric("recall@1")) for row in rows]
    said = [f"{100 * values[0]:.2f}" if values else "" for values in found]
    is_picked = [(row.labels["value"], row.labels["rate"]) == picked for row in rows]
    return [f"**{text}**" if text and bold else text for text, bold in zip(said, is_picked, strict=True)]


def _picture_of_classes(lines: Lines) -> str:
    rows = {name: [_tuned(name, classes) for classes in SIZES] for name in ("topk", "all", "sampled")}
    return curves(
        "Recall@1 of unseen characters, percent",
        f"as classes grow, at equal steps; {_say_seeds(itertools.chain(*rows.values()), lines)}",
        [f"{classes:,}" for classes in SIZES],
        {
            HEADS[name].label + (" 10 %" if name != "all" else ""): [_spread(row, lines) for row in of_head]
            for name, of_head in rows.items()
        },
        x_label="classes that train",
    )


def _picture_of_shares(lines: Lines) -> str:
    shares = sorted({share for head in HEADS.values() for share in head.shares})
    largest = SIZES[-1]
    rows = {
        HEADS[name].label: [_tested(name if share < 1 else "all", share, largest) for share in shares]
        for name in ("topk", "sampled")
    }
    return curves(
        f"Recall@1 of unseen characters, percent, with {largest:,} classes",
        f"by the share of all proxies in the comparison; {_say_seeds(itertools.chain(*rows.values()), lines)}",
        [f"{100 * share:g} %" for share in shares],
        {label: [_spread(row, lines) for row in of_head] for label, of_head in rows.items()},
        x_label="share of all proxies",
    )


def _pictures_of_cost(lines: Lines) -> dict[str, str]:
    """What the shares of a head find with the largest size, by time and by memory."""
    rows = {name: tested(name, SIZES[-1]) for name in COMPARED}
    seeds = _say_seeds(itertools.chain(*rows.values()), lines)

    def picture(cost: str, of: str, x_label: str) -> str:
        return against(
            f"Recall@1 of unseen characters, percent, with {SIZES[-1]:,} classes",
            f"by the {of} of a step's head; {seeds}",
            {(HEADS | OTHERS)[name].label: _priced(of_head, lines, cost) for name, of_head in rows.items()},
            x_label=x_label,
        )

    return {
        "negatives_by_time.svg": picture("head_ms", "time", "milliseconds of a step's head, one CPU core"),
        "negatives_by_memory.svg": picture("head_mib", "memory", "MiB of the head at its peak"),
    }


def _priced(rows: Iterable[Row], lines: Lines, cost: str) -> list[Priced]:
    """What rows find and cost, as far as both are known; named by share, in its order."""
    known = sorted((row.labels["share"], _cost(row, lines, cost), _spread(row, lines)) for row in rows)
    return [
        Priced(f"{100 * share:g} %" if share < 1 else "", price, found)
        for share, price, found in known
        if price is not None and found is not None
    ]


def _spread(row: Row | None, lines: Lines) -> Spread | None:
    return None if row is None else spread_over_seeds(row, lines, metric("recall@1"))


def _say_seeds(rows: Iterable[Row | None], lines: Lines) -> str:
    return say_seeds([row for row in rows if row is not None], lines)


def _rows() -> list[Row]:
    rows = {}
    for classes in SIZES:
        for name in HEADS:
            rows |= {row.name: row for row in (*trials(name, classes), *tested(name, classes))}
    for name in HEADS | OTHERS:
        for share in (HEADS | OTHERS)[name].more_steps:
            rows |= {row.name: row for row in longer(name, share).values()}
    for name in OTHERS:
        rows |= {row.name: row for row in (*trials(name, SIZES[-1]), *tested(name, SIZES[-1]))}
    return list(rows.values())


TABLE = Table(
    "negatives", "Do exact negatives beat random ones, and all, as classes grow?", "docs/results.md", _rows(), show
)
