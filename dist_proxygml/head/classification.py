"""Classification of images by their classes' scores: the softmax term of the loss, over all ranks.

    z_c  = score of class c from its proxies that compete (class_scores.py); the own class's with a margin (margins.py)
    nll  = log sum_c exp(s * z_c) - s * z_label                  over the classes that compete and the own one

Either only the proxies of the image's subgraph compete (selection.py), or all do, a chunk of classes at a time, whose
scores are computed again in backward. In neither case does a matrix of images and classes exist, but for a subgraph on
a GPU whose bank is small: there masks are faster than lists of pairs, whose lengths the host would have to wait for.
Each rank owns whole classes, so scores are local and only vectors of length R cross ranks: one MAX, then SUM of the
exponentials, the targets and a count.

Dimension key: R rows (images) at hand, c classes and p proxies of this rank, N proxies per class, D embedding, n kept
negative pairs, g kept negative classes of all rows, o rows whose class this rank owns, w classes and v = w * N proxies
of a chunk.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_proxygml.distributed.collectives import all_reduce_max, all_reduce_sum
from dist_proxygml.head.bank import Bank, FusedSearches, Pairs, build_bank
from dist_proxygml.head.class_scores import ClassScore, masked_scores, scores, scores_of_groups
from dist_proxygml.head.margins import Margin
from dist_proxygml.head.matmul import product
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.selection import Exchange, fits_whole, keep_best, select_negatives
from dist_proxygml.head.similarity import (
    all_similarities,
    chunk_of_similarities,
    chunk_width,
    counts_of,
    embedding_gradient,
    pair_similarities,
    proxy_gradient,
)


class KeptPairs(NamedTuple):
    """The pairs that a forward pass kept, over the proxies visible to this rank."""

    negatives: Pairs
    positives: Pairs
    """N adjacent pairs for each image whose class is visible to this rank."""
    partition: ClassPartition
    """Classes of the visible proxies: this rank's, paired with the images of all ranks; or, where the bank was
    gathered, all classes, paired with this rank's images."""


class KeptMatrix(NamedTuple):
    """The same as masks; the host waits only if it asks for the pairs."""

    similarity: Tensor
    """[R, p]."""
    is_kept: Tensor
    """bool [R, p], the kept negatives."""
    own_class: Tensor
    """int64 [R], the rows' classes among those of the proxies."""
    own_similarity: Tensor
    """[R, N], those of their proxies."""
    is_here: Tensor | None
    """bool [R], whether the class is visible, without which the two above mean nothing; None: all are."""
    partition: ClassPartition

    @property
    def negatives(self) -> Pairs:
        """The kept negatives as pairs."""
        row_n, proxy_n = self.is_kept.nonzero().unbind(1)
        return Pairs(row_n, proxy_n, self.similarity[row_n, proxy_n])

    @property
    def positives(self) -> Pairs:
        """N adjacent pairs for each image whose class is visible."""
        proxy_RN = proxies_of_classes(self.own_class, self.own_similarity.shape[1])
        row_RN = torch.arange(len(proxy_RN), device=proxy_RN.device)[:, None].expand_as(proxy_RN)
        whole = (row_RN, proxy_RN, self.own_similarity)
        return Pairs(*((part if self.is_here is None else part[self.is_here]).flatten() for part in whole))


class Scoring(NamedTuple):
    """How similarities become a class's score."""

    how: ClassScore = "sum"
    gamma: float = 0.1
    """Temperature of the softmax over a class's proxies."""
    margin: Margin | None = None


class Subgraph(NamedTuple):
    """How the kept proxies are found."""

    num_negatives: int
    exchange: Exchange
    partition: ClassPartition
    """Classes of the proxies passed in."""
    row_counts: Sequence[int]
    fused: bool
    searches: FusedSearches
    sparse: bool
    observer: Callable[[KeptPairs | KeptMatrix], None] | None


class Settings(NamedTuple):
    """Non-tensor arguments of the classification term."""

    scoring: Scoring
    group: dist.ProcessGroup | None
    memory_budget: int
    matmul_dtype: torch.dtype
    subgraph: Subgraph | None
    """None: all proxies compete."""


