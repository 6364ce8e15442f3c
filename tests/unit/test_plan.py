"""The order of an epoch and its cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_proxygml.data.plan import EpochPlan, epoch_order, evaluation_batches


def shards_of(num_samples: int, num_shards: int) -> np.ndarray:
    return np.sort(np.arange(num_samples) % num_shards)


@settings(max_examples=200, deadline=None)
@given(
    num_samples=st.integers(1, 200),
    num_shards=st.integers(1, 12),
    window=st.none() | st.integers(1, 15),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    per_slot=st.integers(1, 6),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_visits_every_image_at_most_once_and_all_of_them_unless_it_says_so(
    num_samples: int,
    num_shards: int,
    window: int | None,
    world_size: int,
    accumulation: int,
    per_slot: int,
    drop_last: bool,
    seed: int,
) -> None:
    order = epoch_order(shards_of(num_samples, num_shards), seed=seed, epoch=3, shuffle_window=window)
    assert sorted(order) == list(range(num_samples))
    slots = world_size * accumulation
    batch_size = per_slot * slots
    tail = num_samples % batch_size
    keeps_tail = tail >= slots and not drop_last
    if num_samples < batch_size and not keeps_tail:
        with pytest.raises(ValueError, match="make no step"):
            EpochPlan(order, batch_size, accumulation, world_size, drop_last)
        return
    plan = EpochPlan(order, batch_size, accumulation, world_size, drop_last)

    ranks = [list(plan.micro_batches(rank)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {plan.num_steps * accumulation}
    seen: list[int] = []
    for step in range(plan.num_steps):
        of_step = []
        for micro_step in range(accumulation):
            slots_now = [batches[step * accumulation + micro_step] for batches in ranks]
            sizes = [len(slot.ids) for slot in slots_now]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
            assert {slot.global_size for slot in slots_now} == {sum(sizes)}
            assert {slot.step_size for slot in slots_now} == {len(plan.step(step))}
            of_step += [sample for slot in slots_now for sample in slot.ids]
        assert of_step == plan.step(step).tolist()  # for any number of ranks and micro-batches
        seen += of_step
    assert seen == order[: num_samples - (0 if keeps_tail else tail)].tolist()
    assert plan.num_dropped == (0 if keeps_tail else tail)


def test_the_weights_of_a_steps_micro_batches_average_to_one() -> None:
    plan = EpochPlan(np.arange(17), 12, accumulation=2, world_size=3)  # the last step has 5 images
    assert plan.num_steps == 1
    plan = EpochPlan(np.arange(19), 12, accumulation=2, world_size=3)  # ... and here 7
    assert plan.num_steps == 2
    last = [plan.micro_batch(1, micro_step, rank=0) for micro_step in range(2)]
    assert [batch.global_size for batch in last] == [3, 4]
    assert sum(batch.global_size / batch.step_size for batch in last) == 1


def test_epochs_and_seeds_give_different_orders_and_the_same_ones_give_the_same() -> None:
    shards = shards_of(500, 7)
    first = epoch_order(shards, seed=0, epoch=0)
    assert np.array_equal(first, epoch_order(shards, seed=0, epoch=0))
    for other in (epoch_order(shards, seed=0, epoch=1), epoch_order(shards, seed=1, epoch=0)):
        assert np.mean(first == other) < 0.05
    assert abs(np.corrcoef(first, np.arange(500))[0, 1]) < 0.2


def test_the_order_is_pinned_because_resuming_relies_on_it() -> None:
    order = epoch_order(shards_of(9, 3), seed=5, epoch=2)
    windowed = epoch_order(shards_of(9, 3), seed=5, epoch=2, shuffle_window=1)
    assert order.dtype == windowed.dtype == np.int64
    assert order.tolist() == [8, 1, 5, 6, 3, 7, 0, 4, 2]
    assert windowed.tolist() == [5, 3, 4, 2, 0, 1, 8, 7, 6]


def test_a_shuffle_window_keeps_reads_within_its_shards_and_still_mixes_them() -> None:
    shards = shards_of(3000, 30)
    order = epoch_order(shards, seed=1, epoch=0, shuffle_window=4)
    first = np.full(30, 3000)
    last = np.zeros(30, dtype=int)
    for position, shard in enumerate(shards[order]):
        first[shard] = min(first[shard], position)
        last[shard] = position
    live = [int(np.sum((first <= position) & (position <= last))) for position in range(3000)]
    assert max(live) == 4
    assert np.mean(np.diff(shards[order]) != 0) > 0.6
    assert np.argsort(first).tolist() != list(range(30))


def test_evaluation_batches_cover_every_image_once_on_global_boundaries() -> None:
    alone = evaluation_batches(23, batch_size=4, rank=0, world_size=1)
    assert [len(ids) for ids in alone] == [4, 4, 4, 4, 4, 3]
    for world_size in (2, 3, 4, 9):
        together = [
            ids.tolist()
            for rank in range(world_size)
            for ids in evaluation_batches(23, batch_size=4, rank=rank, world_size=world_size)
        ]
        assert together == [ids.tolist() for ids in alone]
    assert evaluation_batches(23, batch_size=4, rank=0, world_size=9) == []


def test_a_batch_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"batch_size 64 .* 3 ranks x 2 .* batch_size 60 or 66"):
        EpochPlan(np.arange(100), 64, accumulation=2, world_size=3)
    with pytest.raises(ValueError, match=r"use batch_size 6, or one of \[1, 2\] ranks"):
        EpochPlan(np.arange(100), 4, accumulation=2, world_size=3)


def test_a_shuffle_window_of_no_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="shuffle_window must be at least 1"):
        epoch_order(shards_of(4, 2), seed=0, epoch=0, shuffle_window=0)
