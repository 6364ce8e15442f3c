"""Methods under one harness: the same data, network, augmentation, optimizer, schedule and number of images for each.

Every method has four trials: two settings of its own, each with two pairs of learning rates, with one seed, on classes
that are neither trained nor tested, for half of the steps. The best of them by MAP@R trains on all classes, with five
seeds of the small network and three of the pretrained one. Losses of pairs get batches of four images a class. The
methods on characters are in negatives.py.

Budget: of the small network a trial takes 15 s of one core and a seed 40 s, of the pretrained one 40 s and 80 s: in all
45 and 60 minutes.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.figures import (
    Lines,
    Shown,
    cell,
    curves,
    markdown,
    metric,
    say_interval,
    say_seeds,
    spread,
    values_of,
)
from benchmarks.tables.table import BARE, Row, Table

ALL = "proxies.ratio=null proxies.negatives=all"
COSFACE, ARCFACE = (f"proxies.scale=16 proxies.margin.name={name}" for name in ("cosface", "arcface"))


class Method(NamedTuple):
    """A method and what is tuned of it, beside the learning rates."""

    overrides: str
    tuned: str  # setting
    values: tuple[float, float]


METHODS = {
    "ProxyGML": Method("", "proxies.scale", (1, 4)),
    "ProxyGML, margin": Method(COSFACE, "proxies.margin.margin", (0.1, 0.3)),
    "CosFace": Method(f"{ALL} {COSFACE}", "proxies.margin.margin", (0.1, 0.3)),
    "ArcFace": Method(f"{ALL} {ARCFACE}", "proxies.margin.margin", (0.1, 0.3)),
    "normalised softmax": Method(ALL, "proxies.scale", (8, 16)),
    "sampled softmax, 10 %": Method(
        "proxies.ratio=null proxies.negatives=sampled proxies.share=0.1", "proxies.scale", (8, 16)
    ),
    "SoftTriple": Method(
        f"{ALL} proxies.per_class=2 proxies.class_score=softmax proxies.margin.name=cosface proxies.margin.margin=0.01",
        "proxies.scale",
        (10, 20),
    ),
    "Proxy-Anchor": Method(
        "proxies={} loss.name=pml/ProxyAnchorLoss loss.options.margin=0.1", "loss.options.alpha", (16, 32)
    ),
    "multi-similarity": Method(
        "proxies={} data.images_per_class=4 loss.name=pml/MultiSimilarityLoss loss.options.alpha=2 "
        "loss.options.beta=20 loss.miner.name=MultiSimilarityMiner",
        "loss.options.base",
        (0.5, 0.7),
    ),
}
PICTURED = (
    "ProxyGML",
    "ProxyGML, margin",
    "CosFace",
    "normalised softmax",
    "sampled softmax, 10 %",
    "multi-similarity",
)


class Data(NamedTuple):
    """A data set, its network and budget, and which trial of each method was the best on validation classes."""

    config: str
    overrides: str
    epochs: int  # half of them in a trial
    evaluations: int  # on the test classes while training, for the picture
    rates: Sequence[tuple[float, float]]  # of backbone and proxies
    picked: Mapping[str, int]  # number of a trial, by method, once all four are there
    seeds: Sequence[int]


DATA = {
    "emoji": Data(
        "configs/demo_cpu.json",
        "backbone.options.width=16 backbone.options.strides=[2,2,2,1]",
        24,
        6,
        ((0.002, 0.02), (0.004, 0.04)),
        dict(zip(METHODS, (2, 0, 2, 2, 2, 1, 0, 0, 3), strict=True)),
        (0, 1, 2, 3, 4),
    ),
    "emoji, pretrained network": Data(
        "configs/emoji_cpu.json",
        "",
        8,
        4,
        ((0.0015, 0.01), (0.003, 0.02)),
        dict(zip(METHODS, (2, 3, 0, 2, 1, 0, 1, 0, 2), strict=True)),
        (0, 1, 2),
    ),
}


def trials(data: str, method: str) -> list[Row]:
    """The four trials of a method."""
    of = DATA[data]
    budget = f"training.epochs={of.epochs // 2} data.validation_classes=0.2 evaluation.every_epochs=0"
    return [_row(data, method, number, f"trial-{number}_", budget, (0,)) for number in range(2 * len(of.rates))]


def finals(data: str) -> dict[str, Row]:
    """What the best trial of each method becomes; nothing before it is known."""
    of = DATA[data]
    budget = f"training.epochs={of.epochs} evaluation.every_epochs={of.epochs // of.evaluations}"
    return {method: _row(data, method, number, "", budget, of.seeds) for method, number in of.picked.items()}


def _row(data: str, method: str, number: int, prefix: str, budget: str, seeds: Sequence[int]) -> Row:
    of = DATA[data]
    how = METHODS[method]
    value, (backbone, proxies) = list(itertools.product(how.values, of.rates))[number]
    overrides = [
        *(override for override in BARE if "every_epochs" not in override),
        *of.overrides.split(),
        *budget.split(),
        *how.overrides.split(),
        f"{how.tuned}={value}",
        f"optimizer.backbone_lr={backbone}",
        f"optimizer.proxies_lr={proxies}",
    ]
    labels = {"data": data, "method": method, "trial": number}
    return Row(f"{_in_names(data)}_{prefix}{_in_names(method)}", labels, overrides, of.config, seeds)


def _in_names(text: str) -> str:
    return re.sub(r"\W+", "-", text).strip("-")


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(table: Table, lines: Lines) -> Shown:
    """Of each data set: the trials, the methods with their differences to ProxyGML, and the curve over epochs."""
    parts, pictures = [], {}
    for data in DATA:
        rows = finals(data)
        body = []
        for method, row in rows.items():
            found = [lines[row.name, seed] for seed in row.seeds if (row.name, seed) in lines]
            body.append(
                [
                    method,
                    str(len(found)),
                    cell(values_of(row, lines, metric("recall@1"))),
                    "" if method == "ProxyGML" else say_interval(row, rows["ProxyGML"], lines),
                    cell(values_of(row, lines, metric("map@r"))),
                    f"{min(costs):.1f}" if (costs := [line["head_ms"] for line in found if "head_ms" in line]) else "",
                    f"{max(line['memory_mib'] for line in found):,}" if found else "",
                ]
            )
        header = ["method", "seeds", "Recall@1", "difference to ProxyGML", "MAP@R", "head, ms", "peak, MiB"]
        if rows:
            parts += [f"**{data}: Recall@1 and MAP@R of test classes**", markdown(header, body)]
            pictures[f"methods_{_in_names(data)}.svg"] = _picture(data, rows, lines)
        parts += [
            f"**{data}: the trials**, MAP@R of validation classes",
            markdown(["method", "tuned", *_names_of_trials(data)], [_tried(data, method, lines) for method in METHODS]),
        ]
    return Shown("\n\n".join(parts), pictures)


def _names_of_trials(data: str) -> list[str]:
    rates = [f"rates {backbone:g}, {proxies:g}" for backbone, proxies in DATA[data].rates]
    return [f"{value}, {of}" for value in ("first value", "second value") for of in rates]


def _tried(data: str, method: str, lines: Lines) -> list[str]:
    """The picked trial is bold."""
    found = [values_of(row, lines, metric("map@r", on="validation")) for row in trials(data, method)]
    said = [f"{100 * values[0]:.2f}" if values else "" for values in found]
    picked = DATA[data].picked.get(method)
    how = METHODS[method]
    tuned = f"`{how.tuned}` {how.values[0]:g} or {how.values[1]:g}"
    return [method, tuned, *(f"**{text}**" if text and number == picked else text for number, text in enumerate(said))]


def _picture(data: str, rows: Mapping[str, Row], lines: Lines) -> str:
    """Recall@1 over the steps of some methods."""
    epochs, number_of = DATA[data].epochs, DATA[data].evaluations
    found: dict[str, list[list[float]]] = {}
    for method in (method for method in PICTURED if method in rows):
        row = rows[method]
        of_seeds = [list(lines[row.name, seed]["curve"].values()) for seed in row.seeds if (row.name, seed) in lines]
        found[method] = [curve for curve in of_seeds if len(curve) == number_of]
    return curves(
        "Recall@1 of unseen classes, percent",
        f"{data}, while training; {say_seeds(list(rows.values()), lines)}",
        [str(epochs * (number + 1) // number_of) for number in range(number_of)],
        {
            method: [spread(values) for values in zip(*of_seeds, strict=True)]
            for method, of_seeds in found.items()
            if of_seeds
        },
        x_label="epochs",
    )


TABLE = Table(
    "methods",
    "How do methods compare, each tuned with the same number of trials?",
    "docs/results.md",
    [
        row
        for data in DATA
        for rows in (*(trials(data, method) for method in METHODS), finals(data).values())
        for row in rows
    ],
    show,
)
