"""The order of an epoch and its cut."""

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_proxygml.data.order import (
    EpochPlan,
    _argsort,
    class_balanced_order,
    class_share_order,
    count_earlier,
    count_steps,
    draw_classes,
    epoch_order,
    evaluation_batches,
    repeated_order,
)


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
    # the index's own type: numpy's unsigned integers have rules of their own
    shards = shards_of(num_samples, num_shards).astype("<u4")
    order = epoch_order(shards, seed=seed, epoch=3, shuffle_window=window)
    assert sorted(order) == list(range(num_samples))
    slots = world_size * accumulation
    batch_size = per_slot * slots
    sizes = expected_sizes(num_samples, batch_size, drop_last)
    if not sizes or min(sizes) < slots:
        with pytest.raises(ValueError, match=r"ranks.*micro-batches.*batch_size"):
            EpochPlan(order, batch_size, accumulation, world_size, drop_last)
        return
    plan = EpochPlan(order, batch_size, accumulation, world_size, drop_last)
    assert [len(plan.step(step)) for step in range(plan.num_steps)] == sizes
    assert plan.num_steps == count_steps(num_samples, batch_size=batch_size, drop_last=drop_last)

    seen: list[int] = []
    for step in range(plan.num_steps):
        of_step = []
        slot_sizes = []
        for micro_step in range(accumulation):
            slots_now = [plan.micro_batch(step, micro_step, rank) for rank in range(world_size)]
            assert {slot.global_size for slot in slots_now} == {sum(len(slot.ids) for slot in slots_now)}
            assert {slot.step_size for slot in slots_now} == {len(plan.step(step))}
            of_step += [sample for slot in slots_now for sample in slot.ids]
            slot_sizes += [len(slot.ids) for slot in slots_now]
        assert 1 <= min(slot_sizes) <= max(slot_sizes) <= min(slot_sizes) + 1
        assert of_step == plan.step(step).tolist()  # for any number of ranks and micro-batches
        seen += of_step
    assert seen == order[: sum(sizes)].tolist()
    assert drop_last or len(seen) == num_samples


