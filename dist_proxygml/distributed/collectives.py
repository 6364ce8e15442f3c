"""Differentiable collectives over ragged rows; `group=None` means one process.

Every function is called on all ranks of `group`. The loss is the same number on every rank, and every rank runs
backward on its own copy of it. That fixes the backward rules:

    gather_rows      forward: all-gather in rank order     backward: reduce-scatter SUM, as each copy holds a part
    all_reduce_sum   forward: SUM                          backward: identity, as the copies of the sum are one number

A group of one rank calls no library: on GPUs each call would cost a kernel, and NCCL's start.

SUM, never AVG: an engine's averaging is undone once, by name, in head/loss.py. Rows are padded to the longest rank
because gloo and NCCL gather equal blocks only; batches and partitions differ by a few rows, so padding costs next to
nothing.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass
class Traffic:
    """Bytes that this rank received from others; an all-reduce counts as in the ring algorithm."""

    received: int = 0


_traffic: contextvars.ContextVar[Traffic | None] = contextvars.ContextVar("traffic", default=None)


@contextlib.contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count the bytes that this rank receives from this module's collectives inside the block, and in the backward
    passes of what was computed inside. `gather_objects` is not counted.
    """
    traffic = Traffic()
    token = _traffic.set(traffic)
    try:
        yield traffic
    finally:
        _traffic.reset(token)


def _count(traffic: Traffic | None, received: float) -> None:
    if traffic is not None:
        traffic.received += round(received)


class AgreedError(ValueError):
    """A user's mistake that all ranks know of and raise, so that one of them may report it for all."""

    status = 2  # exit status of the process


class NonFiniteError(AgreedError):
    """NaN or infinity where finite numbers are needed: training may skip a step or roll back, evaluation must end."""

    status = 65  # EX_DATAERR of sysexits.h: starting it again does not help


def group_named(group: dist.ProcessGroup | Literal["world"] | None) -> dist.ProcessGroup | None:
    """Return the default process group for "world", another group as it is, and None for one that has but this rank:
    there is nobody to agree with.

    Raises:
        ValueError: another string, or no process group has been initialised.
    """
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f'expected group to be a process group, "world" or None, got {group!r}')
        if not dist.is_initialized():
            raise ValueError(
                'expected a default process group for group="world", got none; call '
                "torch.distributed.init_process_group() before, or use group=None for this process alone"
            )
        group = dist.group.WORLD
    return None if world_size_of(group) == 1 else group


