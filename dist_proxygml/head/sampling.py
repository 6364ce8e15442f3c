"""The classes that compete in a step: a share of all, drawn anew, and the batch's own always.

Each class is drawn by a number of its own, a function of (seed, draw, class): the same for any number of ranks, and a
rank draws for its own classes only. So their number varies by a few around share * C. Declined: a fixed number of
classes, which ranks would have to agree on; PartialFC's own share per rank, which depends on the number of ranks.

Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial
FC", CVPR 2022 (arXiv 2203.15565).

Dimension key: R rows (images), c classes of this rank, s those that compete, N proxies per class, D embedding.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_proxygml.head.partition import ClassPartition

_PER_COUNTER = 4  # numbers that Philox gives for each value of its counter


def draw_classes(partition: ClassPartition, share: float, *, seed: int, draw: int) -> np.ndarray:
    """Draw which of this rank's classes compete, bool [c]: each with probability `share`."""
    first = partition.start // _PER_COUNTER
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, draw], dtype=np.uint64), counter=first))
    skipped = partition.start - first * _PER_COUNTER
    is_drawn_c: np.ndarray = generator.random(skipped + partition.num_local)[skipped:] < share
    return is_drawn_c


def competing_classes(is_drawn_c: Tensor, own_class_R: Tensor) -> tuple[Tensor, Tensor]:
    """Add the rows' own classes to those drawn.

    Args:
        is_drawn_c: bool.
        own_class_R: int64, local classes of the rows; outside 0 .. c - 1 where another rank has them.

    Returns:
        The competing classes, int64 [s] ascending, and the position of each row's class among them [R], or -1.
    """
    num_classes = len(is_drawn_c)
    is_here_R = (own_class_R >= 0) & (own_class_R < num_classes)
    place_R = own_class_R.where(is_here_R, num_classes)  # rows of other ranks get a place of their own, not a mask
    is_drawn_1c = torch.nn.functional.pad(is_drawn_c, (0, 1)).index_fill_(0, place_R, True)
    own_position_R = (is_drawn_1c.cumsum(0) - 1)[place_R].where(is_here_R, -1)
    return is_drawn_1c[:num_classes].nonzero().flatten(), own_position_R


def proxies_of(proxies_cND: Tensor, class_s: Tensor, *, sparse: bool) -> Tensor:
    """Take the proxies [s, N, D] of some classes; their gradient is dense over all c, or sparse over the s."""
    taken_sND: Tensor = _TakeClasses.apply(proxies_cND, class_s, sparse)
    return taken_sND


class _TakeClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, proxies_cND, class_s, sparse):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.sparse = proxies_cND.shape, sparse
        ctx.save_for_backward(class_s)
        return proxies_cND.index_select(0, class_s)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_sND):  # type: ignore[no-untyped-def]
        (class_s,) = ctx.saved_tensors
        if ctx.sparse:
            gradient = torch.sparse_coo_tensor(
                class_s[None], gradient_sND, ctx.shape, is_coalesced=True, check_invariants=False
            )
        else:
            gradient = gradient_sND.new_zeros(ctx.shape).index_copy_(0, class_s, gradient_sND)
        return gradient, None, None
