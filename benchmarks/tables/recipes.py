"""The recipes for emoji: what their settings are chosen by, and what they find.

Each has four trials, of the scale and of the rates, as long as the recipe itself, with one seed, on classes that are
neither trained nor tested. The best by MAP@R is what the recipe has, and trains on all classes with three seeds: on two
ranks, as `make demo` does, which the README quotes. Network, augmentation and number of epochs are not tried again.

Budget: 8 trials of 2 to 3 minutes of one core, 6 runs of 3 minutes of two; three quarters of an hour.
"""

import itertools
from typing import NamedTuple

from benchmarks.figures import Lines, Shown, cell, count_seeds, markdown, metric, values_of
from benchmarks.tables.table import SHORT, Row, Table

SCALES = (1.0, 4.0)


class Recipe(NamedTuple):
    """A configuration, and the rates of backbone and proxies that are tried."""

    config: str
    rates: tuple[tuple[float, float], ...]

    def tried(self) -> list[tuple[float, tuple[float, float]]]:
        """Scales with rates."""
        return list(itertools.product(SCALES, self.rates))


RECIPES = {
    "demo_cpu": Recipe("configs/demo_cpu.json", ((0.002, 0.02), (0.004, 0.04))),
    "emoji_cpu": Recipe("configs/emoji_cpu.json", ((0.0015, 0.01), (0.003, 0.02))),
}


def trials(name: str) -> list[Row]:
    """What is tried of a recipe, whatever it has now."""
    rows = []
    for scale, (backbone, proxies) in RECIPES[name].tried():
        overrides = (
            *SHORT,
            f"proxies.scale={scale:g}",
            f"optimizer.backbone_lr={backbone}",
            f"optimizer.proxies_lr={proxies}",
        )
        labels = {"scale": scale, "rates": (backbone, proxies)}
        row = f"{name}_scale-{scale:g}_rates-{backbone}-{proxies}"
        rows.append(Row(row, labels, overrides, RECIPES[name].config, seeds=(0,)))
    return rows


def final(name: str) -> Row:
    """The recipe as it is."""
    return Row(name, {"recipe": name}, ("telemetry.progress_bar=false",), RECIPES[name].config, ranks=2)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(table: Table, lines: Lines) -> Shown:
    """What each recipe finds, and the trials that it is chosen by."""
    found, tried = [], []
    for name in RECIPES:
        row = final(name)
        said = [cell(values_of(row, lines, metric(number))) for number in ("recall@1", "map@r")]
        found.append([f"`{name}`", count_seeds(row, lines), cell(untrained(row, lines)), *said])
        for trial in trials(name):
            scale, rates = trial.labels["scale"], trial.labels["rates"]
            on_validation = cell(values_of(trial, lines, metric("map@r", on="validation")))
            tried.append([f"`{name}`", f"{scale:g}", *map(str, rates), on_validation])
    parts = [
        "**Test classes**, percent",
        markdown(["recipe", "seeds", "Recall@1, untrained", "Recall@1", "MAP@R"], found),
        "**The trials**, MAP@R of validation classes",
        markdown(["recipe", "scale", "rate of the backbone", "rate of the proxies", "MAP@R"], tried),
    ]
    return Shown("\n\n".join(parts))


def untrained(row: Row, lines: Lines) -> dict[int, float]:
    """Recall@1 before the first step, of each seed that was evaluated then."""
    curves = {seed: lines[row.name, seed]["curve"] for seed in row.seeds if (row.name, seed) in lines}
    return {seed: curve["0"] for seed, curve in curves.items() if "0" in curve}


TABLE = Table(
    "recipes",
    "What do the recipes for emoji find, at settings chosen by held-out classes?",
    "docs/results.md",
    [row for name in RECIPES for row in (*trials(name), final(name))],
    show,
)