def expected_sizes(num_images: int, batch_size: int, drop_last: bool) -> list[int]:
    """Full steps; a rest of at least half a step; a smaller rest shared evenly with the last full step."""
    sizes = [batch_size] * (num_images // batch_size)
    rest = num_images % batch_size
    if rest == 0 or drop_last:
        return sizes
    if sizes and 2 * rest < batch_size:
        return [*sizes[:-1], (batch_size + rest + 1) // 2, (batch_size + rest) // 2]
    return [*sizes, rest]


@pytest.mark.parametrize("num_images", [40, 43, 47, 50])
@pytest.mark.parametrize("batch_size", [10, 4, 6])
def test_stopping_after_any_step_leaves_exactly_the_rest_in_order_for_any_batch_size(
    num_images: int, batch_size: int
) -> None:
    order = epoch_order(shards_of(num_images, 3), seed=0, epoch=0)
    whole = EpochPlan(order, 10, 1, 2)
    consumed = 0
    for step in range(whole.num_steps):
        same = EpochPlan(order, 10, 1, 1, start=consumed)
        assert [same.step(j).tolist() for j in range(same.num_steps)] == [
            whole.step(j).tolist() for j in range(step, whole.num_steps)
        ]
        other = EpochPlan(order, batch_size, 2, 1, start=consumed)
        assert np.array_equal(np.concatenate([other.step(j) for j in range(other.num_steps)]), order[consumed:])
        consumed += len(whole.step(step))
    assert EpochPlan(order, batch_size, 1, 1, start=consumed).num_steps == 0
    with pytest.raises(ValueError, match=r"\bstart\b"):
        EpochPlan(order, batch_size, 1, 1, start=consumed + 1)


def test_the_weights_of_a_steps_micro_batches_average_to_one() -> None:
    plan = EpochPlan(np.arange(19), 12, accumulation=2, world_size=3)  # the last step has 7 images
    assert plan.num_steps == 2
    last = [plan.micro_batch(1, micro_step, rank=0) for micro_step in range(2)]
    assert [batch.global_size for batch in last] == [3, 4]
    assert sum(batch.global_size / batch.step_size for batch in last) == 1


@settings(max_examples=200, deadline=None)
@given(
    class_sizes=st.lists(st.integers(0, 9), min_size=1, max_size=14).filter(any),
    classes_per_batch=st.integers(1, 8),
    images_per_class=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
def test_class_balanced_batches_hold_m_classes_of_k_images_and_use_classes_and_images_evenly(
    class_sizes: list[int], classes_per_batch: int, images_per_class: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(class_sizes)), class_sizes))
    wanted = {"classes_per_batch": classes_per_batch, "images_per_class": images_per_class, "seed": seed}
    num_present = len(np.unique(labels))
    if classes_per_batch > num_present:
        with pytest.raises(ValueError, match=rf"\b{classes_per_batch} classes"):
            class_balanced_order(labels.astype("<i4"), **wanted, epoch=1)
        return
    order = class_balanced_order(labels.astype("<i4"), **wanted, epoch=1)
    batches = order.reshape(-1, classes_per_batch, images_per_class)
    assert len(batches) == max(1, len(labels) // (classes_per_batch * images_per_class))
    uses = np.zeros(len(class_sizes), dtype=int)
    for batch in batches:
        of_group = [np.unique(labels[group]) for group in batch]
        assert all(len(group) == 1 for group in of_group)
        assert len(np.unique(of_group)) == classes_per_batch
        uses[np.concatenate(of_group)] += 1
        for group, label in zip(batch, of_group, strict=True):
            assert len(np.unique(group)) == min(images_per_class, class_sizes[int(label[0])])
    uses = uses[np.array(class_sizes) > 0]
    assert uses.max() - uses.min() <= 1
    times_seen = np.bincount(order, minlength=len(labels))
    for label in np.unique(labels):
        assert np.ptp(times_seen[labels == label]) <= 1


def test_class_balanced_orders_are_functions_of_seed_and_epoch_and_mix_the_classes() -> None:
    labels = np.arange(600) % 20
    first = class_balanced_order(labels, classes_per_batch=7, images_per_class=3, seed=1, epoch=0)
    assert np.array_equal(first, class_balanced_order(labels, classes_per_batch=7, images_per_class=3, seed=1, epoch=0))
    for seed, epoch in ((2, 0), (1, 1)):
        other = class_balanced_order(labels, classes_per_batch=7, images_per_class=3, seed=seed, epoch=epoch)
        assert np.mean(first == other) < 0.1
    groups = labels[first].reshape(-1, 7, 3)[:, :, 0]
    together = {tuple(sorted(batch)) for batch in groups}
    assert len(together) == len(groups)  # no two batches hold the same seven of twenty classes
    small = class_balanced_order(np.arange(9) % 3, classes_per_batch=2, images_per_class=2, seed=0, epoch=0)
    assert small.tolist() == [8, 5, 4, 1, 0, 6, 7, 4]  # resuming relies on it


@settings(max_examples=200, deadline=None)
@given(
    class_sizes=st.lists(st.integers(0, 40), min_size=1, max_size=14).filter(any),
    power=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**40),
)
@example(class_sizes=[6, 1, 40], power=1.0, seed=7676)  # 7 / 47 * 47 is less than 7
def test_a_class_has_its_share_of_an_epoch_and_uses_its_images_in_turn(
    class_sizes: list[int], power: float, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(class_sizes)), class_sizes))
    order = class_share_order(labels.astype("<i4"), power=power, seed=seed, epoch=1)
    assert order.dtype == np.int64
    assert len(order) == len(labels)
    weights = [size**power if size else 0.0 for size in class_sizes]
    for label in range(len(class_sizes)):
        due = len(labels) * weights[label] / math.fsum(weights)
        assert due - 1.01 < int((labels[order] == label).sum()) < due + 1.01  # weights are rounded to 2^-16
    uses = np.zeros(len(labels), dtype=int)
    for image in order:  # none comes again before all others of its class did
        uses[image] += 1
        assert np.ptp(uses[labels == labels[image]]) <= 1
    if power == 1:
        assert sorted(order) == list(range(len(labels)))


