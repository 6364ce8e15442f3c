"""The proxy regulariser: every proxy is classified against the class sums of all proxies, its own similarity included.

    u_j = p_j / |p_j|     s_c = sum of u_j over the N proxies of class c
    full      mean over all P proxies    of  log sum_c exp(u_j . s_c) - u_j . s_class(j)
    sampled   mean over A drawn proxies  of  the same, with all C classes under the logarithm

Class sums reduce P x P to P x C. The full form gathers them, [C, D] on every rank, and each rank classifies its own
proxies. Where they do not fit, each rank contributes the anchors it owns, [A, D] on every rank, and its own classes'
terms of every anchor's log-sum-exp. Because every denominator is complete, the sampled form is unbiased in value and
gradient. Declined: sampling the classes too (the logarithm of an estimate is biased), anchors from the batch's classes
(biased towards frequent classes), a seed per rank (the anchors would depend on the number of ranks).

Both take unnormalised proxies, process chunks of classes that fit a budget, and return the gradient of the unnormalised
proxies: neither [P, C], nor unit copies of the proxies, nor any [c, N, D] besides the gradient is materialised.

Source: Zhu et al., "Fewer is More: A Deep Graph Metric Learning Perspective Using Fewer Proxies", NeurIPS 2020 (arXiv
2010.13636), section 3.4; the estimator is ours.

Dimension key: a/A anchors of this rank / over the group, c/C classes, p/P proxies, N proxies per class, D embedding, w
classes and n = w * N proxies of a chunk, o entries that are an anchor's own class; lower case is this rank's slice.
"""

import itertools
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_proxygml.distributed.collectives import all_reduce_max, all_reduce_sum, gather_rows
from dist_proxygml.head.bank import NORM_FLOOR
from dist_proxygml.head.matmul import product
from dist_proxygml.head.partition import ClassPartition

# Elements of a chunk on a CPU: 8 MiB in float32, small enough to stay in the cache between passes.
_CACHED_NUMBERS = 1 << 21


def proxy_regularizer(
    proxies_cND: Tensor, *, partition: ClassPartition, group: dist.ProcessGroup | None, memory_budget: int
) -> Tensor:
    """Compute the mean cross entropy of all proxies, a scalar.

    Called on all ranks of `group`; every rank returns the same value.
    Forward: the class sums are gathered, one number is reduced. Backward: every rank runs it on its own copy of the
    value; the class sums' gradient is summed over ranks, the proxies' is complete on their rank.

    Args:
        proxies_cND: this rank's proxies, of any length.
        partition: the classes of this rank.
        group: the ranks; None for one process.
        memory_budget: bytes per rank for class sums and logits. The class sums of all classes and their gradient are
            allocated in any case; `regularizer_anchors` decides whether they fit.
    """
    return _Full.apply(proxies_cND, partition, group, memory_budget)


def sampled_proxy_regularizer(
    proxies_cND: Tensor,
    anchors_A: Tensor,
    *,
    partition: ClassPartition,
    group: dist.ProcessGroup | None,
    memory_budget: int,
) -> Tensor:
    """Compute the mean cross entropy of the anchors, a scalar; its expectation over draws is `proxy_regularizer`.

    Called on all ranks of `group`; every rank returns the same value.
    Forward: the anchors are gathered, three vectors of length A are reduced. Backward: every rank runs it on its own
    copy of the value; the anchors' gradient is summed over ranks, the proxies' is complete on their rank.

    Args:
        proxies_cND: this rank's proxies, of any length.
        anchors_A: global proxy indices (class * N + index in the class), int64 on the CPU, ascending, at least one; the
            same on every rank.
        partition: the classes of this rank.
        group: the ranks; None for one process.
        memory_budget: bytes per rank for anchors, class sums and logits. The anchors and their gradient are allocated
            in any case.

    Raises:
        ValueError: the anchors are not ascending proxy indices.
    """
    anchors_A = anchors_A.cpu()
    num_proxies = partition.num_classes * proxies_cND.shape[1]
    ascending = bool((anchors_A[1:] > anchors_A[:-1]).all())
    if len(anchors_A) == 0 or not ascending or anchors_A[0] < 0 or anchors_A[-1] >= num_proxies:
        raise ValueError(
            f"expected at least one proxy index from 0 to {num_proxies - 1}, ascending, got {anchors_A.tolist()[:8]} "
            "(the first ones); use draw_anchors"
        )
    return _Sampled.apply(proxies_cND, anchors_A, partition, group, memory_budget)


