"""Which classes train where the source does not say, and what they are called."""

from pathlib import Path

import pytest

from dist_proxygml.data.class_split import ClassSplit, split_by_class
from dist_proxygml.data.index import open_index
from dist_proxygml.shard import main
from tests.raw_downloads import write_image, write_lines

FAMILIES = [f"{family} {number}" for family in ("chair", "lamp", "table") for number in range(30)]


def training(how: ClassSplit, classes: list[str] = FAMILIES) -> set[str]:
    split_of, record = split_by_class(classes, how, where="")
    chosen = {name for name in classes if split_of(name) == "train"}
    assert record["split_classes"]["train"] == len(chosen)
    assert record["split_classes"]["test"] == len(classes) - len(chosen)
    return chosen


def test_by_name_whole_families_test_and_at_random_some_of_each() -> None:
    assert training(ClassSplit(30, "name")) == {name for name in FAMILIES if name.startswith("chair")}
    chosen = training(ClassSplit(45))
    for family in ("chair", "lamp", "table"):
        assert 8 <= sum(name.startswith(family) for name in chosen) <= 22


def test_a_seed_draws_its_own_classes_and_always_the_same() -> None:
    assert training(ClassSplit(45)) == training(ClassSplit(45), FAMILIES[::-1])
    assert training(ClassSplit(45)) != training(ClassSplit(45, seed=1))


def test_a_class_more_moves_few_others() -> None:
    before, after = training(ClassSplit(0.5)), training(ClassSplit(0.5), [*FAMILIES, "vase 1", "vase 2"])
    assert len((before ^ after) - {"vase 1", "vase 2"}) <= 3


@pytest.mark.parametrize(
    ("train", "expected"), [(None, 3), (1, 1), (6, 6), (7, 7), (0.5, 4), (0.9, 6), (0.99, 6), (0.01, 1), (0.3, 2)]
)
def test_a_number_or_a_share_of_the_classes_trains(train: float | None, expected: int) -> None:
    assert len(training(ClassSplit(train), list("abcdefg"))) == expected


@pytest.mark.parametrize("train", [0, 8])
def test_both_sides_need_a_class(train: int) -> None:
    with pytest.raises(ValueError, match="found abc"):
        split_by_class(list("abcdefg"), ClassSplit(train), where="found abc")


@pytest.mark.parametrize("option", ["0", "-1", "1.5", "0.0", "nan", "half"])
def test_a_number_of_classes_that_makes_no_sense_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["build", "imagefolder", "--data", ".", "--out", "x", f"--split-classes={option}"])
    assert "--split-classes: expected a number of classes, or a share" in capsys.readouterr().err


def test_classes_have_display_names_and_those_of_one_name_keep_their_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        write_image(tmp_path / "raw" / f"n0{number}" / "im.jpg", number)
    names = tmp_path / "names.csv"
    write_lines(names, ["folder,name,more", 'n00,"tench, Tinca",1', "n01,crane,2", "n02,crane,3", "n09,none,4"])
    arguments = ["build", "imagefolder", "--data", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--split-by=name", "--split-classes=4", "--class-names", str(names)]) == 0
    classes = [(entry.source_id, entry.name) for entry in open_index(tmp_path / "out", "train").classes]
    assert classes == [("n00", "tench, Tinca"), ("n01", "crane (n01)"), ("n02", "crane (n02)"), ("n03", "n03")]
    assert "3 of 5 classes are named by" in capsys.readouterr().err
    for lines, message in (
        (["n00,a", "n00,b"], "line 2: n00 is named 'b', above 'a'"),
        (["x,a"], "found none of the 5 classes"),
    ):
        write_lines(names, lines)
        assert main([*arguments, "--overwrite", "--class-names", str(names)]) == 2
        assert message in capsys.readouterr().err
