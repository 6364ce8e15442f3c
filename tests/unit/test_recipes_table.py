"""The recipes for a CPU have what their trials pick, and README quotes what they find."""

import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

from benchmarks.figures import metric, values_of
from benchmarks.retrieval import finished
from benchmarks.tables import TABLES
from benchmarks.tables.recipes import RECIPES, Trial, final, trials, untrained
from benchmarks.tables.table import SHORT, pick
from dist_proxygml.config import load_config

ROOT = Path(__file__).parents[2]
OF_EMOJI = [name for name in RECIPES if trials(name)]


@pytest.fixture(scope="module")
def lines() -> dict:
    return finished(TABLES["recipes"])


@pytest.mark.parametrize("name", OF_EMOJI)
def test_a_recipe_has_what_its_trials_pick(name: str, lines: dict) -> None:
    *without, from_means = trials(name)
    first, best = pick(without, lines), pick([*without, from_means], lines)
    assert first is not None
    assert best is not None
    assert RECIPES[name].best == first.labels["trial"]
    config = load_config(ROOT / RECIPES[name].config)
    rates = (config.optimizer.backbone_lr, config.optimizer.proxies_lr)
    assert Trial(config.proxies.scale, rates, config.proxies.initialization == "class_mean") == best.labels["trial"]
    of_trial = load_config(ROOT / RECIPES[name].tried_from, [text for text in best.overrides if text not in SHORT])
    assert of_trial.model_copy(update={"name": config.name}) == config


@pytest.mark.parametrize("name", OF_EMOJI)
def test_the_readme_quotes_what_a_recipe_finds(name: str, lines: dict) -> None:
    row = final(name)
    (quoted,) = re.findall(rf"\| \[{name}\]\(configs/{name}\.json\).*", (ROOT / "README.md").read_text())
    before = [100 * value for value in untrained(row, lines).values()]
    recall, map_at_r = (
        [100 * value for value in values_of(row, lines, metric(number)).values()] for number in ("recall@1", "map@r")
    )
    assert len(before) == len(row.seeds)
    assert quoted.endswith(
        f"| {min(before):.0f} to {max(before):.0f} | **{fmean(recall):.1f} ± {stdev(recall):.1f}** | "
        f"{fmean(map_at_r):.1f} ± {stdev(map_at_r):.1f} |"
    )
