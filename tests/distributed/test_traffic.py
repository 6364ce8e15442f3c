"""Bytes that a step brings to a rank: counted in the collectives, equal to the formula, independent of the classes."""

import pytest
import torch

from dist_proxygml.distributed.collectives import (
    all_reduce_max,
    all_reduce_sum,
    count_bytes,
    exchange_rows,
    gather_rows,
)
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.head.loss import ProxyGMLLoss
from dist_proxygml.head.traffic import SELECTIONS, bytes_per_step, cheapest_selection
from tests.harness import run_ranks

BATCH, DIM, TOPK = 12, 5, 9


def received(context: ParallelContext, sizes: list[tuple[int, int]]) -> dict[tuple[int, int, str], int]:
    """Bytes that this rank received in one step, for each (classes, proxies per class, selection)."""
    counted = {}
    own = BATCH // context.world_size
    embeddings = torch.nn.functional.normalize(torch.randn(own, DIM), dim=1)
    for num_classes, per_class in sizes:
        for selection in SELECTIONS:
            loss = ProxyGMLLoss(
                num_classes, DIM, proxies_per_class=per_class, topk=TOPK, group=context.group, selection=selection
            )
            with count_bytes() as traffic:
                total = loss(embeddings.clone().requires_grad_(), torch.arange(own) % num_classes).total
            total.backward()
            counted[num_classes, per_class, selection] = traffic.received
    return counted


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_rank_0_receives_is_the_formula(world_size: int) -> None:
    sizes = [(8, 2), (400, 2), (13, 2), (6, 3), (5001, 1)]
    for (num_classes, per_class, selection), count in run_ranks(received, world_size, sizes)[0].items():
        expected = bytes_per_step(
            selection,
            batch_size=BATCH,
            num_classes=num_classes,
            proxies_per_class=per_class,
            embedding_dim=DIM,
            topk=TOPK,
            world_size=world_size,
        )
        assert count == expected, (num_classes, per_class, selection)
        assert (count > 0) == (world_size > 1)


def test_more_classes_bring_no_more_bytes_unless_the_bank_is_gathered() -> None:
    counted = run_ranks(received, 2, [(400, 1), (4000, 1)])[0]
    for selection in ("candidates", "histogram"):
        assert counted[400, 1, selection] == counted[4000, 1, selection]
    assert counted[4000, 1, "gather"] > 9 * counted[400, 1, "gather"]


def test_the_selection_that_receives_the_fewest_bytes_is_chosen() -> None:
    few = {"batch_size": 256, "num_classes": 100, "proxies_per_class": 1, "embedding_dim": 512, "topk": 60}
    many = {"batch_size": 64, "num_classes": 1_000_000, "proxies_per_class": 1, "embedding_dim": 512, "topk": 500}
    most = {"batch_size": 64, "num_classes": 1_000_000, "proxies_per_class": 1, "embedding_dim": 512, "topk": 50_000}
    for sizes, expected in ((few, "gather"), (many, "candidates"), (most, "histogram")):
        assert cheapest_selection(**sizes, world_size=4) == expected
        cost = {selection: bytes_per_step(selection, **sizes, world_size=4) for selection in SELECTIONS}
        assert cost[expected] == min(cost.values())
    assert cheapest_selection(**few, world_size=4, may_gather=False) == "candidates"
    # three quarters of the bank come from others, in float32, forward and backward
    sizes_and_loss = 3 * 16 + 2 * 3 / 4 * 8
    assert bytes_per_step("gather", **many, world_size=4) == 3 * 250_000 * 512 * 8 + sizes_and_loss


def every_collective(context: ParallelContext) -> list[int]:
    """What each of them brings to this rank: 3 ranks, 24 bytes a row, rank r holding r + 1 rows."""
    counts = []
    rows = torch.zeros(context.rank + 1, 6, requires_grad=True)
    with count_bytes() as traffic:
        gathered = gather_rows(rows, row_counts=[1, 2, 3], group=context.group)
        counts.append(traffic.received)
    gathered.sum().backward()
    counts.append(traffic.received - counts[0])
    for reduce in (all_reduce_sum, all_reduce_max):
        with count_bytes() as traffic:
            reduce(torch.zeros(6), group=context.group)
        counts.append(traffic.received)
    with count_bytes() as traffic:
        blocks = torch.zeros(6, context.rank + 1)
        shapes = [(context.rank + 1, rank + 1) for rank in range(3)]
        exchange_rows(blocks, send_counts=[1, 2, 3], receive_shapes=shapes, group=context.group)
    gather_rows(rows.detach(), row_counts=[1, 2, 3], group=context.group)  # outside: not counted
    return [*counts, traffic.received]


def test_every_collective_counts_what_comes_from_others() -> None:
    reduced = round(2 * 2 / 3 * 24)
    for rank, counts in enumerate(run_ranks(every_collective, 3)):
        own_rows, other_columns = rank + 1, 6 - (rank + 1)
        assert counts == [2 * 3 * 24, 2 * 3 * 24, reduced, reduced, own_rows * other_columns * 4]


def test_one_process_receives_nothing() -> None:
    assert set(received(single_process(), [(40, 2)]).values()) == {0}
