"""Methods under one harness: the same data, network, augmentation, optimizer, schedule and number of images for each.

Every method has four trials: two values of a setting of its own, each with two pairs of learning rates, with one seed,
on classes that are neither trained nor tested, for half of the steps. Two more go on from the best of them: past the
edge of the values, and past that of the rates; those with a margin have another two, with half and twice their scale.
The best of all by MAP@R trains on all classes, with five seeds.
Losses of pairs get batches of four images a class. The methods on characters are in negatives.py.

Budget: of the small network a trial takes 15 s of one core and a seed 40 s, of the pretrained one 40 s and 80 s: in all
50 and 105 minutes.
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
from benchmarks.tables.table import BARE, EMOJI, Row, Table

ALL = "proxies.ratio=null proxies.negatives=all"
COSFACE, ARCFACE = (f"proxies.scale=16 proxies.margin.name={name}" for name in ("cosface", "arcface"))
OTHER_SCALES = ("proxies.scale=8", "proxies.scale=32")


class Method(NamedTuple):
    """A method and what is tuned of it, beside the learning rates."""

    overrides: str
    tuned: str  # setting
    values: tuple[float, float]
    past: tuple[float, float]  # a value below those, and one above
    also: tuple[str, ...] = ()  # tried as well, with the best of the four


class Trial(NamedTuple):
    """What is tried of a method."""

    value: float
    rates: tuple[float, float]  # of backbone and proxies
    overrides: str = ""


METHODS = {
    "ProxyGML": Method("", "proxies.scale", (1, 4), (0.25, 16)),
    "ProxyGML, margin": Method(COSFACE, "proxies.margin.margin", (0.1, 0.3), (0.05, 0.5), OTHER_SCALES),
    "CosFace": Method(f"{ALL} {COSFACE}", "proxies.margin.margin", (0.1, 0.3), (0.05, 0.5), OTHER_SCALES),
    "ArcFace": Method(f"{ALL} {ARCFACE}", "proxies.margin.margin", (0.1, 0.3), (0.05, 0.5), OTHER_SCALES),
    "normalised softmax": Method(ALL, "proxies.scale", (8, 16), (4, 32)),
    "sampled softmax, 10 %": Method(
        "proxies.ratio=null proxies.negatives=sampled proxies.share=0.1", "proxies.scale", (8, 16), (4, 32)
    ),
    "SoftTriple": Method(
        f"{ALL} proxies.per_class=2 proxies.class_score=softmax proxies.margin.name=cosface proxies.margin.margin=0.01",
        "proxies.scale",
        (10, 20),
        (5, 40),
    ),
    "Proxy-Anchor": Method(
        "proxies={} loss.name=pml/ProxyAnchorLoss loss.options.margin=0.1", "loss.options.alpha", (16, 32), (8, 64)
    ),
    "multi-similarity": Method(
        "proxies={} data.images_per_class=4 loss.name=pml/MultiSimilarityLoss loss.options.alpha=2 "
        "loss.options.beta=20 loss.miner.name=MultiSimilarityMiner",
        "loss.options.base",
        (0.5, 0.7),
        (0.3, 0.9),
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
    """A data set, its network and budget, and which trials of each method were the best on validation classes."""

    config: str
    overrides: str
    epochs: int  # half of them in a trial
    evaluations: int  # on the test classes while training, for the picture
    rates: Sequence[tuple[float, float]]  # of backbone and proxies
    past: Sequence[tuple[float, float]]  # rates below those, and above
    first: Mapping[str, int]  # number of the best of the four trials, by method
    picked: Mapping[str, int]  # of the best of all


DATA = {
    "emoji": Data(
        EMOJI,
        "backbone.options.width=16 backbone.options.strides=[2,2,2,1]",
        24,
        6,
        ((0.002, 0.02), (0.004, 0.04)),
        ((0.001, 0.01), (0.008, 0.08)),
        dict(zip(METHODS, (2, 0, 2, 2, 2, 1, 0, 0, 3), strict=True)),
        dict(zip(METHODS, (2, 6, 4, 2, 2, 1, 5, 5, 3), strict=True)),
    ),
    "emoji, pretrained network": Data(
        "configs/emoji_cpu.json",
        "",
        8,
        4,
        ((0.0015, 0.01), (0.003, 0.02)),
        ((0.00075, 0.005), (0.006, 0.04)),
        dict(zip(METHODS, (2, 3, 0, 2, 1, 0, 1, 0, 2), strict=True)),
        dict(zip(METHODS, (2, 4, 0, 2, 1, 0, 1, 4, 5), strict=True)),
    ),
}


def tried(data: str, method: str) -> list[Trial]:
    """Four trials, and those that go on from the best of them."""
    of, how = DATA[data], METHODS[method]
    four = [Trial(value, rates) for value, rates in itertools.product(how.values, of.rates)]
    best = four[of.first[method]]
    value, rates = how.past[how.values.index(best.value)], of.past[of.rates.index(best.rates)]
    also = [best._replace(overrides=overrides) for overrides in how.also]
    return [*four, best._replace(value=value), best._replace(rates=rates), *also]


def trials(data: str, method: str) -> list[Row]:
    """The rows of what is tried."""
    of = DATA[data]
    budget = f"training.epochs={of.epochs // 2} data.validation_classes=0.2 evaluation.every_epochs=0"
    numbers = range(len(tried(data, method)))
    return [_row(data, method, number, f"trial-{number}_", budget, (0,)) for number in numbers]


def finals(data: str) -> dict[str, Row]:
    """What the best trial of each method becomes."""
    of = DATA[data]
    budget = f"training.epochs={of.epochs} evaluation.every_epochs={of.epochs // of.evaluations}"
    return {method: _row(data, method, number, "", budget, range(5)) for method, number in of.picked.items()}


def _row(data: str, method: str, number: int, prefix: str, budget: str, seeds: Sequence[int]) -> Row:
    of = DATA[data]
    how = METHODS[method]
    trial = tried(data, method)[number]
    overrides = [
        *(override for override in BARE if "every_epochs" not in override),
        *of.overrides.split(),
        *budget.split(),
        *how.overrides.split(),
        f"{how.tuned}={trial.value}",
        *(f"optimizer.{name}_lr={rate}" for name, rate in zip(("backbone", "proxies"), trial.rates, strict=True)),
        *trial.overrides.split(),
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
            markdown(
                ["method", "tuned", *_names_of_trials(data), "on from the best of these"],
                [_say_tried(data, method, lines) for method in METHODS],
            ),
        ]
    return Shown("\n\n".join(parts), pictures)


def _names_of_trials(data: str) -> list[str]:
    rates = [f"rates {backbone:g}, {proxies:g}" for backbone, proxies in DATA[data].rates]
    return [f"{value}, {of}" for value in ("first value", "second value") for of in rates]


def _say_tried(data: str, method: str, lines: Lines) -> list[str]:
    """The picked trial is bold."""
    how, found = METHODS[method], []
    for trial, row in zip(tried(data, method), trials(data, method), strict=True):
        values = values_of(row, lines, metric("map@r", on="validation"))
        said = f"{100 * values[0]:.2f}" if values else ""
        is_picked = row.labels["trial"] == DATA[data].picked[method]
        found.append((trial, f"**{said}**" if said and is_picked else said))
    four, further = found[:4], found[4:]
    names = (
        f"{trial.overrides.partition('.')[2].replace('=', ' ') or f'{trial.value:g}'}, "
        f"rates {trial.rates[0]:g}, {trial.rates[1]:g}"
        for trial, _ in further
    )
    beyond = "; ".join(f"{name}: {said}" for name, (_, said) in zip(names, further, strict=True) if said)
    return [method, f"`{how.tuned}` {how.values[0]:g} or {how.values[1]:g}", *(said for _, said in four), beyond]


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