def test_no_draw_of_an_epoch_is_missing_where_shares_are_rounded() -> None:
    class_sizes = np.arange(342_046) % 3 + 1  # the sum of weights times the number of images is 1.2 * 2^53
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    order = class_share_order(labels, power=0.5, seed=0, epoch=87_476)  # whose shares are all rounded down
    assert len(order) == len(labels)


def test_shares_are_right_on_average_over_epochs_and_mix_the_classes() -> None:
    class_sizes = np.array([900, 100, 9, 1])
    labels = np.repeat(np.arange(4), class_sizes)
    epochs = [labels[class_share_order(labels, power=0.5, seed=3, epoch=epoch)] for epoch in range(300)]
    drawn = np.array([np.bincount(of_epoch, minlength=4) for of_epoch in epochs])
    expected = 1010 * np.sqrt(class_sizes) / np.sqrt(class_sizes).sum()  # 688.6, 229.5, 68.9, 23.0
    assert drawn.mean(axis=0) == pytest.approx(expected, abs=0.1)  # a deviation of at most 0.5 / sqrt(300)
    assert np.ptp(drawn, axis=0).max() <= 1
    halves = [np.bincount(of_epoch[:505], minlength=4) for of_epoch in epochs]
    assert np.mean(halves, axis=0) == pytest.approx(expected / 2, rel=0.05)


def test_orders_by_class_share_are_functions_of_seed_and_epoch_and_pinned() -> None:
    labels = np.repeat(np.arange(20), np.arange(1, 21))
    first = class_share_order(labels, power=0.5, seed=1, epoch=0)
    assert np.array_equal(first, class_share_order(labels, power=0.5, seed=1, epoch=0))
    for seed, epoch in ((2, 0), (1, 1)):
        assert np.mean(first == class_share_order(labels, power=0.5, seed=seed, epoch=epoch)) < 0.1
    small = class_share_order(np.array([0, 0, 0, 0, 0, 0, 1, 1, 2]), power=0.5, seed=0, epoch=0)
    assert small.tolist() == [3, 7, 1, 8, 4, 6, 5, 7, 8]  # resuming relies on it


