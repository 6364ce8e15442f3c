"""The regulariser on several ranks: the values and gradients of one process, also where a rank owns nothing."""

import functools

import pytest
import torch
from torch import Tensor

from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head import regularizer
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.regularizer import draw_anchors, proxy_regularizer, sampled_proxy_regularizer
from tests.harness import run_ranks
from tests.problems import ROUNDING, chunks_of, dense, random_proxies, relative_difference, value_and_gradient

# Classes and proxies per class on three ranks: 3 + 3 + 1 classes; 1 + 1 + 0; one class for all.
SHAPES = [(7, 1), (7, 3), (2, 3), (1, 2)]
SEED, DRAW = 4, 9


def anchor_sets(num_classes: int, proxies_per_class: int) -> dict[str, Tensor | None]:
    """What the regulariser is computed from; None: in full."""
    num_proxies = num_classes * proxies_per_class
    return {
        "full": None,
        "every proxy": torch.arange(num_proxies),
        "drawn": draw_anchors(num_proxies, (num_proxies + 1) // 2, seed=SEED, draw=DRAW),
        "one, of the first rank": torch.tensor([0]),
    }


def regularizers_on_rank(context: ParallelContext, numbers: int) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient of this rank's proxies for every shape and set of anchors, in chunks of so many numbers."""
    results = []
    for num_classes, proxies_per_class in SHAPES:
        partition = ClassPartition(num_classes, context.world_size, context.rank)
        own_cND = random_proxies(num_classes, proxies_per_class, 5)[partition.start : partition.stop]
        common = {"partition": partition, "group": context.group, "memory_budget": 1 << 20}
        for anchors_A in anchor_sets(num_classes, proxies_per_class).values():
            function = (
                functools.partial(proxy_regularizer, **common)
                if anchors_A is None
                else functools.partial(sampled_proxy_regularizer, anchors_A=anchors_A, **common)
            )
            with chunks_of(numbers):
                results.append(value_and_gradient(function, own_cND))
    return results


@pytest.mark.parametrize(("world_size", "numbers"), [(1, regularizer._CACHED_NUMBERS), (3, 1), (3, 100)])
def test_ranks_together_give_the_dense_value_and_gradient(world_size: int, numbers: int) -> None:
    ranks = run_ranks(regularizers_on_rank, world_size, numbers)
    cases = [(shape, *item) for shape in SHAPES for item in anchor_sets(*shape).items()]
    for (shape, name, anchors_A), results in zip(cases, zip(*ranks, strict=True), strict=True):
        expected_value, expected_gradient = value_and_gradient(dense, random_proxies(*shape, 5), anchors_A)
        values, gradients = zip(*results, strict=True)
        assert all(torch.equal(value, values[0]) for value in values), (shape, name)
        assert relative_difference(values[0], expected_value, floor=1e-3) < ROUNDING, (shape, name)
        assert relative_difference(torch.cat(gradients), expected_gradient, floor=1e-3) < ROUNDING, (shape, name)


def test_every_rank_draws_the_same_anchors_in_any_world() -> None:
    drawn = {world_size: run_ranks(drawn_on_rank, world_size) for world_size in (1, 3)}
    assert len({tuple(anchors.tolist()) for anchors in [*drawn[1], *drawn[3]]}) == 1


def drawn_on_rank(context: ParallelContext) -> Tensor:
    torch.manual_seed(context.rank)  # the state of a rank's own generator must not matter
    return draw_anchors(1000, 20, seed=SEED, draw=DRAW)