def world_size_of(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of the group; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """Return this process's rank in the group; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def gather_rows(rows: Tensor, *, row_counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate all ranks' rows in rank order: [row_counts[rank], ...] -> [sum(row_counts), ...].

    Forward: all-gather. Backward: reduce-scatter SUM, each rank receiving the gradient of its own rows.
    """
    if world_size_of(group) == 1:
        return rows
    return _GatherRows.apply(rows, tuple(row_counts), group)


def gather_rows_on_host(
    rows: Tensor,
    *,
    row_counts: Sequence[int],
    device: torch.device,
    group: dist.ProcessGroup | None,
    block_bytes: int = 256 << 20,
) -> Tensor:
    """Concatenate all ranks' rows in rank order, from and to memory of the CPU. Called on all ranks; no gradient.

    The rows cross `device`, which the group communicates from, a block at a time: it never holds the whole.

    Args:
        rows: [row_counts[rank], ...], on the CPU.
        row_counts: of all ranks.
        device: of this rank.
        group: the ranks.
        block_bytes: what a block of all ranks takes, at least a row of each.

    Returns:
        [sum(row_counts), ...] on the CPU.
    """
    if world_size_of(group) == 1:
        return rows
    whole = rows.new_empty((sum(row_counts), *rows.shape[1:]))
    parts = whole.split(list(row_counts))
    step = max(1, block_bytes // max(1, whole[:1].nbytes * len(row_counts)))
    for first in range(0, max(row_counts), step):
        counts = [max(0, min(step, count - first)) for count in row_counts]
        block = gather_rows(rows[first : first + step].to(device), row_counts=counts, group=group).cpu()
        for part, received in zip(parts, block.split(counts), strict=True):
            part[first : first + len(received)] = received
    return whole


def all_reduce_sum(value: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks. Forward: all-reduce SUM. Backward: identity, for values that every rank uses in the same way."""
    return value if world_size_of(group) == 1 else _AllReduceSum.apply(value, group)


def all_reduce_max(value: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Take the elementwise maximum over ranks. No gradient."""
    if group is None or world_size_of(group) == 1:
        return value.detach()
    value = value.detach().clone()
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    _count(_traffic.get(), _all_reduced_bytes(value, group))
    return value


def exchange_rows(
    blocks: Tensor,
    *,
    send_counts: Sequence[int],
    receive_shapes: Sequence[tuple[int, int]],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Send consecutive row blocks of a matrix to the ranks in order; receive one block from each. No gradient.

    Args:
        blocks: [sum(send_counts), width]; rank r receives the r-th block of send_counts[r] rows.
        send_counts: rows for each rank.
        receive_shapes: (rows, width) of the block that each rank sends here.
        group: the ranks that exchange.

    Returns:
        The received blocks in rank order.
    """
    if world_size_of(group) == 1:
        return [blocks.reshape(receive_shapes[0])]
    width = blocks.shape[1]
    receive_sizes = [rows * columns for rows, columns in receive_shapes]
    received = blocks.new_empty(sum(receive_sizes))
    dist.all_to_all_single(
        received, blocks.contiguous().view(-1), receive_sizes, [count * width for count in send_counts], group=group
    )
    from_others = sum(receive_sizes) - receive_sizes[dist.get_rank(group)]
    _count(_traffic.get(), from_others * blocks.element_size())
    return [part.view(shape) for part, shape in zip(received.split(receive_sizes), receive_shapes, strict=True)]


def gather_objects(value: T, *, group: dist.ProcessGroup | None) -> list[T]:
    """Gather the small picklable `value` of every rank, in rank order. Slow: for messages and set-up, not steps."""
    values: list[T] = [value] * world_size_of(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def gather_to_rank_zero(rows: Tensor, *, row_counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor | None:
    """Concatenate all ranks' rows in rank order in memory of rank 0's CPU, part by part. Called on all ranks.

    Returns:
        [sum(row_counts), ...] on rank 0, a copy; None elsewhere.
    """
    rows = rows.detach().contiguous()
    if rank_in(group) != 0:
        if len(rows):
            dist.send(rows, group_dst=0, group=group)
        return None
    whole = torch.empty((sum(row_counts), *rows.shape[1:]), dtype=rows.dtype)
    for rank, part in enumerate(whole.split(list(row_counts))):
        if rank and len(part):
            received = rows.new_empty(part.shape)
            dist.recv(received, group_src=rank, group=group)
            part.copy_(received)
        elif not rank:
            part.copy_(rows)
    return whole


def scatter_from_rank_zero(
    whole: Tensor | None, own: Tensor, *, row_counts: Sequence[int] | None, group: dist.ProcessGroup | None
) -> None:
    """Fill each rank's `own` with its rows of rank 0's `whole`; without `row_counts`, with all of it. Called on all
    ranks; `own` is contiguous and of the type of `whole`.
    """
    if whole is None:
        if own.numel():
            dist.recv(own, group_src=0, group=group)
        return
    num_ranks = world_size_of(group)
    parts = whole.split(list(row_counts)) if row_counts is not None else (whole,) * num_ranks
    own.copy_(parts[0])
    for rank in range(1, num_ranks):
        if parts[rank].numel():
            dist.send(parts[rank].to(own.device).contiguous(), group_dst=rank, group=group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, row_counts, group):  # type: ignore[no-untyped-def]
        ctx.row_counts, ctx.group, ctx.traffic = row_counts, group, _traffic.get()
        longest = max(row_counts)
        padded = _pad_rows(rows, longest)
        gathered = rows.new_empty((len(row_counts) * longest, *rows.shape[1:]))
        _collective("all_gather_single", "all_gather_into_tensor")(gathered, padded, group=group)
        _count(ctx.traffic, gathered.nbytes - padded.nbytes)
        blocks = gathered.view(len(row_counts), longest, *rows.shape[1:])
        return torch.cat([block[:count] for block, count in zip(blocks, row_counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        longest = max(ctx.row_counts)
        padded = torch.cat([_pad_rows(block, longest) for block in gradient.split(ctx.row_counts)])
        own = gradient.new_empty((longest, *gradient.shape[1:]))
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, padded, dist.ReduceOp.SUM, group=ctx.group)
        _count(ctx.traffic, padded.nbytes - own.nbytes)
        return own[: ctx.row_counts[dist.get_rank(ctx.group)]], None, None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):  # type: ignore[no-untyped-def]
        total = value.clone()
        dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
        _count(_traffic.get(), _all_reduced_bytes(total, group))
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, None


def _all_reduced_bytes(value: Tensor, group: dist.ProcessGroup) -> float:
    world_size = dist.get_world_size(group)
    return 2 * (world_size - 1) / world_size * value.nbytes


def _pad_rows(rows: Tensor, length: int) -> Tensor:
    rows = rows.contiguous()
    if rows.shape[0] == length:
        return rows
    return torch.cat([rows, rows.new_zeros((length - rows.shape[0], *rows.shape[1:]))])


def _collective(name: str, earlier_name: str) -> Callable[..., Any]:
    """Look up a collective of torch by name; `earlier_name` is that of torch 2.9, deprecated since."""
    return getattr(dist, name) if hasattr(dist, name) else getattr(dist, earlier_name)
