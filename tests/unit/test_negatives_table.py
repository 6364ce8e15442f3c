"""Exact and random negatives: settings are those that the trials find, and unfinished rows leave gaps."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.figures import pack_hits, unpack_hits
from benchmarks.retrieval import finished
from benchmarks.tables import TABLES, negatives
from benchmarks.tables.negatives import HEADS, OTHERS, SIZES, every_other, trials
from dist_proxygml.config import ProxiesConfig
from dist_proxygml.training import presets

ROOT = Path(__file__).parents[2]
ALL_HEADS = HEADS | OTHERS


@pytest.mark.parametrize(("head", "classes"), [(name, size) for name, head in ALL_HEADS.items() for size in head.tuned])
def test_what_is_tuned_is_what_the_trials_find(head: str, classes: int) -> None:
    lines = finished(TABLES["negatives"])
    found = {row.name: every_other(lines[row.name, 0], 0)["test"]["recall@1"] for row in trials(head, classes)}
    best = max(trials(head, classes), key=lambda row: found[row.name])
    assert (best.labels["value"], best.labels["rate"]) == ALL_HEADS[head].tuned[classes]


def test_a_size_is_tuned_for_all_heads_or_for_none() -> None:
    (sizes,) = {frozenset(head.tuned) for head in HEADS.values()}
    assert sizes <= set(SIZES)
    assert all(set(head.tuned) <= set(head.sizes) for head in ALL_HEADS.values())


def test_the_preset_and_the_recipe_take_what_wins_with_many_classes() -> None:
    """But for a margin on top, which is a tie, and for class means of all images, which take a pass over them."""
    lines, largest = finished(TABLES["negatives"]), SIZES[-1]
    on_top = [name for name in ALL_HEADS if name.endswith(("-margin", "-class-means", "-all-images"))]

    def found(names: Iterable[str]) -> dict[tuple[str, float, float], float]:
        return {
            (name, row.labels["value"], row.labels["rate"]): every_other(lines[row.name, 0], 0)["test"]["recall@1"]
            for name in names
            for row in trials(name, largest)
            if (row.name, 0) in lines
        }

    plain, means = found(name for name in ALL_HEADS if name not in on_top), found(["rowwise-class-means"])
    draft = presets._Draft("mine", "shards/mine")
    draft.choose("", training={"epochs": 1, "batch_size": 128})
    presets._choose_many_proxies(draft, largest)
    presets._choose_class_means(draft, largest, 15 * largest)
    recipe = json.loads((ROOT / "configs" / "glyphs_cpu.json").read_text())
    for raw in (draft.raw, recipe):
        proxies, optimizer = ProxiesConfig(**raw["proxies"]), raw["optimizer"]
        assert (proxies.unit_norm, optimizer["proxies_name"]) == (True, "rowwise_adagrad")
        assert ("rowwise-topk", proxies.scale, optimizer["proxies_lr"]) == max(plain, key=lambda key: plain[key])
        assert proxies.initialization == "class_mean"
        of_best = ("rowwise-class-means", proxies.class_mean_images, optimizer["proxies_lr"])
        assert means[of_best] == max([*means.values(), *plain.values()])
    share = ALL_HEADS["rowwise-topk"].tuning_share
    assert (draft.raw["proxies"]["topk"], recipe["proxies"]["ratio"]) == (share * largest, share)


def test_more_steps_stand_beside_the_first_at_equal_steps_and_where_they_take_no_longer() -> None:
    first, cheap = negatives.tested(negatives.BEST, SIZES[-1])[0].name, "20000_sampled-0.1_scale-16_rate-0.003"
    lines = {(first, seed): result(0.6) for seed in (0, 1)}
    same_steps = negatives.tested("rowwise-topk", SIZES[-1])[0].name  # but for what the proxies begin as
    lines |= {(same_steps, seed): result(0.55) | {"step_ms": 60.0 + seed} for seed in (0, 1)}
    lines |= {(f"{first}_steps-6500", seed): result(0.8) for seed in (0, 1)}
    lines |= {(cheap, seed): result(0.5) | {"step_ms": 30.0} for seed in (0, 1)}
    for steps, recall in ((5000, 0.65), (6500, 0.7)):
        lines |= {(f"{cheap}_steps-{steps}", seed): result(recall) for seed in (0, 1)}
    lines |= {("20000_all_scale-16_rate-0.01", seed): result(0.4) for seed in (0, 1)}  # of steps that nobody timed
    lines |= {("20000_all_scale-16_rate-0.01_steps-6500", 0): result(0.75)}
    for key in lines:
        if "_all_" in key[0]:
            del lines[key]["step_ms"]
    made = negatives.show(TABLES["negatives"], lines).markdown
    (table,) = (part.splitlines()[2:] for part in made.split("\n\n") if part.startswith("| negatives | share | steps"))
    assert [[cell.partition(" [")[0].strip() for cell in line.split("|")[3:-1]] for line in table] == [
        ["2,500", "2 of 5", "60.00 ± 0.00", "", "60", ""],
        ["6,500", "2 of 3", "80.00 ± 0.00", "", "60", ""],
        ["2,500", "2 of 5", "55.00 ± 0.00", "-5.00", "60", ""],
        ["2,500", "2 of 3", "50.00 ± 0.00", "-10.00", "30", ""],
        ["5,000", "2 of 3", "65.00 ± 0.00", "", "30", "+5.00"],
        ["6,500", "2 of 3", "70.00 ± 0.00", "-10.00", "30", ""],
        ["2,500", "2 of 3", "40.00 ± 0.00", "-20.00", "", ""],
        ["6,500", "1", "75.00 ± n/a", "-5.00", "", ""],
    ]


def test_trials_and_test_share_no_character() -> None:
    line = {"hits": pack_hits(np.array([[1, 1, 2, 3, 1], [0, 1, 1, 1, 0]])), "test": {"recall@1": 0.375}, "loss": 2.0}
    of_trials, of_test = every_other(line, 0), every_other(line, 1)
    assert of_trials["test"] == {"recall@1": 1 / 4}
    assert of_test["test"] == {"recall@1": 2 / 4}
    assert unpack_hits(of_trials["hits"]).tolist() == [[1, 2, 1], [0, 1, 0]]
    assert unpack_hits(of_test["hits"]).tolist() == [[1, 3], [1, 1]]
    assert of_test["loss"] == 2.0


def result(recall: float) -> dict[str, Any]:
    """A line with this Recall@1 on the characters of the test, and 20 points less on those of the trials."""
    of_trials, of_test = (np.arange(100) < round(100 * share) for share in (recall - 0.2, recall))
    hits = pack_hits(np.stack([np.ones(200), np.stack([of_trials, of_test], axis=1).ravel()]))
    costs = {"head_ms": 12.4, "head_mib": 39.6, "step_ms": 30.0}
    return {"test": {"recall@1": recall - 0.1}, "validation": {}, "hits": hits} | costs


def test_trials_are_shown_on_their_half_of_the_characters_and_tests_on_the_other() -> None:
    lines = {(row.name, seed): result(0.8) for row in TABLES["negatives"].rows for seed in row.seeds}
    made = negatives.show(TABLES["negatives"], lines)
    *parts, _ = made.markdown.split("\n\n")
    for title, table in zip(parts[::2], parts[1::2], strict=True):
        shown = "60.00" if title.startswith("**The trials") else "80.00"
        assert set(re.findall(r"\b\d\d\.\d\d\b", table)) == {shown}, title
    for file, picture in made.pictures.items():
        spoken = str(ElementTree.fromstring(picture).get("aria-label"))
        assert set(re.findall(r"\b\d\d\.\d\d\b", spoken)) == {"80.00"}, file


def test_a_page_shows_the_differences_to_the_nearest_and_pictures_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = SIZES[-1]
    monkeypatch.setattr(
        negatives, "HEADS", {name: head._replace(tuned={largest: (4, 0.003)}) for name, head in HEADS.items()}
    )
    monkeypatch.setattr(negatives, "COMPARED", ("topk", "sampled"))
    lines = {(f"{largest}_topk-0.1_scale-4_rate-0.003", seed): result(0.8) for seed in (0, 1)}
    lines |= {(f"{largest}_all_scale-4_rate-0.003", seed): result(0.5 + 0.1 * seed) for seed in (0, 1)}
    assert "negatives_by_share.svg" not in negatives.show(TABLES["negatives"], lines).pictures
    lines |= {(f"{largest}_topk-{share}_scale-4_rate-0.003", 0): result(0.7) for share in (0.05, 0.2)}
    made = negatives.show(TABLES["negatives"], lines)
    tuning, by_classes, by_steps, by_share = (part.splitlines() for part in made.markdown.split("\n\n")[1::2])
    assert tuning[2:] == [
        f"| {largest:,} | nearest | **60.00** |  |  |  |  |",
        f"| {largest:,} | all | **30.00** |  |  |  |  |",
    ]
    (row,) = (line for line in by_share if line.startswith("| all | 100 % | 2 of 3 |"))
    assert "| 55.00 ± 7.07 | -25.00 [" in row
    assert row.endswith("tie | 12 | 40 |")  # over seeds: 30 and 20 points
    assert f"| {largest:,} {row}" in by_classes
    assert not any(line.startswith("| random") for line in by_share)
    assert by_steps[2:4] == [
        "| nearest | 5 % | 2,500 | 1 | 70.00 ± n/a |  | 30 |  |",
        "| nearest | 10 % | 2,500 | 2 of 3 | 80.00 ± 0.00 |  | 30 |  |",
    ]
    assert (
        "ProxyGML, AdamW: 5 % 70.00 ± n/a, 10 % 80.00 ± 0.00, 20 % 70.00 ± n/a, 100 % 55.00"
        in made.pictures["negatives_by_share.svg"]
    )
    for picture, cost in (("time", "12.4"), ("memory", "39.6")):
        assert (
            f"ProxyGML, AdamW: 5 % 70.00 ± n/a at {cost}, 10 % 80.00 ± 0.00 at {cost}, 20 % 70.00 ± n/a at {cost}"
        ) in made.pictures[f"negatives_by_{picture}.svg"]
    assert "ProxyGML, AdamW: 2,500 80.00 ± 0.00 at 75" in made.pictures["negatives_by_training.svg"]
    assert made.pictures["negatives_by_classes.svg"] == ""  # one size makes no curve
