"""Recall@1 and MAP@R of queries whose classes are of similar size, so that long tails are seen.

    size    images in    0 | 1 | 2 | 3-4 | 5-8 | 9-16 | ... | 513-1,024 | 1,025 and more

A size is a number of images of the query's class: of those that are searched, the query itself included where it is one
of them, or of those that the model was trained on. Groups double, so that there are few of them at any size of a data
set. Each is the mean over its queries, with one rounding.

Declined: bounds for ties, which each metric has as a whole, and groups of equally many queries, whose limits would be
others for each data set.

Dimension key: q queries with a right answer.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dist_proxygml.evaluation.metrics import QueryScores, exact_mean

_LAST = (0, *(1 << power for power in range(11)))  # size of each group but the open one


class SizeGroup(NamedTuple):
    """Queries of classes that have from `first` to `last` images."""

    first: int
    last: int | None  # None: or more
    num_classes: int
    num_queries: int
    recall_at_1: float
    map_at_r: float

    @property
    def sizes(self) -> str:
        """For people: "5 to 8"."""
        if self.last is None:
            return f"{self.first:,} and more"
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,} to {self.last:,}"


def group_by_size(
    scores: QueryScores, class_q: Int[np.ndarray, " q"], size_q: Int[np.ndarray, " q"]
) -> tuple[SizeGroup, ...]:
    """The groups that have queries, smallest classes first.

    Args:
        scores: of the queries.
        class_q: any number for each class.
        size_q: images of the query's class, at least 0.
    """
    group_q = np.searchsorted(_LAST, size_q)
    groups = []
    for number in np.unique(group_q).tolist():
        members_q = np.flatnonzero(group_q == number)
        groups.append(
            SizeGroup(
                first=_LAST[number - 1] + 1 if number else 0,
                last=_LAST[number] if number < len(_LAST) else None,
                num_classes=len(np.unique(class_q[members_q])),
                num_queries=len(members_q),
                recall_at_1=exact_mean(scores.first_rank[members_q] == 1),
                map_at_r=exact_mean(scores.map_at_r[members_q]),
            )
        )
    return tuple(groups)


def as_document(groups: Iterable[SizeGroup]) -> list[dict[str, Any]]:
    """The groups as a result's JSON has them."""
    return [
        {
            "images": [group.first, group.last],
            "classes": group.num_classes,
            "queries": group.num_queries,
            "recall@1": group.recall_at_1,
            "map@r": group.map_at_r,
        }
        for group in groups
    ]


def from_document(document: Any) -> tuple[SizeGroup, ...]:
    """Read what `as_document` wrote. Raises KeyError, TypeError or ValueError if it is something else."""
    groups = []
    for entry in document:
        (first, last), counts = entry["images"], (entry["classes"], entry["queries"])
        if not all(type(number) is int for number in (first, *counts, *([] if last is None else [last]))):
            raise TypeError("a number of images, classes or queries is no number")
        if not all(isinstance(entry[name], int | float) for name in ("recall@1", "map@r")):
            raise TypeError("a metric is no number")
        groups.append(SizeGroup(first, last, *counts, entry["recall@1"], entry["map@r"]))
    return tuple(groups)
