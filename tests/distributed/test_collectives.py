"""The differentiable collectives on uneven rows, against sums worked out in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_proxygml.distributed import collectives
from dist_proxygml.distributed.collectives import (
    all_reduce_max,
    all_reduce_sum,
    exchange_rows,
    gather_objects,
    gather_rows,
    gather_rows_on_host,
    group_named,
)
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head.loss import ProxyGMLLoss
from dist_proxygml.head.pml import PmlLoss
from tests.harness import run_ranks

ROW_COUNTS = [[4], [3, 1], [2, 0, 3], [0, 0, 1], [0, 0, 0], [5, 5, 5]]


def rows_of(rank: int, num_rows: int) -> Tensor:
    """Every number of every rank is another one."""
    return 100.0 * rank + torch.arange(num_rows * 2, dtype=torch.float64).reshape(num_rows, 2)


def weights_of(rank: int, num_rows: int) -> Tensor:
    """What this rank does with each of the gathered numbers: every rank something else."""
    return torch.cos(torch.arange(num_rows * 2, dtype=torch.float64) + 10 * rank).reshape(num_rows, 2)


def gather_and_differentiate(context: ParallelContext, row_counts: list[int]) -> tuple[Tensor, Tensor]:
    rows = rows_of(context.rank, row_counts[context.rank]).requires_grad_()
    gathered = gather_rows(rows, row_counts=row_counts, group=context.group)
    (gathered * weights_of(context.rank, sum(row_counts))).sum().backward()
    assert rows.grad is not None
    return gathered.detach(), rows.grad


@pytest.mark.parametrize("row_counts", ROW_COUNTS, ids=str)
def test_rows_are_gathered_in_rank_order_and_gradients_summed_at_their_owner(
    row_counts: list[int],
) -> None:
    world_size = len(row_counts)
    results = run_ranks(gather_and_differentiate, world_size, row_counts)
    everything = torch.cat([rows_of(rank, count) for rank, count in enumerate(row_counts)])
    summed = torch.stack([weights_of(rank, sum(row_counts)) for rank in range(world_size)]).sum(dim=0)
    for gathered, _ in results:
        assert torch.equal(gathered, everything)
    for (_, gradient), expected in zip(results, summed.split(row_counts), strict=True):
        assert gradient.shape == expected.shape
        torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)


def gather_on_host(context: ParallelContext, row_counts: list[int]) -> tuple[Tensor, list[int]]:
    """What is gathered in blocks of four rows of all ranks, and how many rows of a rank each collective carried."""
    crossed: list[int] = []
    gather = collectives.gather_rows

    def counted(rows: Tensor, **options: Any) -> Tensor:
        crossed.append(max(options["row_counts"]))
        return gather(rows, **options)

    collectives.gather_rows = counted
    rows = rows_of(context.rank, row_counts[context.rank])
    gathered = gather_rows_on_host(
        rows, row_counts=row_counts, device=context.device, group=context.group, block_bytes=4 * 16
    )
    collectives.gather_rows = gather
    return gathered, crossed


@pytest.mark.parametrize("row_counts", [[7, 3], [0, 5], [0, 0]], ids=str)
def test_a_table_crosses_the_device_in_blocks(row_counts: list[int]) -> None:
    everything = torch.cat([rows_of(rank, count) for rank, count in enumerate(row_counts)])
    for gathered, crossed in run_ranks(gather_on_host, len(row_counts), row_counts):
        assert torch.equal(gathered, everything)
        assert sum(crossed) == max(row_counts)
        assert max(crossed, default=0) <= 2


def without_a_library(context: ParallelContext) -> bool:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a collective of one rank")

    for name in [name for name in dir(dist) if name.startswith(("all_", "reduce_scatter", "send", "recv"))]:
        setattr(dist, name, refuse)
    group, rows = context.group, torch.arange(6.0).reshape(2, 3)
    same = [
        all_reduce_sum(rows, group=group),
        all_reduce_max(rows, group=group),
        gather_rows(rows, row_counts=[2], group=group),
        gather_rows_on_host(rows, row_counts=[2], device=context.device, group=group),
        *exchange_rows(rows, send_counts=[2], receive_shapes=[(2, 3)], group=group),
    ]
    return all(torch.equal(one, rows) for one in same) and gather_objects("a", group=group) == ["a"]


def test_one_rank_calls_no_library() -> None:
    assert run_ranks(without_a_library, 1) == [True]


def losses_alone(context: ParallelContext) -> list[bool]:
    losses = [ProxyGMLLoss(8, 4, topk=3, group=context.group), PmlLoss("ContrastiveLoss", 8, 4, group=context.group)]
    return [group is None for group in (group_named("world"), *(loss.group for loss in losses))]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_loss_of_one_rank_has_nobody_to_agree_with(num_ranks: int) -> None:
    """What it computes without a group, such as the selection for a sparse gradient, takes half the time."""
    assert run_ranks(losses_alone, num_ranks) == [[num_ranks == 1] * 3] * num_ranks


def gather_integers_and_cubes(context: ParallelContext) -> tuple[Tensor, Tensor]:
    labels = torch.arange(context.rank, dtype=torch.int64) + 10 * context.rank
    bank = torch.full((context.rank, 2, 3), float(context.rank))
    counts = list(range(context.world_size))
    return (
        gather_rows(labels, row_counts=counts, group=context.group),
        gather_rows(bank, row_counts=counts, group=context.group),
    )


def test_labels_and_three_dimensional_banks_are_gathered_too() -> None:
    for labels, bank in run_ranks(gather_integers_and_cubes, 3):
        assert labels.tolist() == [10, 20, 21]
        assert labels.dtype == torch.int64
        assert bank[:, 0, 0].tolist() == [1.0, 2.0, 2.0]
        assert bank.shape == (3, 2, 3)


def reduce_and_differentiate(context: ParallelContext) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.tensor([1.0, -2.0], dtype=torch.float64) * (context.rank + 1)
    value.requires_grad_()
    total = all_reduce_sum(value, group=context.group)
    (total**2).sum().backward()  # every rank computes the same number
    assert value.grad is not None
    largest = all_reduce_max(value, group=context.group)
    assert not largest.requires_grad
    return total.detach(), value.grad, largest


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_sum_over_ranks_has_the_gradient_of_the_shared_number(
    world_size: int,
) -> None:
    count = world_size * (world_size + 1) / 2
    total = torch.tensor([1.0, -2.0], dtype=torch.float64) * count
    largest = torch.tensor([float(world_size), -2.0], dtype=torch.float64)
    for actual, gradient, actual_largest in run_ranks(reduce_and_differentiate, world_size):
        assert torch.equal(actual, total)
        assert torch.equal(gradient, 2 * total)  # d(sum^2)/d(own part), counted once and not once per rank
        assert torch.equal(actual_largest, largest)


def reduce_nothing(context: ParallelContext) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.arange(2.0) + context.rank
    original = value.clone()
    total, largest = (
        all_reduce_sum(value, group=context.group),
        all_reduce_max(value, group=context.group),
    )
    assert torch.equal(value, original), "a collective must not write into its argument"
    return total, largest, all_reduce_sum(torch.zeros(0), group=context.group)


def test_reductions_leave_their_argument_alone_and_take_empty_tensors() -> None:
    for total, largest, empty in run_ranks(reduce_nothing, 2):
        assert total.tolist() == [1.0, 3.0]
        assert largest.tolist() == [1.0, 2.0]
        assert empty.shape == (0,)


def exchange(context: ParallelContext) -> list[Tensor]:
    """Rank r sends each receiver (receiver + 1) rows of width r; those of rank 0 are empty."""
    send_counts = [receiver + 1 for receiver in range(context.world_size)]
    blocks = torch.full((sum(send_counts), context.rank), 7.0 + context.rank)
    blocks += torch.arange(sum(send_counts))[:, None] / 10
    shapes = [(context.rank + 1, sender) for sender in range(context.world_size)]
    assert context.group is not None
    return exchange_rows(blocks, send_counts=send_counts, receive_shapes=shapes, group=context.group)


def test_blocks_of_different_sizes_reach_their_receivers() -> None:
    results = run_ranks(exchange, 3)
    assert [block.shape for block in results[2]] == [(3, 0), (3, 1), (3, 2)]
    torch.testing.assert_close(results[0][2], torch.tensor([[9.0, 9.0]]))
    torch.testing.assert_close(results[1][1], torch.tensor([[8.1], [8.2]]))
    torch.testing.assert_close(results[2][2][:, 0], torch.tensor([9.3, 9.4, 9.5]))


def test_without_a_group_every_collective_is_the_identity() -> None:
    rows = rows_of(0, 3).requires_grad_()
    assert torch.equal(gather_rows(rows, row_counts=[3], group=None), rows)
    assert torch.equal(all_reduce_sum(rows, group=None), rows)
    assert torch.equal(all_reduce_max(rows, group=None), rows)


def gathered_alone(context: ParallelContext) -> bool:
    rows = torch.zeros(3, 2)
    return gather_rows(rows, row_counts=[3], group=context.group) is rows


def test_a_group_of_one_rank_copies_nothing() -> None:
    assert run_ranks(gathered_alone, 1) == [True]