def negative_log_likelihood(
    embeddings_RD: Tensor,
    proxies_cND: Tensor,
    scale: Tensor,
    own_class_R: Tensor,
    quality_R: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Compute the negative log-likelihood [R] of each row's class among those that compete, and their number [R].

    Called on all ranks of the group; every rank returns the same values. Backward: each rank returns the complete
    gradient of its own proxies and its part of that of embeddings and scale; no communication.

    Args:
        embeddings_RD: rows.
        proxies_cND: of any length.
        scale: s, a scalar.
        own_class_R: int64, position of each row's class among the c; outside 0 .. c - 1 where another rank has it.
        quality_R: q of an adaface margin.
        settings: the rest.
    """
    function: Any = _AllProxies
    if settings.subgraph is not None:
        num_per_class = proxies_cND.shape[1]
        fits = keeps_matrix(
            len(embeddings_RD),
            num_proxies=settings.subgraph.partition.counts()[0] * num_per_class,
            memory_budget=settings.memory_budget,
            device=embeddings_RD.device.type,
            needs_pairs=settings.subgraph.sparse or settings.subgraph.fused or settings.matmul_dtype != torch.float32,
        )
        function = _KeptMatrix if fits and len(proxies_cND) else _KeptProxies  # both communicate alike
    nll_R, count_R = function.apply(embeddings_RD, proxies_cND, scale, own_class_R, quality_R, settings)
    return nll_R, count_R


def keeps_matrix(num_rows: int, *, num_proxies: int, memory_budget: int, device: str, needs_pairs: bool) -> bool:
    """Whether a subgraph is computed with masks: on a GPU, where S with what is computed from it fits the budget.

    `num_proxies` is that of the rank with the most, so that all ranks decide alike.
    """
    return device == "cuda" and not needs_pairs and fits_whole(num_rows, num_proxies=num_proxies, budget=memory_budget)


class _KeptMatrix(torch.autograd.Function):
    """As `_KeptProxies`, with masks over S as a whole: no size depends on a value, so the host waits for nothing."""

    @staticmethod
    def forward(ctx, embeddings_RD, proxies_cND, scale, own_class_R, quality_R, settings):  # type: ignore[no-untyped-def]
        num_classes, num_per_class, _ = proxies_cND.shape
        subgraph, scoring = settings.subgraph, settings.scoring
        bank = build_bank(proxies_cND.flatten(0, 1), matmul_dtype=settings.matmul_dtype)

        # 1. The subgraph: the kept negatives, and the proxies of the rows' own classes, where this rank has them.
        similarity_Rp = all_similarities(embeddings_RD, bank)
        similarity_RcN = similarity_Rp.view(-1, num_classes, num_per_class)
        is_own_Rc = own_class_R[:, None] == torch.arange(num_classes, device=own_class_R.device)
        is_kept_Rp = keep_best(
            similarity_RcN.masked_fill(is_own_Rc[:, :, None], -math.inf).view_as(similarity_Rp),
            num_negatives=subgraph.num_negatives,
            row_counts=subgraph.row_counts,
            proxy_counts=[count * num_per_class for count in subgraph.partition.counts()],
            group=settings.group,
            exchange=subgraph.exchange,
        )
        is_in_RcN = is_kept_Rp.view_as(similarity_RcN) | is_own_Rc[:, :, None]
        is_whole = settings.group is None  # one process, or a gathered bank: it has every row's class
        some_class_R = own_class_R if is_whole else own_class_R.clamp(0, num_classes - 1)
        if subgraph.observer is not None:
            place_R1N = some_class_R[:, None, None].expand(-1, 1, num_per_class)
            own_similarity_RN = similarity_RcN.gather(1, place_R1N)[:, 0]
            own = (some_class_R, own_similarity_RN, None if is_whole else own_class_R == some_class_R)
            subgraph.observer(KeptMatrix(similarity_Rp, is_kept_Rp, *own, subgraph.partition))

        # 2. Scores of the classes with a kept proxy.
        score_Rc, slope_RcN = masked_scores(similarity_RcN, is_in_RcN, how=scoring.how, gamma=scoring.gamma)
        slope_RcN = is_in_RcN if slope_RcN is None else slope_RcN
        if scoring.margin is not None:
            own_score_R = score_Rc.gather(1, some_class_R[:, None])[:, 0]
            own_score_R, margin_slope_R = scoring.margin.apply(own_score_R, quality_R)
            score_Rc = torch.where(is_own_Rc, own_score_R[:, None], score_Rc)
            slope_RcN = slope_RcN * torch.where(is_own_Rc, margin_slope_R[:, None], 1.0)[:, :, None]
        is_in_Rc = is_in_RcN.any(dim=2) if num_per_class > 1 else is_in_RcN[:, :, 0]
        logit_Rc = torch.where(is_in_Rc, scale * score_Rc, -math.inf)

        # 3. Softmax over all ranks' kept classes.
        row_max_R = all_reduce_max(logit_Rc.amax(dim=1), group=settings.group)
        exp_Rc = (logit_Rc - row_max_R[:, None]).exp_()
        softmax = _sum_over_ranks(
            exp_Rc.sum(dim=1),
            logit_Rc.where(is_own_Rc, 0).sum(dim=1),
            is_in_Rc.sum(dim=1, dtype=logit_Rc.dtype),
            row_max_R,
            bank,
            settings.group,
        )

        # 4. Save for backward: what the loss changes by with each similarity.
        excess_Rc = exp_Rc.div_(softmax.exp_sum[:, None]).add_(is_own_Rc, alpha=-1)
        weight_Rp = ((excess_Rc * scale)[:, :, None] * slope_RcN).flatten(1)
        scale_slope_R = (excess_Rc * score_Rc).sum(dim=1) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(embeddings_RD, proxies_cND, bank.inverse_norm, weight_Rp, scale_slope_R)
        ctx.mark_non_differentiable(softmax.num_classes)
        return softmax.log_sum - softmax.target, softmax.num_classes

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_R, _):  # type: ignore[no-untyped-def]
        embeddings_RD, proxies_cND, inverse_norm_p, weight_Rp, scale_slope_R = ctx.saved_tensors
        proxies_pD = proxies_cND.flatten(0, 1)
        weight_Rp = (weight_Rp * gradient_R[:, None]).mul_(inverse_norm_p)
        d_embeddings_RD = torch.mm(weight_Rp, proxies_pD) if ctx.needs_input_grad[0] else None
        d_proxies_cND = None
        if ctx.needs_input_grad[1]:
            d_proxies_pD = torch.mm(weight_Rp.T, embeddings_RD)
            # only what turns a proxy counts, not what lengthens it
            radial_p = torch.linalg.vecdot(d_proxies_pD, proxies_pD) * inverse_norm_p.square()
            d_proxies_cND = d_proxies_pD.addcmul_(proxies_pD, radial_p[:, None], value=-1).view_as(proxies_cND)
        d_scale = None if scale_slope_R is None else (gradient_R * scale_slope_R).sum()
        return d_embeddings_RD, d_proxies_cND, d_scale, None, None, None


class _KeptProxies(torch.autograd.Function):
    """Only the most similar proxies of each row compete: after the selection B * k kept pairs remain, and only proxies
    in one of them have a gradient.
    """

    @staticmethod
    def forward(ctx, embeddings_RD, proxies_cND, scale, own_class_R, quality_R, settings):  # type: ignore[no-untyped-def]
        num_rows, (num_classes, num_per_class, _) = len(embeddings_RD), proxies_cND.shape
        subgraph, scoring = settings.subgraph, settings.scoring
        bank = build_bank(
            proxies_cND.flatten(0, 1),
            matmul_dtype=settings.matmul_dtype,
            fused=subgraph.fused,
            searches=subgraph.searches,
        )

        # 1. The subgraph: this rank's kept negatives, and the proxies of the rows' own classes.
        bounds_2 = torch.arange(0, 2 * num_per_class, num_per_class, device=own_class_R.device)
        negatives = select_negatives(
            embeddings_RD,
            bank,
            excluded_R2=bounds_2.add(own_class_R[:, None], alpha=num_per_class),
            num_negatives=subgraph.num_negatives,
            row_counts=subgraph.row_counts,
            proxy_counts=[count * num_per_class for count in subgraph.partition.counts()],
            group=settings.group,
            exchange=subgraph.exchange,
            memory_budget=settings.memory_budget,
        )
        row_o = _rows_here(own_class_R, num_classes, group=settings.group)
        own = _own_classes(embeddings_RD, bank, scale, row_o, own_class_R, quality_R, num_per_class, scoring)
        if subgraph.observer is not None:
            subgraph.observer(KeptPairs(negatives, own.pairs, subgraph.partition))

        # 2. Scores: a class's kept pairs are adjacent, and no rank owns a part of a class.
        if num_per_class == 1:  # each pair is a group
            group_n, row_g, score_g, slope_n = None, negatives.row, negatives.similarity, None
        else:
            class_n = negatives.proxy // num_per_class
            class_g, group_n = torch.unique_consecutive(
                negatives.row * subgraph.partition.num_local + class_n, return_inverse=True
            )
            row_g = negatives.row.new_empty(len(class_g)).index_copy_(0, group_n, negatives.row)
            score_g, slope_n = scores_of_groups(
                negatives.similarity, group_n, len(class_g), how=scoring.how, gamma=scoring.gamma
            )
        logit_g = scale * score_g

        # 3. Softmax over all ranks' kept classes.
        max_R = embeddings_RD.new_full((num_rows,), -math.inf).scatter_reduce_(0, row_g, logit_g, "amax")

        def exp_sums(row_max_R: Tensor) -> Tensor:
            return torch.zeros_like(row_max_R).index_add_(0, row_g, (logit_g - row_max_R[row_g]).exp())

        num_kept_R = counts_of(torch.cat([row_g, own.row]), num_rows).to(max_R.dtype)
        softmax = _softmax_over_ranks(max_R, exp_sums, num_kept_R, own, bank, settings.group)

        # 4. Save for backward: the probability of each kept pair's class.
        ctx.subgraph, ctx.num_negatives = subgraph, len(negatives.row)
        probability_g = (logit_g - softmax.log_sum[row_g]).exp()
        own_excess_o = (own.logit - softmax.log_sum[own.row]).exp() - 1
        pairs = Pairs(*(torch.cat(parts) for parts in zip(negatives, own.pairs, strict=True)))
        probability_n = probability_g if group_n is None else probability_g[group_n]
        probability_n = probability_n if slope_n is None else probability_n * slope_n
        weight_n = torch.cat([probability_n, (own_excess_o[:, None] * own.slope).flatten()]) * scale
        scale_slope_R = None
        if ctx.needs_input_grad[2]:
            scale_slope_R = embeddings_RD.new_zeros(num_rows).index_add_(0, row_g, probability_g * score_g)
            scale_slope_R.index_add_(0, own.row, own_excess_o * own.value)
        ctx.save_for_backward(embeddings_RD, proxies_cND, bank.inverse_norm, weight_n, scale_slope_R, *pairs)
        ctx.mark_non_differentiable(softmax.num_classes)
        return softmax.log_sum - softmax.target, softmax.num_classes

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_R, _):  # type: ignore[no-untyped-def]
        embeddings_RD, proxies_cND, inverse_norm_p, weight_n, scale_slope_R, *pairs = ctx.saved_tensors
        bank = Bank(proxies_cND.flatten(0, 1), inverse_norm_p, fused=ctx.subgraph.fused)
        pairs = Pairs(*pairs)
        weight_n = weight_n * gradient_R[pairs.row]
        d_embeddings_RD = d_proxies_cND = None
        if ctx.needs_input_grad[0]:
            for part in (slice(ctx.num_negatives), slice(ctx.num_negatives, None)):  # each of them ordered by row
                ordered = Pairs(*(column[part] for column in pairs))
                added_RD = embedding_gradient(ordered, bank, weight_n[part], num_rows=len(embeddings_RD))
                d_embeddings_RD = added_RD if d_embeddings_RD is None else d_embeddings_RD.add_(added_RD)
        if ctx.needs_input_grad[1]:
            sparse = ctx.subgraph.sparse
            proxy_u, d_proxies_uD = proxy_gradient(pairs, bank, embeddings_RD, weight_n, touched_only=sparse)
            shape = proxies_cND.shape
            d_proxies_cND = _by_class(proxy_u, d_proxies_uD, shape) if sparse else d_proxies_uD.view(shape)
        d_scale = None if scale_slope_R is None else (gradient_R * scale_slope_R).sum()
        return d_embeddings_RD, d_proxies_cND, d_scale, None, None, None


class _AllProxies(torch.autograd.Function):
    """All proxies compete. Memory beyond the gradient of the proxies: a chunk."""

    @staticmethod
    def forward(ctx, embeddings_RD, proxies_cND, scale, own_class_R, quality_R, settings):  # type: ignore[no-untyped-def]
        num_rows, (num_classes, num_per_class, _) = len(embeddings_RD), proxies_cND.shape
        bank = build_bank(proxies_cND.flatten(0, 1), matmul_dtype=settings.matmul_dtype)
        row_o = _rows_here(own_class_R, num_classes, group=settings.group)
        own = _own_classes(embeddings_RD, bank, scale, row_o, own_class_R, quality_R, num_per_class, settings.scoring)
        chunks = _chunks(embeddings_RD, num_classes, num_per_class, own, own_class_R, settings.memory_budget)
        max_R = embeddings_RD.new_full((num_rows,), -math.inf)
        sum_R = embeddings_RD.new_zeros(num_rows)
        for chunk in chunks:
            logit_wR = _chunk_scores(embeddings_RD, bank, chunk, num_per_class, scale, settings.scoring).logit
            higher_R = torch.maximum(max_R, logit_wR.amax(dim=0))
            sum_R = sum_R * (max_R - higher_R).exp() + logit_wR.sub_(higher_R).exp_().sum(dim=0)
            max_R = higher_R

        def exp_sums(row_max_R: Tensor) -> Tensor:
            return sum_R * (max_R - row_max_R).exp()

        counts_R = torch.full_like(max_R, num_classes)
        softmax = _softmax_over_ranks(max_R, exp_sums, counts_R, own, bank, settings.group)
        ctx.scoring, ctx.chunks, ctx.matmul_dtype = settings.scoring, chunks, settings.matmul_dtype
        own_excess_o = (own.logit - softmax.log_sum[own.row]).exp() - 1
        own_weight_n = (own_excess_o[:, None] * own.slope).flatten() * scale
        own_scale_slope_R = torch.zeros_like(max_R).index_copy_(0, own.row, own_excess_o * own.value)
        inputs = (embeddings_RD, proxies_cND, scale, bank.inverse_norm)
        ctx.save_for_backward(*inputs, softmax.log_sum, own_weight_n, own_scale_slope_R, *own.pairs)
        ctx.mark_non_differentiable(softmax.num_classes)
        return softmax.log_sum - softmax.target, softmax.num_classes

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_R, _):  # type: ignore[no-untyped-def]
        embeddings_RD, proxies_cND, scale, inverse_norm_p, log_sum_R, *saved = ctx.saved_tensors
        own_weight_n, own_scale_slope_R, *pairs = saved
        bank = Bank(proxies_cND.flatten(0, 1), inverse_norm_p, ctx.matmul_dtype)
        num_per_class = proxies_cND.shape[1]
        d_embeddings_RD = embeddings_RD.new_zeros(embeddings_RD.shape)
        d_proxies_pD = torch.empty_like(bank.proxies)
        scale_slope_R = own_scale_slope_R.clone()
        weight_R = gradient_R * scale
        weighted_DR = (embeddings_RD * weight_R[:, None]).T.contiguous()
        for chunk in ctx.chunks:
            part = _chunk_scores(embeddings_RD, bank, chunk, num_per_class, scale, ctx.scoring)
            probability_wR = part.logit.sub_(log_sum_R).exp_()
            if ctx.needs_input_grad[2]:
                scale_slope_R += (probability_wR * part.score).sum(dim=0)
            slope_vR = probability_wR  # of the rows' losses in the similarities, but for the scale
            if part.slope is not None:
                slope_vR = (probability_wR[:, None] * part.slope).flatten(0, 1)
            elif num_per_class > 1:
                slope_vR = probability_wR.repeat_interleave(num_per_class, dim=0)
            proxies_vD = bank.proxies[chunk.proxies]
            slope_vR *= bank.inverse_norm[chunk.proxies, None]
            d_embeddings_RD.addmm_(slope_vR.T, proxies_vD)
            block_vD = product(slope_vR, weighted_DR)
            # only what turns a proxy counts, not what lengthens it
            radial_v = torch.linalg.vecdot(block_vD, proxies_vD) * bank.inverse_norm[chunk.proxies].square()
            torch.addcmul(block_vD, proxies_vD, radial_v[:, None], value=-1, out=d_proxies_pD[chunk.proxies])
        d_embeddings_RD *= weight_R[:, None]
        own = Pairs(*pairs)
        own_weight_n = own_weight_n * gradient_R[own.row]
        d_embeddings_RD += embedding_gradient(own, bank, own_weight_n, num_rows=len(embeddings_RD))
        proxy_u, d_own_uD = proxy_gradient(own, bank, embeddings_RD, own_weight_n, touched_only=True)
        d_proxies_pD.index_add_(0, proxy_u, d_own_uD)
        d_scale = (gradient_R * scale_slope_R).sum() if ctx.needs_input_grad[2] else None
        return d_embeddings_RD, d_proxies_pD.view(proxies_cND.shape), d_scale, None, None, None


class _OwnClasses(NamedTuple):
    """The own classes of the rows, where this rank has them."""

    row: Tensor
    """[o]."""
    pairs: Pairs
    """[o * N]."""
    logit: Tensor
    """[o]."""
    value: Tensor
    """[o], the score with the margin."""
    slope: Tensor
    """[o, N], of the value in each similarity."""


def _own_classes(
    embeddings_RD: Tensor,
    bank: Bank,
    scale: Tensor,
    row_o: Tensor,
    own_class_R: Tensor,
    quality_R: Tensor | None,
    num_per_class: int,
    scoring: Scoring,
) -> _OwnClasses:
    proxy_oN = proxies_of_classes(own_class_R[row_o], num_per_class)
    row_n = row_o[:, None].expand_as(proxy_oN).flatten()
    pairs = Pairs(row_n, proxy_oN.flatten(), bank.inverse_norm.new_empty(0))
    pairs = pairs._replace(similarity=pair_similarities(embeddings_RD, bank, pairs.row, pairs.proxy))
    similarity_oN = pairs.similarity.view(-1, num_per_class)
    value_o, slope_oN = _own_scores(similarity_oN, None if quality_R is None else quality_R[row_o], scoring)
    slope_oN = torch.ones_like(similarity_oN) if slope_oN is None else slope_oN
    return _OwnClasses(row_o, pairs, scale * value_o, value_o, slope_oN)


def _own_scores(similarity_oN: Tensor, quality_o: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Return the scores [o] of the own classes with the margin, and their slopes [o, N]; None: all 1."""
    value_o, slope_oN = scores(similarity_oN, dim=1, how=scoring.how, gamma=scoring.gamma)
    if scoring.margin is not None:
        value_o, margin_slope_o = scoring.margin.apply(value_o, quality_o)
        slope_oN = torch.ones_like(similarity_oN) if slope_oN is None else slope_oN
        slope_oN = slope_oN * margin_slope_o[:, None]
    return value_o, slope_oN


def _rows_here(own_class_R: Tensor, num_classes: int, *, group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows whose class this rank has: of one process, all."""
    if group is None:
        return torch.arange(len(own_class_R), device=own_class_R.device)
    return ((own_class_R >= 0) & (own_class_R < num_classes)).nonzero().flatten()


def proxies_of_classes(class_o: Tensor, num_per_class: int) -> Tensor:
    """Return the indices [o, N] of the classes' proxies."""
    return torch.arange(num_per_class, device=class_o.device).add(class_o[:, None], alpha=num_per_class)


class _Softmax(NamedTuple):
    """The softmax over all ranks' competing classes; each [R]."""

    exp_sum: Tensor
    """Of the exponentials of the logits less the row's highest."""
    log_sum: Tensor
    target: Tensor
    num_classes: Tensor


def _softmax_over_ranks(
    max_R: Tensor,
    exp_sums: Callable[[Tensor], Tensor],
    num_classes_R: Tensor,
    own: _OwnClasses,
    bank: Bank,
    group: dist.ProcessGroup | None,
) -> _Softmax:
    """Add this rank's own classes to its others, and reduce over ranks.

    Args:
        max_R: highest logit of the others.
        exp_sums: gives the sums [R] of exp(logit - reference) of the others, for a reference [R].
        num_classes_R: number of classes.
        own, bank, group: as elsewhere.
    """
    local_max_R = max_R.scatter_reduce(0, own.row, own.logit, "amax")
    row_max_R = all_reduce_max(local_max_R, group=group)  # finite, because the label's class competes
    exp_sum_R = exp_sums(row_max_R)
    exp_sum_R.index_add_(0, own.row, (own.logit - row_max_R[own.row]).exp())
    target_R = torch.zeros_like(row_max_R).index_copy_(0, own.row, own.logit)
    return _sum_over_ranks(exp_sum_R, target_R, num_classes_R, row_max_R, bank, group)


def _sum_over_ranks(
    exp_sum_R: Tensor,
    target_R: Tensor,
    num_classes_R: Tensor,
    row_max_R: Tensor,
    bank: Bank,
    group: dist.ProcessGroup | None,
) -> _Softmax:
    # A NaN or infinite proxy exceeds no bound and would go unnoticed: make the sum NaN on every rank.
    exp_sum_R.add_(bank.inverse_norm.sum(), alpha=0)
    if group is None:
        return _Softmax(exp_sum_R, exp_sum_R.log() + row_max_R, target_R, num_classes_R)
    sums_3R = all_reduce_sum(torch.stack([exp_sum_R, target_R, num_classes_R]), group=group)
    return _Softmax(sums_3R[0], sums_3R[0].log() + row_max_R, sums_3R[1], sums_3R[2].clone())


class _Chunk(NamedTuple):
    """Some classes, and which of their scores belong to the rows' own classes."""

    proxies: slice
    own_class: Tensor
    """Position in the chunk."""
    own_row: Tensor


def _chunks(
    embeddings_RD: Tensor,
    num_classes: int,
    num_per_class: int,
    own: _OwnClasses,
    own_class_R: Tensor,
    memory_budget: int,
) -> list[_Chunk]:
    """Cut the classes into chunks that stay in a CPU's cache, or take a part of the budget."""
    proxies = chunk_width(len(embeddings_RD), memory_budget=memory_budget, device=embeddings_RD.device.type)
    width = max(1, proxies // num_per_class)
    if width >= num_classes > 0:
        return [_Chunk(slice(0, num_classes * num_per_class), own_class_R[own.row], own.row)]
    class_o, order_o = torch.sort(own_class_R[own.row])
    row_o = own.row[order_o]
    firsts = list(range(0, num_classes, width))
    ends = torch.searchsorted(class_o, torch.tensor([*firsts, num_classes], device=class_o.device)).tolist()
    chunks = []
    for first, start, stop in zip(firsts, ends, ends[1:], strict=False):
        proxies_of = slice(first * num_per_class, min(first + width, num_classes) * num_per_class)
        chunks.append(_Chunk(proxies_of, class_o[start:stop] - first, row_o[start:stop]))
    return chunks


class _ChunkScores(NamedTuple):
    """Scores of a chunk's classes."""

    score: Tensor
    """[w, R]."""
    slope: Tensor | None
    """[w, N, R]."""
    logit: Tensor
    """[w, R]; so low for the rows' own classes, which are counted apart, that their exponential is 0."""


def _chunk_scores(
    embeddings_RD: Tensor, bank: Bank, chunk: _Chunk, num_per_class: int, scale: Tensor, scoring: Scoring
) -> _ChunkScores:
    similarity_vR = chunk_of_similarities(embeddings_RD, bank, chunk.proxies)
    similarity_wNR = similarity_vR.unflatten(0, (-1, num_per_class))
    score_wR, slope_wNR = scores(similarity_wNR, dim=1, how=scoring.how, gamma=scoring.gamma)
    logit_wR = score_wR * scale
    logit_wR[chunk.own_class, chunk.own_row] = torch.finfo(logit_wR.dtype).min / 4
    return _ChunkScores(score_wR, slope_wNR, logit_wR)


def _by_class(proxy_u: Tensor, gradient_uD: Tensor, shape: torch.Size) -> Tensor:
    """Turn the gradients of proxies u into a sparse gradient [c, N, D] over the classes that own any of them."""
    num_per_class, dim = shape[1:]
    if num_per_class == 1:
        values_uND = gradient_uD.view(-1, 1, dim)
        return torch.sparse_coo_tensor(proxy_u[None], values_uND, shape, is_coalesced=True, check_invariants=False)
    class_t, position_u = torch.unique_consecutive(proxy_u // num_per_class, return_inverse=True)
    gradient_pD = gradient_uD.new_zeros(len(class_t) * num_per_class, dim)
    gradient_uD = gradient_pD.index_copy_(0, position_u * num_per_class + proxy_u % num_per_class, gradient_uD)
    values_tND = gradient_uD.view(-1, num_per_class, dim)
    return torch.sparse_coo_tensor(class_t[None], values_tND, shape, is_coalesced=True, check_invariants=False)
