"""ClassPartition: which rank owns which classes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_proxygml.head.partition import ClassPartition


def parts(num_classes: int, world_size: int) -> list[ClassPartition]:
    return [ClassPartition(num_classes, world_size, rank) for rank in range(world_size)]


def ranges(num_classes: int, world_size: int) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in parts(num_classes, world_size)]


def test_seven_classes_on_three_ranks_are_three_three_and_one() -> None:
    assert ranges(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert parts(7, 3)[0].counts() == [3, 3, 1]


def test_a_rank_may_own_no_class() -> None:
    assert ranges(2, 3) == [(0, 1), (1, 2), (2, 2)]
    assert ranges(4, 3) == [(0, 2), (2, 4), (4, 4)]
    assert ranges(6, 5) == [(0, 2), (2, 4), (4, 6), (6, 6), (6, 6)]


def test_one_rank_owns_everything_by_default() -> None:
    part = ClassPartition(5)
    assert (part.start, part.stop, part.num_local, part.counts()) == (0, 5, 5, [5])


@given(num_classes=st.integers(1, 200_000), world_size=st.integers(1, 70))
def test_the_ranges_join_up_and_are_those_of_torch_chunk(num_classes: int, world_size: int) -> None:
    split = parts(num_classes, world_size)
    assert split[0].start == 0
    assert split[-1].stop == num_classes
    assert all(left.stop == right.start for left, right in itertools.pairwise(split))
    sizes = [part.num_local for part in split]
    assert sizes == [part.stop - part.start for part in split] == split[-1].counts()
    # What a DTensor placed Shard(0) holds: torch.chunk, and nothing on the ranks left over.
    chunks = [len(chunk) for chunk in torch.arange(num_classes).chunk(world_size)]
    assert sizes == chunks + [0] * (world_size - len(chunks))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 1, 0), "num_classes"), ((5, 3, 3), "rank"), ((5, 3, -1), "rank"), ((5, 0, 0), "rank")],
)
def test_impossible_splits_are_refused_by_name(arguments: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ClassPartition(*arguments)
