"""The harness of the multi-process tests: a rank that fails, dies or hangs is never missed."""

import multiprocessing
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks


def sum_of_ranks(context: ParallelContext, start: float) -> tuple[int, int, int, torch.Tensor]:
    total = torch.tensor([context.rank + start])
    dist.all_reduce(total, group=context.group)
    return context.rank, context.world_size, torch.get_num_threads(), total


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_in_rank_order_from_a_working_group(world_size: int) -> None:
    results = run_ranks(sum_of_ranks, world_size, 0.5)
    assert [result[:3] for result in results] == [(rank, world_size, 1) for rank in range(world_size)]
    expected = world_size * (world_size - 1) / 2 + world_size * 0.5
    assert all(total.tolist() == [expected] for *_, total in results)


def fail_on_rank_one(context: ParallelContext, how: str) -> None:
    if context.rank == 1:
        if how == "raise":
            raise ValueError("the batch is odd")
        if how == "die":
            os._exit(3)
        threading.Event().wait()
    dist.all_reduce(torch.zeros(1), group=context.group)


def test_the_error_of_the_rank_that_failed_first_is_raised_with_its_traceback() -> None:
    with pytest.raises(ValueError, match="rank 1: ValueError: the batch is odd") as raised:
        run_ranks(fail_on_rank_one, 3, "raise")
    assert "in fail_on_rank_one" in str(raised.value)
    assert multiprocessing.active_children() == []


def test_a_rank_that_dies_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1: .*exit code 3"):
        run_ranks(fail_on_rank_one, 2, "die")
    assert multiprocessing.active_children() == []


def test_ranks_that_hang_are_killed_after_the_time_out() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="after 1 s"):
        run_ranks(fail_on_rank_one, 2, "hang", timeout=1.0)
    assert time.monotonic() - start < 30  # far below the default, far above a busy machine's delay
    assert multiprocessing.active_children() == []
