"""What the command line of the evaluation changes of a run's settings, and what it prints beside the table."""

from pathlib import Path

import pytest

from dist_proxygml.config import load_config
from launchers.evaluate import build_parser, legacy_lines, overrides, ties_line, what_numbers_depend_on

ROOT = Path(__file__).resolve().parents[2]


def evaluated_with(folder: Path, config: str, *arguments: str) -> tuple[str, str | None, str, list[int], bool]:
    """Split, gallery split, protocol, K and whether the published evaluation is repeated."""
    path = folder / "config.json"
    path.write_text(load_config(ROOT / "configs" / f"{config}.json").model_dump_json())  # as a run stores it
    resolved = load_config(path, overrides(build_parser().parse_args(["--run", "runs/any", *arguments])))
    of = resolved.evaluation
    return resolved.data.test_split, of.gallery_split, of.protocol, of.recall_at, of.legacy_proxygml


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ("sop_8gpu", [], ("test", None, "sop", [1, 10, 100, 1000], False)),
        ("sop_8gpu", ["--data", "shards/other"], ("test", None, "custom", [1, 10, 100, 1000], False)),
        ("sop_8gpu", ["--split", "train"], ("train", None, "custom", [1, 10, 100, 1000], False)),
        ("demo_cpu", ["--protocol", "cub", "--legacy-proxygml"], ("test", None, "cub", [1, 2, 4, 8], True)),
        ("sop_8gpu", ["--protocol", "inshop"], ("query", "gallery", "inshop", [1, 10, 20, 30, 40, 50], False)),
        ("inshop_8gpu", ["--protocol", "custom"], ("query", None, "custom", [1, 10, 20, 30, 40, 50], False)),
        ("cub_1gpu", ["--split", "q", "--gallery-split", "g"], ("q", "g", "custom", [1, 2, 4, 8], False)),
    ],
)
def test_the_command_line_changes_split_gallery_and_protocol_together(
    tmp_path: Path, config: str, arguments: list[str], expected: tuple[str, str | None, str, list[int], bool]
) -> None:
    assert evaluated_with(tmp_path, config, *arguments) == expected


def test_what_cannot_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cub, cars and sop, got protocol 'custom'"):
        evaluated_with(tmp_path, "demo_cpu", "--legacy-proxygml")


def test_a_way_to_search_changes_no_number_and_anything_else_may() -> None:
    path = ROOT / "configs" / "demo_cpu.json"
    own = what_numbers_depend_on(load_config(path))
    ways = ["evaluation.search=counter", "evaluation.gallery=sharded", "evaluation.memory_budget=1 GiB"]
    assert what_numbers_depend_on(load_config(path, ways)) == own
    assert what_numbers_depend_on(load_config(path, ["evaluation.recall_at=[1]"])) != own
    assert what_numbers_depend_on(load_config(path, ["data.test_transform.size=24"])) != own


def test_the_help_has_examples() -> None:
    assert "examples:" in build_parser().format_help()


def test_numbers_of_the_published_evaluation_are_printed_apart() -> None:
    lines = legacy_lines({"recall@1": 0.5, "legacy_recall@1": 0.25, "legacy_nmi": 0.75})
    assert lines == ["recall@1 as in the published evaluation: 25.00", "nmi as in the published evaluation: 75.00"]


def test_the_metric_that_ties_change_most_is_named() -> None:
    bounds = {"recall@1": (0.78, 0.78), "map@r": (0.4, 0.4)}
    assert ties_line(bounds) == "ties: no metric changes by 0.005 points whichever way they go"
    bounds["map"] = (0.1, 0.2)
    assert ties_line(bounds) == "ties: with all of them gone wrong or right, map is 10.00 or 20.00"