def regularizer_anchors(
    num_classes: int,
    embedding_dim: int,
    *,
    proxies_per_class: int,
    wanted: int | None,
    memory_budget: int,
    batch_size: int,
) -> int | None:
    """Return the number of anchors that estimate the regulariser; None: it is computed in full.

    It is computed in full where the float32 class sums of all classes and their gradient take at most a third of the
    budget. Another third holds their transposed copy and the buffer of their reduction, the last third the logits.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        proxies_per_class: N.
        wanted: the number, whatever the budget; None lets the budget decide.
        memory_budget: bytes per rank.
        batch_size: images of the micro-batch over all ranks; also the number of anchors where `wanted` is None, so that
            the regulariser costs 1/N of the similarities.
    """
    if wanted is None:
        if 2 * num_classes * embedding_dim * 4 <= memory_budget // 3:
            return None
        wanted = max(1, min(batch_size, memory_budget // (40 * embedding_dim)))  # half of it for them
    return wanted if wanted < num_classes * proxies_per_class else None


def draw_anchors(num_proxies: int, num_anchors: int, *, seed: int, draw: int) -> Tensor:
    """Sample proxies 0 .. num_proxies-1 uniformly without replacement: int64 [num_anchors], ascending.

    A pure function of its arguments, so the same on every rank and for any number of ranks. Memory grows with the
    sample, not the bank: numpy uses Floyd's algorithm, and a list of all proxies only for samples over a twentieth.

    Raises:
        ValueError: more anchors than proxies, or none.
    """
    if not 1 <= num_anchors <= num_proxies:
        raise ValueError(f"expected 1 to {num_proxies} anchors of {num_proxies} proxies, got {num_anchors}")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, draw])))
    drawn_A = generator.choice(num_proxies, size=num_anchors, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn_A)).to(torch.int64)


class _Full(torch.autograd.Function):
    """Each rank's own proxies against the class sums of all ranks."""

    @staticmethod
    def forward(ctx, proxies_cND, partition, group, memory_budget):  # type: ignore[no-untyped-def]
        num_per_class, dim = proxies_cND.shape[1:]
        norm_cN = torch.linalg.vector_norm(proxies_cND, dim=2)
        inverse_cN = _inverse(norm_cN)
        sums_cD = _class_sums(proxies_cND, inverse_cN)
        sums_CD = gather_rows(sums_cD, row_counts=partition.counts(), group=group)
        ctx.chunks = _chunks_of_classes(
            proxies_cND,
            # logits, their log-softmax, the previous chunk; proxies transposed, products before summation
            numbers_per_class=num_per_class * (3 * len(sums_CD) + 2 * dim),
            numbers_besides=3 * sums_CD.numel(),  # class sums, their gradient, and its sum over ranks
            memory_budget=memory_budget,
        )
        total, probability_nC = proxies_cND.new_zeros(()), None
        for chunk in ctx.chunks:
            log_probability_nC = _log_probabilities(proxies_cND[chunk], inverse_cN[chunk], sums_CD)
            total -= _of_own_class(log_probability_nC, partition.start + chunk.start, num_per_class).sum()
            if len(ctx.chunks) == 1 and ctx.needs_input_grad[0]:  # saves a product in backward
                probability_nC = log_probability_nC.exp_()
        ctx.partition, ctx.group = partition, group
        ctx.save_for_backward(proxies_cND, norm_cN, inverse_cN, sums_CD, probability_nC)
        return all_reduce_sum(total, group=group) / (partition.num_classes * num_per_class)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        proxies_cND, norm_cN, inverse_cN, sums_CD, kept_probability_nC = ctx.saved_tensors
        partition, num_per_class = ctx.partition, proxies_cND.shape[1]
        scale_cN = inverse_cN * (gradient / (partition.num_classes * num_per_class))

        # 1. Through the anchors' side of the logits u_j . s_c, and the class sums' gradient from this rank's anchors.
        d_proxies_cND = torch.empty(proxies_cND.shape, dtype=proxies_cND.dtype, device=proxies_cND.device)
        d_sums_CD = torch.zeros_like(sums_CD)
        for chunk in ctx.chunks:
            scale_n1 = scale_cN[chunk].view(-1, 1)
            if kept_probability_nC is None:
                d_logits_nC = _log_probabilities(proxies_cND[chunk], inverse_cN[chunk], sums_CD).exp_().mul_(scale_n1)
            else:
                d_logits_nC = kept_probability_nC * scale_n1
            own_Nw = _of_own_class(d_logits_nC, partition.start + chunk.start, num_per_class)
            own_Nw -= scale_cN[chunk].T
            torch.mm(d_logits_nC, sums_CD, out=d_proxies_cND[chunk].view(-1, sums_CD.shape[1]))
            d_sums_CD.addmm_(d_logits_nC.T, proxies_cND[chunk].flatten(0, 1))

        # 2. Through the class sums, to which every rank's anchors contribute.
        d_sums_cD = all_reduce_sum(d_sums_CD, group=ctx.group)[partition.start : partition.stop]
        for chunk in ctx.chunks:
            d_proxies_wND = d_proxies_cND[chunk]
            d_proxies_wND.addcmul_(inverse_cN[chunk, :, None], d_sums_cD[chunk, None])
            _remove_radial_part_(d_proxies_wND, proxies_cND[chunk], norm_cN[chunk], inverse_cN[chunk])
        return d_proxies_cND, None, None, None


