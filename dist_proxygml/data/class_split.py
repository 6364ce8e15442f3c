"""Division of classes into those that train and those that test, where the source has none.

    by="random"    classes in the order of sha256("SEED/CLASS"), the first of them train
    by="name"      classes in sorted order, the first of them train

Chosen: random by default, since sorted names put whole families on one side (all products of a brand, all species of a
genus), which measures something else; a hash of each name rather than a shuffle, since a class that comes or goes then
moves few others.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ClassSplit:
    """How classes are divided.

    Attributes:
        train: how many classes train, or which share of them (a float below 1); None: half, rounded down.
        by: what decides which.
        seed: of the random division.
    """

    train: int | float | None = None
    by: Literal["random", "name"] = "random"
    seed: int = 0


HALF = ClassSplit()


def split_by_class(
    labels: Iterable[int | str], how: ClassSplit, *, where: str
) -> tuple[Callable[[int | str], str], dict[str, Any]]:
    """Return the split of each class, `train` or `test`, and what the index records of it.

    Raises ValueError if one of them would have no class, unless all are said to train; `where` says what was found.
    """
    classes = sorted(set(labels), key=lambda i: (isinstance(i, str), i))
    num_train = len(classes) // 2
    if isinstance(how.train, float):
        num_train = min(max(1, round(how.train * len(classes))), len(classes) - 1)
    elif how.train is not None:
        num_train = how.train
    if not 0 < num_train <= len(classes) - (not isinstance(how.train, int)):
        raise ValueError(
            f"expected at least one class to train, and one to test unless --split-classes names them all, got "
            f"{len(classes)} classes with images, of which {num_train} would train; {where}"
        )
    record = {"train": num_train, "test": len(classes) - num_train, "by": how.by}
    if how.by == "random":
        classes.sort(key=lambda i: hashlib.sha256(f"{how.seed}/{i}".encode()).digest())
        record["seed"] = how.seed
    train = set(classes[:num_train])
    return lambda label: "train" if label in train else "test", {"split_classes": record}


def notes_of_split(record: Mapping[str, Any]) -> list[str]:
    """Return what the user should know of what `split_by_class` recorded."""
    if record and not record["split_classes"]["test"]:
        return ["all classes train, so there is no test split: train with data.test_split=null"]
    return []
