"""The recipes for a CPU: what their settings are chosen by, and what they find.

Those for emoji have four trials, of the scale and of the rates, and one that starts the best of these from class means:
as long as the recipe itself, with one seed, on classes that are neither trained nor tested. The best by MAP@R is what
the recipe has, and trains on all classes with three seeds: on two ranks, as `make demo` does, which the README quotes.
Network, augmentation and number of epochs are not tried again. The recipe for characters has what negatives.py finds
with 20,000 classes, and trains on one rank.

Budget: 10 trials of 2 to 3 minutes of one core, 6 runs of 3 minutes of two, 3 of 8 minutes of one; 75 minutes.
"""

import itertools
from typing import NamedTuple

from benchmarks.figures import Lines, Shown, cell, count_seeds, markdown, metric, values_of
from benchmarks.tables.table import EMOJI, SHORT, Row, Table

SCALES = (1.0, 4.0)


class Trial(NamedTuple):
    """What is tried of a recipe."""

    scale: float
    rates: tuple[float, float]  # of backbone and proxies
    from_means: bool = False

    @property
    def initialization(self) -> str:
        """Of the proxies."""
        return "class_mean" if self.from_means else "published"


class Recipe(NamedTuple):
    """A configuration, and the rates that are tried."""

    config: str
    tried_from: str = ""  # configuration that trials change
    rates: tuple[tuple[float, float], ...] = ()
    best: Trial | None = None  # of scales and rates
    ranks: int = 2
    overrides: tuple[str, ...] = ()  # of what is measured beside

    def tried(self) -> list[Trial]:
        """The best of scales and rates from class means, too."""
        further = [] if self.best is None else [self.best._replace(from_means=True)]
        return [*itertools.starmap(Trial, itertools.product(SCALES, self.rates)), *further]


RECIPES = {
    "demo_cpu": Recipe("configs/demo_cpu.json", EMOJI, ((0.002, 0.02), (0.004, 0.04)), Trial(4.0, (0.002, 0.02))),
    "glyphs_cpu": Recipe(
        "configs/glyphs_cpu.json",
        ranks=1,
        overrides=("evaluation.raw_pixels=true", "evaluation.at_start=true", "data.num_workers=0"),
    ),
    "emoji_cpu": Recipe(
        "configs/emoji_cpu.json", "configs/emoji_cpu.json", ((0.0015, 0.01), (0.003, 0.02)), Trial(1.0, (0.0015, 0.01))
    ),
}


def trials(name: str) -> list[Row]:
    """What is tried of a recipe, whatever it has now."""
    rows = []
    for trial in RECIPES[name].tried():
        backbone, proxies = trial.rates
        overrides = [
            *SHORT,
            f"proxies.scale={trial.scale:g}",
            f"optimizer.backbone_lr={backbone}",
            f"optimizer.proxies_lr={proxies}",
        ]
        row = f"{name}_scale-{trial.scale:g}_rates-{backbone}-{proxies}"
        if trial.from_means:
            overrides.append(f"proxies.initialization={trial.initialization}")
            row += "_class-means"
        rows.append(Row(row, {"trial": trial}, overrides, RECIPES[name].tried_from, seeds=(0,)))
    return rows


def final(name: str) -> Row:
    """The recipe as it is."""
    of = RECIPES[name]
    return Row(name, {"recipe": name}, ("telemetry.progress_bar=false", *of.overrides), of.config, ranks=of.ranks)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(table: Table, lines: Lines) -> Shown:
    """What each recipe finds, and the trials that it is chosen by."""
    found, tried = [], []
    for name in RECIPES:
        row = final(name)
        said = [cell(values_of(row, lines, metric(number))) for number in ("recall@1", "map@r")]
        found.append([f"`{name}`", count_seeds(row, lines), cell(untrained(row, lines)), *said])
        for trial in trials(name):
            of = trial.labels["trial"]
            on_validation = cell(values_of(trial, lines, metric("map@r", on="validation")))
            tried.append([f"`{name}`", f"{of.scale:g}", *map(str, of.rates), of.initialization, on_validation])
    parts = [
        "**Test classes**, percent",
        markdown(["recipe", "seeds", "Recall@1, untrained", "Recall@1", "MAP@R"], found),
        "**The trials**, MAP@R of validation classes",
        markdown(["recipe", "scale", "rate of the backbone", "rate of the proxies", "initial proxies", "MAP@R"], tried),
    ]
    return Shown("\n\n".join(parts))


def untrained(row: Row, lines: Lines) -> dict[int, float]:
    """Recall@1 before the first step, of each seed that was evaluated then."""
    curves = {seed: lines[row.name, seed]["curve"] for seed in row.seeds if (row.name, seed) in lines}
    return {seed: curve["0"] for seed, curve in curves.items() if "0" in curve}


TABLE = Table(
    "recipes",
    "What do the recipes for a CPU find, at settings chosen by held-out classes?",
    "docs/results.md",
    [row for name in RECIPES for row in (*trials(name), final(name))],
    show,
)
