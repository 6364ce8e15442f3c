"""Exact against random negatives as the number of classes grows.

Characters (docs/glyphs.md) of which 1,000 to 20,000 train, the same number of steps for each, and the same test: one
picture of each of 22,000 other characters is searched for among those of another typeface. A head compares each image
with the nearest share of all proxies, with as large a share of the classes drawn at random, or with all.

Scale and learning rate of the proxies are tuned for each head and number of classes, with one seed: two scales by two
rates, and past the edge where the best of these lies. Trials and test ask the same question of different characters: of
the characters outside of training, every other one is searched for in a trial, and the rest in the test, among the
pictures of all. MAP@R within held-out training classes, as other tables pick by, ranks scales otherwise: there most
typefaces of a character look alike.

Which classes train depends on the seed, so seeds differ by them, too. Proxies move by AdamW, or by row-wise Adagrad
with unit length, which the nearest get with every number of classes; with 10,000 and 20,000 they begin as class means,
too. Other shares than the one that is tuned, other methods and other optimizers are tried with the largest size alone.
Rows have three seeds; five where they are close; one where they are points behind.

Budget: a run takes 80 s (1,000 classes) to 4 minutes (20,000) of one core, with more steps up to 10; all of them some
19 hours.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.figures import (
    Lines,
    Priced,
    Shown,
    against,
    cell,
    count_seeds,
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
from benchmarks.tables.methods import COSFACE, METHODS
from benchmarks.tables.table import BARE, CHARACTERS, Row, Table
from dist_proxygml.cluster.grid import Spread

NUM_STEPS = 2500
SIZES = (1000, 3000, 10000, 20000)
COSTS = ("head, ms", "head, MiB")
ON_TEST = "Recall@1 on the test half of the characters"


class Seeds(NamedTuple):
    """How many a head has with the largest size: one where it is points behind, five where it is close."""

    tuned: int = 3  # with the share that is tuned
    shares: int = 3  # with each other share
    longer: int = 3  # with more steps


class Head(NamedTuple):
    """Which proxies an image is compared with, at which shares, and what was tuned."""

    label: str
    overrides: str  # with the share in it
    shares: tuple[float, ...]
    tuning_share: float
    tuned: Mapping[int, tuple[float, float]]  # by number of classes, the best of `tried`
    sizes: tuple[int, ...] = SIZES
    more_steps: Mapping[float, tuple[int, ...]] = {}  # by share, with the largest size alone
    setting: str = "proxies.scale"
    values: tuple[float, ...] = (4, 16)
    rate: str = "optimizer.proxies_lr"
    rates: tuple[float, ...] = (0.003, 0.01)
    beyond: Mapping[int, tuple[tuple[float, float], ...]] = {}  # by number of classes, tried past the edge of the four
    seeds: Seeds = Seeds()
    step_of: str = ""  # the head whose steps these are, and so what they take

    def tried(self, classes: int) -> list[tuple[float, float]]:
        """Values of the setting and of the rate."""
        return [*itertools.product(self.values, self.rates), *self.beyond.get(classes, ())]


HEADS = {
    "topk": Head(
        "nearest",
        "proxies.ratio={share}",
        (0.01, 0.025, 0.05, 0.1, 0.2, 0.5),
        0.1,
        {1000: (4, 0.01), 3000: (16, 0.03), 10000: (16, 0.01), 20000: (16, 0.003)},
        more_steps={0.01: (6500,), 0.05: (6500,), 0.1: (6500,)},
        seeds=Seeds(shares=1, longer=1),
        beyond={
            1000: ((1, 0.01), (4, 0.03)),
            3000: ((32, 0.01), (16, 0.03)),
            10000: ((32, 0.01), (16, 0.03)),
            20000: ((32, 0.003), (16, 0.001)),
        },
    ),
    "sampled": Head(
        "random",
        "proxies.ratio=null proxies.negatives=sampled proxies.share={share}",
        (0.01, 0.1, 0.25, 0.5),
        0.1,
        {1000: (16, 0.003), 3000: (16, 0.003), 10000: (16, 0.003), 20000: (16, 0.003)},
        more_steps={0.1: (4000, 5000, 6500)},
        seeds=Seeds(shares=1),
        beyond=dict.fromkeys(SIZES, ((32, 0.003), (16, 0.001))),
    ),
    "all": Head(
        "all",
        "proxies.ratio=null proxies.negatives=all",
        (1.0,),
        1.0,
        {1000: (16, 0.01), 3000: (16, 0.003), 10000: (16, 0.01), 20000: (16, 0.01)},
        more_steps={1.0: (6500,)},
        seeds=Seeds(longer=1),
        beyond={**dict.fromkeys(SIZES, ((32, 0.01), (16, 0.03))), 3000: ((32, 0.003), (16, 0.001))},
    ),
}


ROW_WISE = "optimizer.proxies_name=rowwise_adagrad optimizer.proxies_weight_decay=0"
UNIT_LENGTH = "proxies.unit_norm=true"


def _other(method: str, share: float, tuned: Mapping[int, tuple[float, float]], **more: Any) -> Head:
    """A method of the table of methods, with the same values of its own setting; with the largest size alone, unless
    said otherwise.
    """
    of = METHODS[method]
    settings = {"sizes": SIZES[-1:], "setting": of.tuned, "values": of.values, **more}
    return Head(method, of.overrides, (share,), share, tuned, **settings)


def _scaled(method: str, scale: int) -> Head:
    """A method with a margin, at a scale."""
    head = _other(method, 1.0, {})
    return head._replace(label=f"{method}, scale {scale}", overrides=f"{head.overrides} proxies.scale={scale}")


def _row_wise(head: Head, shares: tuple[float, ...], tuned: Mapping[int, tuple[float, float]], **more: Any) -> Head:
    """A head whose proxies move by row-wise Adagrad, which leaves those alone that no image was compared with; of the
    shares the first is tuned.
    """
    return _with(head, "row-wise", f"{ROW_WISE} {UNIT_LENGTH}", shares, tuned, **{"rates": (0.1, 0.3), **more})


def _from_means(head: Head, share: float, settings: str, label: str = "from class means", **more: Any) -> Head:
    """A head with row-wise Adagrad whose proxies begin as class means, at what its trials have found without; what is
    tried is how many images of a class they are taken of. `step_of` is the head without.
    """
    overrides = f"{settings} {ROW_WISE} {UNIT_LENGTH} proxies.initialization=class_mean"
    more = {"setting": "proxies.class_mean_images", "values": (4,), "rates": (0.1,), **more}
    return _with(head, f"row-wise, {label}", overrides, (share,), **more)


def _with(
    head: Head,
    label: str,
    overrides: str,
    shares: tuple[float, ...],
    tuned: Mapping[int, tuple[float, float]],
    **more: Any,
) -> Head:
    """A head with other settings of its proxies; with the largest size alone, unless said otherwise."""
    label, overrides = f"{head.label}, {label}", f"{head.overrides} {overrides}"
    head = head._replace(label=label, overrides=overrides, shares=shares, tuning_share=shares[0], tuned=tuned)
    return head._replace(**{"sizes": SIZES[-1:], "more_steps": {}, "beyond": {}, **more})


# What is tried beside them, but for the first two with the largest size alone. Row-wise Adagrad and unit length, which
# go together elsewhere, are among it one without the other. Without proxies there is but the network's rate.
OTHERS = {
    "rowwise-class-means": _from_means(
        HEADS["topk"],
        0.05,
        "proxies.scale=16",
        tuned={10000: (1, 0.1), 20000: (4, 0.1)},
        sizes=SIZES[-2:],
        values=(1, 4),
        more_steps={0.05: (6500,)},
        seeds=Seeds(5),
        step_of="rowwise-topk",
    ),
    "rowwise-topk": _row_wise(
        HEADS["topk"],
        (0.05, 0.01, 0.001),
        {1000: (4, 0.3), 3000: (16, 0.3), 10000: (16, 0.1), 20000: (16, 0.1)},
        sizes=SIZES,
        more_steps={0.05: (6500,)},
        beyond={10000: ((16, 0.03), (32, 0.1)), 20000: ((16, 0.03), (32, 0.1), (32, 0.3))},
        seeds=Seeds(5, longer=5),
    ),
    "rowwise-sampled": _row_wise(HEADS["sampled"], (0.1,), {20000: (32, 0.1)}, beyond={20000: ((32, 0.1), (32, 0.3))}),
    "rowwise-all": _row_wise(
        HEADS["all"],
        (1.0,),
        {20000: (32, 0.1)},
        more_steps={1.0: (6500,)},
        beyond={20000: ((16, 0.03), (32, 0.1), (32, 0.3), (64, 0.1))},
        seeds=Seeds(5),
    ),
    "rowwise-cosface": _row_wise(_scaled("CosFace", 16), (1.0,), {}, beyond={20000: ((0.3, 0.03), (0.5, 0.1))}),
    "rowwise-cosface-32": _row_wise(
        _scaled("CosFace", 32),
        (1.0,),
        {20000: (0.5, 0.1)},
        rates=(0.1,),
        more_steps={1.0: (6500,)},
        beyond={20000: ((0.5, 0.1), (0.3, 0.3))},
        seeds=Seeds(5),
    ),
    "rowwise-cosface-64": _row_wise(_scaled("CosFace", 64), (1.0,), {}, values=(0.3,), rates=(0.1,)),
    "rowwise-margin": _row_wise(
        _other("ProxyGML, margin", 0.05, {})._replace(overrides=f"{HEADS['topk'].overrides} {COSFACE}"),
        (0.05,),
        {20000: (0.3, 0.1)},
        rates=(0.1,),
    ),
    "rowwise-class-means-all-images": _from_means(
        HEADS["topk"], 0.05, "proxies.scale=16", "from class means of all images", tuned={}, values=(100,)
    ),
    "rowwise-cosface-32-class-means": _from_means(
        _scaled("CosFace", 32),
        1.0,
        "proxies.margin.margin=0.5",
        tuned={20000: (4, 0.1)},
        more_steps={1.0: (6500,)},
        seeds=Seeds(5),
        step_of="rowwise-cosface-32",
    ),
    "rowwise-all-class-means": _from_means(
        HEADS["all"], 1.0, "proxies.scale=32", tuned={20000: (4, 0.1)}, step_of="rowwise-all"
    ),
    "rowwise-any-length": _with(
        HEADS["topk"], "row-wise, any length", ROW_WISE, (0.05,), {}, values=(16,), rates=(0.1, 0.3)
    ),
    "unit-length": _with(HEADS["topk"], "unit length", UNIT_LENGTH, (0.05,), {}, values=(16,)),
    "margin": _other("ProxyGML, margin", 0.1, {20000: (0.3, 0.003)}, seeds=Seeds(1)),
    "cosface": _other("CosFace", 1.0, {20000: (0.3, 0.01)}),
    "arcface": _other("ArcFace", 1.0, {20000: (0.3, 0.01)}),
    "softtriple": _other("SoftTriple", 1.0, {20000: (20, 0.003)}, seeds=Seeds(1)),
    "proxy-anchor": _other("Proxy-Anchor", 1.0, {20000: (16, 0.01)}, seeds=Seeds(1)),
    "multi-similarity": _other(
        "multi-similarity",
        1.0,
        {20000: (0.3, 0.004)},
        rate="optimizer.backbone_lr",
        rates=(0.002, 0.004),
        more_steps={1.0: (4500,)},
        beyond={20000: ((0.5, 0.008), (0.3, 0.004))},
        seeds=Seeds(5),
    ),
}
BEST = next(iter(OTHERS))  # what others with the largest size are compared with
# Names in pictures, and those in the pictures of cost.
NAMES = {
    "rowwise-class-means": "ProxyGML, from class means",
    "rowwise-topk": "ProxyGML, row-wise",
    "topk": "ProxyGML, AdamW",
    "rowwise-cosface-32-class-means": "CosFace, from class means",
    "rowwise-all-class-means": "softmax, from class means",
    "all": "softmax, AdamW",
    "sampled": "random, AdamW",
    "multi-similarity": "multi-similarity",
}
COMPARED = (
    "rowwise-class-means",
    "rowwise-topk",
    "rowwise-cosface-32-class-means",
    "rowwise-all-class-means",
    "sampled",
    "multi-similarity",
)


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
    labels = {"classes": classes, "head": name, "negatives": head.label, "share": share, "value": value, "rate": rate}
    parts = [
        str(classes),
        f"{name}-{share:g}" if share < 1 else name,
        f"{head.setting.rpartition('.')[2]}-{value:g}",
        f"rate-{rate:g}",
        *([f"steps-{num_steps}"] if num_steps != NUM_STEPS else []),
    ]
    seeds = head.seeds if classes == SIZES[-1] else Seeds()
    num_seeds = seeds.tuned if share == head.tuning_share else seeds.shares
    if num_steps != NUM_STEPS:
        num_seeds = seeds.longer
    if tried != head.tuned.get(classes):  # a trial
        num_seeds = 1
    return Row("_".join(parts), labels, overrides, CHARACTERS, range(num_seeds))


def trials(name: str, classes: int) -> list[Row]:
    """What is tried of a head; the first seed of what is tested among them."""
    head = (HEADS | OTHERS)[name]
    return [_row(name, classes, head.tuning_share, tried) for tried in head.tried(classes)]


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
    """The trials; Recall@1 by number of classes, steps, share and method, with what a step costs; five pictures."""
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
    grid = list(itertools.product(HEADS["topk"].values, HEADS["topk"].rates))
    body = []
    for classes, name in itertools.product(SIZES, HEADS):
        of_grid, beyond = _tried(name, classes, lines)[: len(grid)], _say_tried(name, classes, lines, start=len(grid))
        body.append([f"{classes:,}", HEADS[name].label, *of_grid, beyond])
    header = ["classes", "negatives", *(f"scale {scale}, rate {rate}" for scale, rate in grid), "past the edge"]
    return [
        "**The trials**: Recall@1 on the other half",
        markdown(header, [row for row in body if any(row[2:])]),
    ]


def _by_classes(lines: Lines) -> list[str]:
    heads = {name: head for name, head in (HEADS | OTHERS).items() if len(head.sizes) > 1}
    body = [
        [f"{classes:,}", head.label, f"{100 * head.tuning_share:g} %", *_found(row, _tuned("topk", classes), lines)]
        for classes in SIZES
        for name, head in heads.items()
        if (row := _tuned(name, classes)) is not None
    ]
    header = ["classes", "negatives", "share", "seeds", "Recall@1", "difference to the nearest 10 %", *COSTS]
    return [
        f"**{ON_TEST}** by the number of classes that train",
        markdown(header, [row for row in body if any(row[3:])]),
    ]


def _by_steps(lines: Lines) -> list[str]:
    """Of the heads and shares that have been trained for longer, too: at equal steps, and in equal time."""
    best = OTHERS[BEST]
    firsts = _over_steps(BEST, best.tuning_share)
    first = firsts[NUM_STEPS]
    most = NUM_STEPS * _cost(first, lines, "step_ms")
    body = []
    for name, head in (OTHERS | HEADS).items():
        for share in head.more_steps:
            of_step = _cost(_tested(name, share, SIZES[-1]), lines, "step_ms")
            for steps, row in _over_steps(name, share).items():
                if row is None or not (found := cell(values_of(row, lines, metric("recall@1")))):
                    continue
                same, is_no_longer = firsts.get(steps), steps * of_step <= 1.1 * most < math.inf
                body.append(
                    [
                        head.label,
                        f"{100 * share:g} %",
                        f"{steps:,}",
                        count_seeds(row, lines),
                        found,
                        say_interval(row, same, lines) if same and row.name != same.name else "",
                        "" if math.isinf(of_step) else f"{of_step:.0f}",
                        say_interval(row, first, lines) if first and steps > NUM_STEPS and is_no_longer else "",
                    ]
                )
    header = [
        *("negatives", "share", "steps", "seeds", "Recall@1"),
        f"difference to {best.label}, {100 * best.tuning_share:g} %, at as many steps",
        "a step, ms",
        f"difference to its {NUM_STEPS:,} steps, if it takes at most a tenth longer",
    ]
    return [f"**{ON_TEST}** by the number of steps, of {SIZES[-1]:,} classes", markdown(header, body)]


def _over_steps(name: str, share: float) -> dict[int, Row | None]:
    """A head and share with the largest size, by the number of steps."""
    return {NUM_STEPS: _tested(name, share, SIZES[-1]), **longer(name, share)}


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
    header = ["negatives", "share", "seeds", "Recall@1", "difference to the nearest 10 %", *COSTS]
    return [
        f"**{ON_TEST}** by the share that an image is compared with, of {largest:,} classes",
        markdown(header, body),
    ]


def _others(of_trials: Lines, of_test: Lines) -> list[str]:
    """The trials of other methods, and what they find beside the nearest; nothing before the first trial."""
    largest = SIZES[-1]
    best = next(iter(tested(BEST, largest)), None)
    tuning = []
    for name, head in OTHERS.items():
        for classes in head.sizes:
            if said := _say_tried(name, classes, of_trials):
                label = [f"{classes:,}", head.label, f"{100 * head.tuning_share:g} %"]
                tuning.append([*label, f"`{head.setting}`, `{head.rate}`", said])
    rows = [(head, row) for name, head in OTHERS.items() for row in tested(name, largest)]
    if any(_spread(row, of_test) for _, row in rows):
        rows += [(head, row) for name, head in HEADS.items() if (row := _tuned(name, largest)) is not None]
    found = [[head.label, f"{100 * row.labels['share']:g} %", *_found(row, best, of_test)] for head, row in rows]
    found = [row for row in found if any(row[2:])]
    parts = []
    if tuning:
        header = ["classes", "method", "share", "what is tried", "its values, and what they find"]
        parts += ["**The trials of other methods**", markdown(header, tuning)]
    if found:
        parts += [
            f"**{ON_TEST}** by method, of {largest:,} classes",
            markdown(["method", "share", "seeds", "Recall@1", "difference to the first", *COSTS], found),
        ]
    return parts


def _tuned(name: str, classes: int) -> Row | None:
    """A head with the share that was tuned; None before."""
    return _tested(name, (HEADS | OTHERS)[name].tuning_share, classes)


def _tested(name: str, share: float, classes: int) -> Row | None:
    return next((row for row in tested(name, classes) if row.labels["share"] == share), None)


def _found(row: Row, reference: Row | None, lines: Lines) -> list[str]:
    """Seeds, Recall@1, its difference to another row's, and what a step's head takes; empty without numbers."""
    if not (found := cell(values_of(row, lines, metric("recall@1")))):
        return [""] * (3 + len(COSTS))
    above = "" if reference is None or row.name == reference.name else say_interval(row, reference, lines)
    costs = [_cost(row, lines, name) for name in ("head_ms", "head_mib")]
    said = ["" if math.isinf(cost) else f"{cost:.0f}" for cost in costs]
    return [count_seeds(row, lines), found, above, *said]


def _cost(row: Row | None, lines: Lines, name: str) -> float:
    """The least of all seeds, of which some may have shared the machine; infinite before it is measured. What takes
    the steps of another row costs as much.
    """
    if row is not None and (head := (HEADS | OTHERS)[row.labels["head"]]).step_of:
        row = _tested(head.step_of, row.labels["share"], row.labels["classes"])
    found = [] if row is None else [lines.get((row.name, seed), {}).get(name, math.inf) for seed in row.seeds]
    return min(found, default=math.inf)


def _tried(name: str, classes: int, lines: Lines) -> list[str]:
    """Recall@1 of trials, in percent; what was picked is bold."""
    rows, picked = trials(name, classes), (HEADS | OTHERS)[name].tuned.get(classes)
    found = [values_of(row, lines, metric("recall@1")) for row in rows]
    said = [f"{100 * values[0]:.2f}" if values else "" for values in found]
    is_picked = [(row.labels["value"], row.labels["rate"]) == picked for row in rows]
    return [f"**{text}**" if text and bold else text for text, bold in zip(said, is_picked, strict=True)]


def _say_tried(name: str, classes: int, lines: Lines, *, start: int = 0) -> str:
    """Trials from the given one on: the setting, the rate, and Recall@1."""
    tried = zip((HEADS | OTHERS)[name].tried(classes), _tried(name, classes, lines), strict=True)
    return "; ".join(f"{value:g}, {rate:g}: {recall}" for (value, rate), recall in list(tried)[start:] if recall)


def _picture_of_classes(lines: Lines) -> str:
    heads = {name: head for name, head in (OTHERS | HEADS).items() if len(head.sizes) > 1}
    rows = {name: [_tuned(name, classes) for classes in SIZES] for name in heads}
    return curves(
        "Recall@1 of unseen characters, percent",
        f"as classes grow, at equal steps; {_say_seeds(itertools.chain(*rows.values()), lines)}",
        [f"{classes:,}" for classes in SIZES],
        {NAMES[name]: [_spread(row, lines) for row in of_head] for name, of_head in rows.items()},
        x_label="classes that train",
    )


def _picture_of_shares(lines: Lines) -> str:
    shares = sorted({share for head in HEADS.values() for share in head.shares})
    largest = SIZES[-1]
    rows = {
        NAMES[name]: [_tested(name if share < 1 else "all", share, largest) for share in shares]
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
    """What the shares of a head find with the largest size, by time and by memory of the head, and what the tuned one
    finds by time of training.
    """
    rows = {name: tested(name, SIZES[-1]) for name in COMPARED}

    def picture(
        by: str, priced: Mapping[str, list[Priced]], of: Iterable[Row | None], x_label: str, lowest: float = 70
    ) -> str:
        return against(
            f"Recall@1 of unseen characters, percent, with {SIZES[-1]:,} classes",
            f"by {by}; {_say_seeds(of, lines)}",
            {NAMES[name]: of_head for name, of_head in priced.items()},
            x_label=x_label,
            lowest=lowest,
        )

    def by_head(cost: str, of: str, x_label: str) -> str:
        priced = {name: _priced(of_head, lines, cost) for name, of_head in rows.items()}
        return picture(f"the {of} of a step's head", priced, itertools.chain(*rows.values()), x_label)

    longer_too = {name: _over_steps(name, (HEADS | OTHERS)[name].tuning_share) for name in COMPARED}
    trained = {
        name: [
            Priced(f"{steps:,}", steps * of_step / 1000, found)
            for steps, row in of_head.items()
            if not math.isinf(of_step := _cost(of_head[NUM_STEPS], lines, "step_ms")) and (found := _spread(row, lines))
        ]
        for name, of_head in longer_too.items()
    }
    of_trained = [row for of_head in longer_too.values() for row in of_head.values()]
    return {
        "negatives_by_time.svg": by_head("head_ms", "time", "milliseconds of a step's head, one CPU core"),
        "negatives_by_memory.svg": by_head("head_mib", "memory", "MiB of the head at its peak"),
        "negatives_by_training.svg": picture(
            "number of steps and their time", trained, of_trained, "seconds of training, one CPU core", 78
        ),
    }


def _priced(rows: Iterable[Row], lines: Lines, cost: str) -> list[Priced]:
    """What rows find and cost, as far as both are known; named by share, in its order."""
    known = sorted((row.labels["share"], _cost(row, lines, cost), _spread(row, lines)) for row in rows)
    return [
        Priced(f"{100 * share:g} %" if share < 1 else "", price, found)
        for share, price, found in known
        if not math.isinf(price) and found is not None
    ]


def _spread(row: Row | None, lines: Lines) -> Spread | None:
    return None if row is None else spread_over_seeds(row, lines, metric("recall@1"))


def _say_seeds(rows: Iterable[Row | None], lines: Lines) -> str:
    return say_seeds([row for row in rows if row is not None], lines)


def _rows() -> list[Row]:
    heads = HEADS | OTHERS
    rows = [
        row
        for classes in SIZES
        for name, head in heads.items()
        if classes in head.sizes
        for row in (*trials(name, classes), *tested(name, classes))
    ]
    rows += [row for name, head in heads.items() for share in head.more_steps for row in longer(name, share).values()]
    return list({row.name: row for row in rows}.values())


TABLE = Table(
    "negatives", "Do exact negatives beat random ones, and all, as classes grow?", "docs/results.md", _rows(), show
)
