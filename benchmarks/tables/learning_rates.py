"""How learning rates follow the batch size, at equal epochs."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
    say_seeds,
    spread,
    values_of,
)
from benchmarks.tables.table import CHARACTERS, EMOJI, SHORT, Row, Table

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
        EMOJI,
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
        CHARACTERS,
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


def _rows(data: str, grown: Grown) -> list[Row]:
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


# ---- what is shown ----------------------------------------------------------------------------------------------


def show(table: Table, lines: Lines) -> Shown:
    """The tuning, the rules side by side for each batch on both kinds of unseen classes, and their differences to the
    rule that the validation classes pick; of each data set.
    """
    parts: list[str] = []
    pictures = {}
    for data in dict.fromkeys(row.labels["data"] for row in table.rows):
        rows = [row for row in table.rows if row.labels["data"] == data]
        rules, cells = by_rule([row for row in rows if "batch" in row.labels])
        on_validation, on_test = metric("map@r", on="validation"), metric("recall@1")
        picked = pick_rule(cells, lines)
        if picked is None:
            continue
        others = [rule for rule in rules if rule != picked]
        grown = [batch for batch, of_rule in cells.items() if len({row.name for row in of_rule.values()}) > 1]
        test, validation = (
            {
                rule: {batch: values_of(of[rule], lines, number) if rule in of else {} for batch, of in cells.items()}
                for rule in rules
            }
            for number in (on_test, on_validation)
        )
        apart = [
            [str(batch), *(say_difference(difference(test[rule][batch], test[picked][batch])) for rule in others)]
            for batch in grown
        ]
        means = [difference(over(test[rule], grown), over(test[picked], grown)) for rule in others]
        apart.append(["mean", *map(say_difference, means)])
        parts += [
            f"**{data}: the rates of the smallest batch**, by MAP@R of validation classes",
            tuning_grid([row for row in rows if "backbone" in row.labels], lines),
            f"**{data}: MAP@R of validation classes**, by which a rule is picked: {picked}",
            markdown(["batch", *rules], [[str(b), *(cell(validation[rule][b]) for rule in rules)] for b in cells]),
            f"**{data}: Recall@1 of test classes**",
            markdown(["batch", *rules], [[str(b), *(cell(test[rule][b]) for rule in rules)] for b in cells]),
            f"**{data}: Recall@1 of test classes, in points above the rule that was picked**, with 95 % intervals",
            markdown(["batch", *others], apart),
        ]
        pictures[f"{table.name}_{data}.svg"] = curves(
            "Recall@1 of unseen classes, percent",
            f"{data}, equal epochs; {say_seeds([row for of in cells.values() for row in of.values()], lines)}",
            [str(batch) for batch in cells],
            {
                rule: [spread(list(found.values())) if found else None for found in test[rule].values()]
                for rule in rules
            },
            x_label="images in a batch",
        )
    return Shown("\n\n".join(parts), pictures)


def over(numbers: Mapping[int, Mapping[int, float]], batches: Sequence[int]) -> dict[int, float]:
    """The mean over batches of each seed that has a number for all of them."""
    seeds = set.intersection(*(set(numbers[batch]) for batch in batches)) if batches else set()
    return {seed: statistics.fmean(numbers[batch][seed] for batch in batches) for seed in sorted(seeds)}


def by_rule(rows: Sequence[Row]) -> tuple[list[str], dict[int, dict[str, Row]]]:
    """The rules, and the row of each batch and rule: at the smallest batch all rules are one row."""
    rules = list(dict.fromkeys(row.labels["rule"] for row in rows if row.labels["rule"] != "tuned"))
    cells: dict[int, dict[str, Row]] = {}
    for row in rows:
        names = rules if row.labels["rule"] == "tuned" else [row.labels["rule"]]
        cells.setdefault(row.labels["batch"], {}).update(dict.fromkeys(names, row))
    return rules, cells


def pick_rule(cells: Mapping[int, Mapping[str, Row]], lines: Lines) -> str | None:
    """The rule with the highest MAP@R on validation classes, over seeds and the batches that all rules have; None
    before there is one.
    """
    means: dict[str, list[float]] = {}
    all_rules = {rule for of_batch in cells.values() for rule in of_batch}
    for of_batch in cells.values():
        found = {rule: values_of(row, lines, metric("map@r", on="validation")) for rule, row in of_batch.items()}
        if len(found) == len(all_rules) and all(found.values()):
            for rule, values in found.items():
                means.setdefault(rule, []).append(statistics.fmean(values.values()))
    return max(means, key=lambda rule: statistics.fmean(means[rule]), default=None)


def tuning_grid(rows: Sequence[Row], lines: Lines) -> str:
    """Rates of the backbone downwards, of the proxies to the right."""
    proxies = sorted({row.labels["proxies"] for row in rows})
    body = []
    for backbone in sorted({row.labels["backbone"] for row in rows}):
        of = {row.labels["proxies"]: row for row in rows if row.labels["backbone"] == backbone}
        numbers = [values_of(of[p], lines, metric("map@r", on="validation")) if p in of else {} for p in proxies]
        body.append([f"{backbone:g}", *(f"{100 * statistics.fmean(n.values()):.2f}" if n else "" for n in numbers)])
    return markdown(["backbone ↓ proxies →", *(f"{p:g}" for p in proxies)], body)


TABLE = Table(
    "learning_rates",
    "How do learning rates follow the batch size, at equal epochs?",
    "docs/learning_rates.md",
    [row for data, grown in GROWN.items() for row in _rows(data, grown)],
    show,
)
