"""Exact top-k over ranks against sorting in Python: ties, empty partitions, k beyond a partition.

Similarities are small integers divided by four, so that most of them tie, at the k-th place too.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.selection import Exchange, keep_best, num_kept_proxies
from tests.harness import run_ranks
from tests.reference import kept_proxies


class Case(NamedTuple):
    """A similarity matrix of all ranks and how it is cut."""

    similarity: Tensor  # [B, P]
    positive: Tensor  # bool [B, P]
    num_negatives: int
    row_counts: list[int]
    proxy_counts: list[int]


def select_on_rank(context: ParallelContext, cases: Sequence[Case], exchange: Exchange) -> list[Tensor]:
    """This rank's columns of the selection, for each case."""
    kept = []
    for case in cases:
        first = sum(case.proxy_counts[: context.rank])
        columns = slice(first, first + case.proxy_counts[context.rank])
        kept.append(selected(case, columns, group=context.group, exchange=exchange))
    return kept


def selected(case: Case, columns: slice, *, group: Any = None, exchange: Exchange = "candidates") -> Tensor:
    positive = case.positive[:, columns]
    kept = keep_best(
        case.similarity[:, columns].masked_fill(positive, -math.inf),
        num_negatives=case.num_negatives,
        row_counts=case.row_counts,
        proxy_counts=case.proxy_counts,
        group=group,
        exchange=exchange,
    )
    assert kept.dtype == torch.bool
    assert not (kept & positive).any()
    return kept | positive


def kept_by_the_oracle(case: Case) -> list[list[bool]]:
    topk = int(case.positive[0].sum()) + case.num_negatives
    return [
        kept_proxies(row, positive, topk=topk)
        for row, positive in zip(case.similarity.tolist(), case.positive.tolist(), strict=True)
    ]


def assert_selected_as_the_oracle_does(cases: Sequence[Case], *, world_size: int) -> None:
    for exchange in ("candidates", "histogram"):
        per_rank = run_ranks(select_on_rank, world_size, cases, exchange)
        for case, *parts in zip(cases, *per_rank, strict=True):
            assert torch.cat(parts, dim=1).tolist() == kept_by_the_oracle(case), (exchange, case)


def case_of(
    similarity: Tensor,
    labels: Sequence[int],
    *,
    num_negatives: int,
    row_counts: list[int],
    world_size: int,
    proxies_per_class: int = 1,
) -> Case:
    num_classes = similarity.shape[1] // proxies_per_class
    class_of = torch.arange(num_classes).repeat_interleave(proxies_per_class)
    counts = [count * proxies_per_class for count in ClassPartition(num_classes, world_size).counts()]
    positive = torch.tensor(labels, dtype=torch.int64)[:, None] == class_of
    return Case(similarity, positive, num_negatives, row_counts, counts)


def random_case(seed: int, *, world_size: int) -> Case:
    """Everything drawn: sizes, the cut of the rows, how many different similarities there are."""
    draw = random.Random(seed)
    num_classes, proxies_per_class = draw.randint(2, 9), draw.randint(1, 3)
    row_counts = [draw.randint(0, 3) for _ in range(world_size)]
    row_counts[draw.randrange(world_size)] += 1
    generator = torch.Generator().manual_seed(seed)
    levels = draw.choice([1, 2, 3, 1000])
    shape = (sum(row_counts), num_classes * proxies_per_class)
    drawn = torch.randint(levels, shape, generator=generator)
    similarity = (drawn - levels // 2) / 4
    if draw.random() < 0.3:
        half = torch.rand(shape, generator=generator) < 0.5
        similarity = torch.where((similarity == 0) & half, -similarity, similarity)  # -0.0 ties with 0.0
    labels = torch.randint(num_classes, (sum(row_counts),), generator=generator).tolist()
    num_negatives = draw.randint(1, (num_classes - 1) * proxies_per_class)
    return case_of(
        similarity.to(draw.choice([torch.float32, torch.float64])),
        labels,
        num_negatives=num_negatives,
        row_counts=row_counts,
        world_size=world_size,
        proxies_per_class=proxies_per_class,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_random_cuts_and_ties_are_selected_as_sorting_does(world_size: int) -> None:
    cases = [random_case(seed, world_size=world_size) for seed in range(80)]
    assert_selected_as_the_oracle_does(cases, world_size=world_size)


def test_one_process_without_a_group_selects_as_sorting_does() -> None:
    for seed in range(80):
        case = random_case(seed, world_size=1)
        assert selected(case, slice(None)).tolist() == kept_by_the_oracle(case)


@pytest.mark.parametrize("exchange", ["candidates", "histogram"])
def test_ties_at_the_last_place_go_to_the_lowest_global_index(exchange: Exchange) -> None:
    # Everything ties, over 7 classes on 3 ranks: image 0 (class 5) keeps the negatives 0 to 3.
    similarity = torch.full((2, 7), 0.25)
    case = case_of(similarity, [5, 1], num_negatives=4, row_counts=[1, 0, 1], world_size=3)
    parts = run_ranks(select_on_rank, 3, [case], exchange)
    kept = torch.cat([part[0] for part in parts], dim=1)
    assert kept.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 5, 0, 1, 2, 3, 4]


def test_special_cuts_are_selected_as_sorting_does() -> None:
    generator = torch.Generator().manual_seed(5)

    def similarity(rows: int, columns: int) -> Tensor:
        return torch.randint(-2, 3, (rows, columns), generator=generator) / 4

    cases = [
        # k beyond every partition, and all negatives kept
        case_of(similarity(4, 7), [0, 3, 6, 6], num_negatives=5, row_counts=[2, 1, 1], world_size=3),
        case_of(similarity(4, 7), [0, 3, 6, 6], num_negatives=6, row_counts=[2, 1, 1], world_size=3),
        # two classes on three ranks: the last rank owns none
        case_of(similarity(3, 2), [0, 1, 0], num_negatives=1, row_counts=[1, 1, 1], world_size=3),
        case_of(
            similarity(3, 6),
            [0, 1, 0],
            num_negatives=2,
            row_counts=[1, 1, 1],
            world_size=3,
            proxies_per_class=3,
        ),
        # a short batch: two ranks own no image
        case_of(similarity(1, 7), [2], num_negatives=3, row_counts=[0, 0, 1], world_size=3),
        # a rank whose proxies are all positive
        case_of(
            similarity(2, 6),
            [2, 2],
            num_negatives=3,
            row_counts=[2, 0, 0],
            world_size=3,
            proxies_per_class=2,
        ),
        # one negative only
        case_of(similarity(5, 7), [0, 1, 2, 3, 4], num_negatives=1, row_counts=[0, 4, 1], world_size=3),
    ]
    assert_selected_as_the_oracle_does(cases, world_size=3)


@pytest.mark.parametrize(
    ("ratio", "num_classes", "proxies_per_class", "expected"),
    [
        (0.05, 100, 12, 60),
        (0.05, 98, 12, 59),
        (0.05, 11_318, 1, 566),
        (0.1, 3, 10, 4),
        (0.05, 45, 12, 27),
        (1.0, 7, 3, 21),
    ],
)
def test_k_is_rounded_up_in_the_published_order(
    ratio: float, num_classes: int, proxies_per_class: int, expected: int
) -> None:
    assert num_kept_proxies(num_classes, proxies_per_class, ratio) == expected
