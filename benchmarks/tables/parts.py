"""What each part of the loss does: forced positives, masked softmax and regulariser, each on and off.

N = 3 proxies a class, since with one the regulariser only pushes classes apart; the paper has 12, on a fifth of the
classes. The loss with parts left out is that of benchmarks/ablated_loss.py; the product's own head stands beside it,
of one seed, at the scale that all parts get. Every setting gets the same trials, of the scale, with all seeds; the one
that counts is the best on validation classes.

Budget: 123 runs of about 16 s (estimated for one quiet core), 33 minutes.
"""

import itertools
import math
from collections.abc import Sequence

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
from benchmarks.tables.table import SHORT, Row, Table, pick

Parts = tuple[bool, bool, bool]  # forced positives, masked softmax, regulariser

PER_CLASS, RATIO, WEIGHT = 3, 0.05, 0.3  # r and lambda as published
SCALES = (1.0, 4.0, 16.0)
ALL: Parts = (True, True, True)
SETTINGS: tuple[Parts, ...] = tuple(itertools.product((True, False), (True, False), (True, False)))
# Recall@1 on Cars196 in the paper's table, N = 12.
PUBLISHED: dict[Parts, float] = {
    ALL: 85.5,
    (True, True, False): 84.0,
    (True, False, False): 83.3,
    (False, True, False): 66.1,
    (False, False, True): 81.7,
    (False, False, False): 47.3,
}
EMOJI_IMAGES, BATCH, EPOCHS = 2375, 64, 12  # images that train, about: which classes are held out depends on the seed
# A small network at the rates that learning_rates.py has tuned with batches of 32, and found good for 64.
CHEAP = (
    *SHORT,
    f"training.epochs={EPOCHS}",
    f"training.batch_size={BATCH}",
    "backbone.options.width=8",
    "backbone.options.strides=[2,2,2,1]",
    "optimizer.backbone_lr=0.004",
    "optimizer.proxies_lr=0.04",
)


def warm_up(num_images: int, batch: int) -> tuple[str, str]:
    """A first epoch of rising rates, and a logged step in each epoch."""
    steps = math.ceil(num_images / batch)
    return f"schedule.warmup_steps={steps}", f"telemetry.log_every_steps={steps}"


def _rows() -> list[Row]:
    rows = []
    common = (*CHEAP, *warm_up(EMOJI_IMAGES, BATCH))
    for scale in SCALES:
        overrides = (
            *common,
            f"proxies.per_class={PER_CLASS}",
            f"proxies.ratio={RATIO}",
            f"proxies.regularization_weight={WEIGHT}",
            f"proxies.scale={scale:g}",
        )
        labels = {"parts": ALL, "head": "product", "scale": scale}
        rows.append(Row(f"product_scale-{scale:g}", labels, overrides, seeds=(0,)))
    for parts, scale in itertools.product(SETTINGS, SCALES):
        forced, masked, regularized = parts
        options = (
            "proxies={}",
            "loss.name=pml/AblatedProxyGML",
            f"loss.options.proxies_per_class={PER_CLASS}",
            f"loss.options.ratio={RATIO}",
            f"loss.options.forced_positives={str(forced).lower()}",
            f"loss.options.masked_softmax={str(masked).lower()}",
            f"loss.options.regularization_weight={WEIGHT if regularized else 0.0}",
            f"loss.options.scale={scale:g}",
            "loss.options.seed={seed}",  # of the proxies, as in the product's head
        )
        rows.append(
            Row(
                f"{name_of(parts)}_scale-{scale:g}",
                {"parts": parts, "head": "ablated", "scale": scale},
                (*common, *options),
                seeds=range(5),
                imports=("benchmarks.ablated_loss",),
            )
        )
    return rows


def name_of(parts: Parts) -> str:
    """Of a setting, for its rows: the parts that are on."""
    names = [name for name, is_on in zip(("forced", "masked", "regularized"), parts, strict=True) if is_on]
    return "-".join(names) or "none"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(table: Table, lines: Lines) -> Shown:
    """Each setting at the scale that its validation classes pick, against all parts; and the trials of the scale."""
    on_validation, on_test = metric("map@r", on="validation"), metric("recall@1")
    trials: dict[tuple[str, Parts], list[Row]] = {("product", ALL): trials_of(table.rows, "product", ALL)}
    trials |= {("ablated", parts): trials_of(table.rows, "ablated", parts) for parts in SETTINGS}
    picked = {key: pick(rows, lines) for key, rows in trials.items()}
    reference = picked["ablated", ALL]
    if reference is not None:
        (picked["product", ALL],) = (
            row for row in trials["product", ALL] if row.labels["scale"] == reference.labels["scale"]
        )
    body, tuning = [], []
    for (head, parts), rows in trials.items():
        said = ["yes" if is_on else "" for is_on in parts]
        row = picked[head, parts]
        values = values_of(row, lines, on_test) if row else {}
        is_reference = (head, parts) == ("ablated", ALL)
        if row is None or reference is None or is_reference:
            apart = ["", ""]
        else:
            by_seed = difference(values, values_of(reference, lines, on_test))
            apart = [say_difference(by_seed), say_interval(row, reference, lines)]
        published = f"{PUBLISHED[parts]:.1f}" if head == "ablated" and parts in PUBLISHED else ""
        name = [f"{said[0]} (the product's head)" if head == "product" else said[0], *said[1:]]
        shown = [f"{row.labels['scale']:g}", cell(values), cell(values_of(row, lines, metric("map@r")))] if row else []
        body.append([*name, say_finished(rows, lines), *(shown or ["", "unfinished", ""]), *apart, published])
        numbers = [values_of(row, lines, on_validation) for row in rows]
        tuning.append([*name, *(cell(found) for found in numbers)])
    header = ["forced positives", "masked softmax", "regulariser"]
    shown_columns = ["runs", "scale", "Recall@1", "MAP@R", "difference to all parts by seed", "by class"]
    parts_shown = [
        "**Recall@1 of test classes**, each setting at the scale that its validation classes pick",
        markdown([*header, *shown_columns, "paper: Cars196"], body),
        "**MAP@R of validation classes by scale**, of which the best is picked",
        markdown([*header, *(f"{scale:g}" for scale in SCALES)], tuning),
    ]
    return Shown("\n\n".join(parts_shown), {f"{table.name}.svg": _picture(picked, lines)})


def trials_of(rows: Sequence[Row], head: str, parts: Parts) -> list[Row]:
    """The rows of a setting, one for each scale."""
    return [row for row in rows if (row.labels["head"], row.labels["parts"]) == (head, parts)]


def _picture(picked: dict[tuple[str, Parts], Row | None], lines: Lines) -> str:
    """Subgraph and softmax from left to right, the regulariser as a second curve."""
    places = {
        "neither": (False, False),
        "masked softmax": (False, True),
        "forced positives": (True, False),
        "both": (True, True),
    }
    series = {}
    for regularized in (True, False):
        rows = [picked["ablated", (*place, regularized)] for place in places.values()]
        name = f"{'with' if regularized else 'without'} regulariser"
        series[name] = [spread_over_seeds(row, lines, metric("recall@1")) if row else None for row in rows]
    shown = [row for (head, _), row in picked.items() if row and head == "ablated"]
    subtitle = f"emoji, N = {PER_CLASS}; {say_seeds(shown, lines)}"
    title = "Recall@1 of unseen classes, percent"
    return curves(title, subtitle, list(places), series, x_label="parts of the loss that are on")


TABLE = Table(
    "parts", "What does each part of the loss do, alone and with the others?", "docs/results.md", _rows(), show
)