@settings(max_examples=200, deadline=None)
@given(
    num_images=st.integers(1, 90),
    num_copies=st.integers(2, 5),
    groups=st.integers(1, 6),
    drop_last=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_a_step_has_all_copies_of_its_images_and_as_many_epochs_as_copies_visit_all_equally(
    num_images: int, num_copies: int, groups: int, drop_last: bool, epoch: int
) -> None:
    whole = epoch_order(shards_of(num_images, 3), seed=2, epoch=epoch)
    if num_images < num_copies:
        with pytest.raises(ValueError, match=rf"repeated_augmentation.*\b{num_images} images.*\b{num_copies}\b"):
            repeated_order(whole, num_copies=num_copies, part=0)
        return
    batch_size, visits = groups * num_copies, np.zeros(num_images, dtype=int)
    for part in range(num_copies):
        order = repeated_order(whole, num_copies=num_copies, part=part)
        assert num_images - num_copies < len(order) <= num_images
        assert set(np.diff(np.flatnonzero(np.diff(order, prepend=-1)))) <= {num_copies}
        earlier = count_earlier(order)
        if drop_last and len(order) < batch_size:
            with pytest.raises(ValueError, match="drop_last=True"):
                EpochPlan(order, batch_size, 1, 1, drop_last, num_copies=num_copies)
            return
        plan = EpochPlan(order, batch_size, 1, 1, drop_last, num_copies=num_copies, earlier=earlier)
        assert plan.num_steps == count_steps(len(order), batch_size=batch_size, drop_last=drop_last)
        taken = 0
        for step in range(plan.num_steps):
            found = plan.micro_batch(step, 0, 0)
            assert len(found.ids) <= batch_size
            assert set(Counter(found.ids.tolist()).values()) == {num_copies}
            assert found.visits is not None
            assert found.visits.tolist() == list(range(num_copies)) * (len(found.ids) // num_copies)
            taken += len(found.ids)
            if taken < len(order):  # a run that stopped here continues with the same images
                rest = EpochPlan(order, batch_size, 1, 1, drop_last, taken, num_copies, earlier)
                assert rest.num_steps == plan.num_steps - step - 1
                if rest.num_steps:
                    assert np.array_equal(rest.step(0), plan.step(step + 1))
        np.add.at(visits, order, 1)
    assert int((visits != num_copies).sum()) == num_images % num_copies
    assert set(visits) <= {0, num_copies}


@settings(max_examples=100, deadline=None)
@given(
    order=st.lists(st.integers(0, 6), min_size=12, max_size=40),
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 2),
)
def test_each_rank_knows_how_often_the_epoch_had_its_images_before(
    order: list[int], world_size: int, accumulation: int
) -> None:
    expected = [order[:place].count(image) for place, image in enumerate(order)]
    earlier = count_earlier(np.array(order, dtype=np.int64))
    assert earlier.tolist() == expected
    batch_size = 2 * world_size * accumulation
    plan = EpochPlan(np.array(order[:24]), batch_size, accumulation, world_size, drop_last=True, earlier=earlier[:24])
    for step in range(plan.num_steps):
        slots = [plan.micro_batch(step, micro, rank) for micro in range(accumulation) for rank in range(world_size)]
        found = [visit for slot in slots for visit in slot.visits.tolist()]  # type: ignore[union-attr]
        assert found == expected[step * batch_size : (step + 1) * batch_size]


@pytest.mark.timeout(240)
def test_an_epoch_of_imagenets_size_is_planned_within_seconds() -> None:
    shards, labels = shards_of(1_281_167, 2563).astype("<u4"), np.arange(1_281_167) % 1000
    for plan in (
        lambda: epoch_order(shards, seed=0, epoch=0),
        lambda: epoch_order(shards, seed=0, epoch=0, shuffle_window=64),
        lambda: class_balanced_order(labels, classes_per_batch=32, images_per_class=4, seed=0, epoch=0),
        lambda: class_share_order(labels, power=0.5, seed=0, epoch=0),
        lambda: count_earlier(labels),
    ):
        started = time.process_time()
        plan()
        assert time.process_time() - started < 3.0


def test_epochs_and_seeds_give_different_orders_and_the_same_ones_give_the_same() -> None:
    shards = shards_of(500, 7)
    first = epoch_order(shards, seed=0, epoch=0)
    assert np.array_equal(first, epoch_order(shards, seed=0, epoch=0))
    for other in (epoch_order(shards, seed=0, epoch=1), epoch_order(shards, seed=1, epoch=0)):
        assert np.mean(first == other) < 0.05
    assert abs(np.corrcoef(first, np.arange(500))[0, 1]) < 0.2


def test_equal_draws_keep_the_order_of_the_index() -> None:
    values = np.random.default_rng(0).integers(0, 50, 2000)
    assert np.array_equal(_argsort(values), sorted(range(2000), key=lambda i: values[i]))


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


def test_batches_that_are_done_are_not_given_out_and_the_others_are_shared_evenly() -> None:
    shares = [
        [int(ids[0]) // 4 for ids in evaluation_batches(23, batch_size=4, rank=rank, world_size=2, done={0, 1, 4})]
        for rank in range(2)
    ]
    assert shares == [[2], [3, 5]]


def test_classes_are_drawn_by_the_seed() -> None:
    order = draw_classes(50, seed=3).tolist()
    assert sorted(order) == list(range(50))
    assert sorted(order[:5]) == [4, 11, 20, 35, 47]  # a run that continues relies on it
    assert order != draw_classes(50, seed=4).tolist()


def test_a_shuffle_window_of_no_shards_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shuffle_window.*\b1\b"):
        epoch_order(shards_of(4, 2), seed=0, epoch=0, shuffle_window=0)
