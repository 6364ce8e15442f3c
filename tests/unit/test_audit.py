"""Which classes of a split are trained."""

from pathlib import Path

import numpy as np

from dist_proxygml.data.audit import count_trained_images, seen_classes, shared_classes
from dist_proxygml.data.index import ShardIndex
from tests.report_runs import write_picture_shards


def splits(root: Path, train: list[str], test: list[str]) -> dict[str, ShardIndex]:
    names = {"train": train, "test": test}
    pictures = {
        split: [(b"\xff\xd8" + name.encode(), label) for label, name in enumerate(names[split])] for split in names
    }
    return write_picture_shards(root, pictures, names)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    both = splits(tmp_path, ["cat", "dog", "owl"], ["owl", "emu", "cat", "fox"])
    seen_C = seen_classes(both["train"].classes, both["test"], is_same_split=False)
    assert seen_C is not None
    assert seen_C.tolist() == [True, False, True, False]
    assert shared_classes(both["train"], both["test"]) == ["cat", "owl"]


def test_numbers_for_names_tell_only_within_their_own_split(tmp_path: Path) -> None:
    both = splits(tmp_path, ["0", "1", "2"], ["0", "1"])
    assert seen_classes(both["train"].classes, both["test"], is_same_split=False) is None
    assert shared_classes(both["train"], both["test"]) is None
    held_out = both["train"].choose_classes(np.array([0, 2]), name="train")
    seen_C = seen_classes(held_out.classes, both["train"], is_same_split=True)
    assert seen_C is not None
    assert seen_C.tolist() == [True, False, True]


def test_training_images_are_counted_by_name(tmp_path: Path) -> None:
    """Two classes of one name count together; a class that is not trained has -1, one without an image 0."""
    pictures = {
        "train": [(b"\xff\xd8" + bytes([number]), label) for number, label in enumerate([0, 0, 0, 1, 3, 3, 4])],
        "test": [(b"\xff\xd8" + bytes([number]), label) for number, label in enumerate([0, 1, 2, 3])],
    }
    names = {"train": ["cat", "dog", "owl", "cat", "emu"], "test": ["emu", "fox", "cat", "owl"]}
    both = write_picture_shards(tmp_path, pictures, names)
    trained_C = count_trained_images(both["train"].classes, both["test"], is_same_split=False)
    assert trained_C is not None
    assert trained_C.tolist() == [1, -1, 5, 0]
    held_out = both["train"].choose_classes(np.array([0, 2]), name="train")
    of_split_C = count_trained_images(held_out.classes, both["train"], is_same_split=True)
    assert of_split_C is not None
    assert of_split_C.tolist() == [3, -1, 0, -1, -1]