class _Sampled(torch.autograd.Function):
    """The anchors of all ranks against each rank's own class sums."""

    @staticmethod
    def forward(ctx, proxies_cND, anchors_A, partition, group, memory_budget):  # type: ignore[no-untyped-def]
        num_per_class, dim = proxies_cND.shape[1:]
        num_anchors = len(anchors_A)

        # 1. Gather the anchors. They ascend, so a rank's are adjacent, as are a class's.
        counts = torch.tensor([0, *partition.counts()]).cumsum(0) * num_per_class
        first_rows = torch.searchsorted(anchors_A, counts).tolist()
        own_rows = slice(*first_rows[partition.rank : partition.rank + 2])
        own_a = (anchors_A[own_rows] - partition.start * num_per_class).to(proxies_cND.device)
        proxies_aD = proxies_cND.flatten(0, 1)[own_a]
        norm_a = torch.linalg.vector_norm(proxies_aD, dim=1)
        anchors_AD = gather_rows(
            proxies_aD * _inverse(norm_a)[:, None],
            row_counts=[stop - start for start, stop in itertools.pairwise(first_rows)],
            group=group,
        )

        # 2. This rank's classes in every anchor's log-sum-exp; the anchor's own class on the rank that owns it.
        class_A = anchors_A // num_per_class - partition.start
        chunks = _chunks_of_classes(
            proxies_cND,
            # logits, their log-sum-exp, the previous chunk; class sums likewise; products as above, and norms
            numbers_per_class=3 * num_anchors + 5 * dim + num_per_class * (dim + 4),
            numbers_besides=5 * anchors_AD.numel(),  # anchors, transposed, their gradient, its addend, its sum
            memory_budget=memory_budget,
        )
        ctx.chunks = [(chunk, *_own_entries(class_A, chunk, proxies_cND.device)) for chunk in chunks]
        local_log_sum_A = anchors_AD.new_full((num_anchors,), -math.inf)
        local_target_A = anchors_AD.new_zeros(num_anchors)
        for chunk, class_o, anchor_o in ctx.chunks:
            proxies_wND = proxies_cND[chunk]
            sums_wD = _class_sums(proxies_wND, _inverse(torch.linalg.vector_norm(proxies_wND, dim=2)))
            logits_wA = product(sums_wD, anchors_AD)
            local_target_A[anchor_o] = logits_wA[class_o, anchor_o]
            local_log_sum_A = torch.logaddexp(local_log_sum_A, logits_wA.logsumexp(dim=0))

        # 3. All ranks' classes.
        max_A = all_reduce_max(local_log_sum_A, group=group)
        sums_2A = all_reduce_sum(torch.stack([(local_log_sum_A - max_A).exp(), local_target_A]), group=group)
        log_sum_A = max_A + sums_2A[0].log()
        ctx.group, ctx.own_rows = group, own_rows
        ctx.save_for_backward(proxies_cND, own_a, norm_a, anchors_AD, log_sum_A)
        return (log_sum_A - sums_2A[1]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        proxies_cND, own_a, norm_a, anchors_AD, log_sum_A = ctx.saved_tensors
        scale = gradient / len(anchors_AD)

        # 1. The class sums' gradient, which is that of each of their unit proxies, and the anchors' from these classes.
        d_proxies_cND = torch.empty(proxies_cND.shape, dtype=proxies_cND.dtype, device=proxies_cND.device)
        d_anchors_AD, anchors_DA = torch.zeros_like(anchors_AD), anchors_AD.T.contiguous()
        for chunk, class_o, anchor_o in ctx.chunks:
            proxies_wND, d_proxies_wND = proxies_cND[chunk], d_proxies_cND[chunk]
            norm_wN = torch.linalg.vector_norm(proxies_wND, dim=2)
            inverse_wN = _inverse(norm_wN)
            sums_wD = _class_sums(proxies_wND, inverse_wN)
            d_logits_wA = product(sums_wD, anchors_AD).sub_(log_sum_A).exp_()
            d_logits_wA[class_o, anchor_o] -= 1
            d_anchors_AD += product(d_logits_wA.T, sums_wD.T)
            d_sums_wD = product(d_logits_wA, anchors_DA)
            torch.mul(d_sums_wD[:, None], (scale * inverse_wN)[:, :, None], out=d_proxies_wND)
            _remove_radial_part_(d_proxies_wND, proxies_wND, norm_wN, inverse_wN)

        # 2. The anchors' gradient from all classes, back on the rank that owns them.
        d_anchors_aD = all_reduce_sum(d_anchors_AD.mul_(scale), group=ctx.group)[ctx.own_rows]
        inverse_a = _inverse(norm_a)
        d_anchors_aD = d_anchors_aD * inverse_a[:, None]
        _remove_radial_part_(d_anchors_aD, proxies_cND.flatten(0, 1)[own_a], norm_a, inverse_a)
        d_proxies_cND.view(-1, proxies_cND.shape[2]).index_add_(0, own_a, d_anchors_aD)
        return d_proxies_cND, None, None, None, None


def _inverse(norm: Tensor) -> Tensor:
    return norm.clamp_min(NORM_FLOOR).reciprocal()


def _class_sums(proxies_wND: Tensor, inverse_wN: Tensor) -> Tensor:
    """Sums [w, D] of each class's unit proxies; without a unit copy of the proxies, and faster than bmm for small N."""
    if proxies_wND.is_cuda:  # one kernel instead of N
        return torch.bmm(inverse_wN[:, None], proxies_wND)[:, 0]
    sums_wD = proxies_wND[:, 0] * inverse_wN[:, 0, None]
    for i in range(1, proxies_wND.shape[1]):
        sums_wD.addcmul_(proxies_wND[:, i], inverse_wN[:, i, None])
    return sums_wD


def _log_probabilities(proxies_wND: Tensor, inverse_wN: Tensor, sums_CD: Tensor) -> Tensor:
    """Log-softmax [n, C] of the unit proxies' products with the class sums."""
    logits_nC = product(proxies_wND.flatten(0, 1), sums_CD)
    return logits_nC.mul_(inverse_wN.view(-1, 1)).log_softmax(dim=1)


def _of_own_class(matrix_nC: Tensor, first_class: int, num_per_class: int) -> Tensor:
    """Return a view [N, w] of each proxy's entry for its own class; rows are the proxies of the classes from
    `first_class` on.
    """
    num_classes = len(matrix_nC) // num_per_class
    matrix_wNw = matrix_nC.view(num_classes, num_per_class, -1)[:, :, first_class : first_class + num_classes]
    return matrix_wNw.diagonal(dim1=0, dim2=2)


def _own_entries(class_A: Tensor, classes: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Locate the entries (class in the chunk [o], anchor [o]) of a chunk that are an anchor's own class.

    `class_A` is ascending, on the CPU.
    """
    first, stop = torch.searchsorted(class_A, torch.tensor([classes.start, classes.stop])).tolist()
    return (class_A[first:stop] - classes.start).to(device), torch.arange(first, stop, device=device)


def _remove_radial_part_(gradient: Tensor, proxies: Tensor, norm: Tensor, inverse: Tensor) -> None:
    """Turn the gradient of unit proxies, divided by norms [...], into that of the proxies [..., D], in place.

    d u / d p = (1 - u u^T) / |p|. A proxy below the floor was divided by a constant and keeps its radial part.
    """
    radial = torch.linalg.vecdot(gradient, proxies).mul_(inverse.square())
    radial.masked_fill_(norm < NORM_FLOOR, 0)
    gradient.addcmul_(proxies, radial[..., None], value=-1)


def _chunks_of_classes(
    proxies_cND: Tensor, *, numbers_per_class: int, numbers_besides: int, memory_budget: int
) -> list[slice]:
    """Split this rank's classes into chunks that fit the budget and, on a CPU, the cache; at least one class each."""
    numbers = memory_budget // proxies_cND.element_size() - numbers_besides
    if proxies_cND.device.type == "cpu":
        numbers = min(numbers, _CACHED_NUMBERS)
    num_classes, width = len(proxies_cND), max(1, numbers // numbers_per_class)
    return [slice(first, min(first + width, num_classes)) for first in range(0, num_classes, width)]
