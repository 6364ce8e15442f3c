"""ProxyGML over a class-partitioned proxy bank, exact for any number of ranks.

    S = X P^T                    cosine similarities of images and proxies (both unit rows)
    kept = top-k of each row     over ALL proxies, the row's own N proxies always in it (selection.py)
    z_c = sum of kept S of class c                                  reverse label propagation
    nll = log sum_{c with a kept proxy} exp(s*z_c) - s*z_label      masked softmax, mean over the GLOBAL batch
    total = nll + lambda * regulariser;   the regulariser classifies every proxy against the class sums of all proxies

Each rank owns whole classes, so z is local and only vectors of length B cross ranks. Two ways to the same numbers:
"candidates" gathers the embeddings and exchanges candidate similarities; "gather" gathers the bank and works on the
rank's own images. Gathering the logits (B x C on every rank) or a one-hot [P, C] matrix for the class sums was
declined: a class's N proxies are adjacent columns, so a reshape does it.

Source: Zhu et al., "Fewer is More: A Deep Graph Metric Learning Perspective Using Fewer Proxies", NeurIPS 2020 (arXiv
2010.13636).

Dimension key: R rows (images) at hand, b/B images of this rank / over the group, c/C classes, p/P proxies, N proxies
per class, D embedding; lower case is this rank's slice.
"""

import math
import warnings
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_proxygml.collectives import (
    AgreedError,
    all_reduce_max,
    all_reduce_sum,
    gather_objects,
    gather_rows,
    rank_in,
    world_size_of,
)
from dist_proxygml.partition import ClassPartition
from dist_proxygml.proxies import initial_proxies
from dist_proxygml.selection import cheaper_selection, num_kept_proxies, select_proxies

# Logits of the regulariser that are held at once: 4 million numbers, 16 MB in float32.
_REGULARIZER_LOGITS = 1 << 22


class LossTerms(NamedTuple):
    """The loss of one global batch; scalars, the same numbers on every rank."""

    total: Tensor
    """classification + regularization_weight * regularization; the one to call backward on."""
    classification: Tensor
    """Mean masked-softmax loss over the global batch."""
    regularization: Tensor
    """Mean cross entropy of the proxies against the class sums; 0 when its weight is 0."""
    kept_classes: Tensor
    """Mean number of classes per image with a kept proxy; no gradient."""


class ProxyGMLLoss(nn.Module):
    """The ProxyGML loss and this rank's proxies.

    Without a group it is a loss like any other: call it with unit embeddings and labels, call backward, step an
    optimizer on its parameters. With a group it is called on all ranks, each with its own images, and gives the loss of
    them all.

    Gradients: those of `proxies` are complete on their rank and must not be reduced or averaged over ranks; keep this
    module outside of DistributedDataParallel or a DeepSpeed engine. Those of the embeddings depend on
    `gradient_reduction`.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        proxies_per_class: N.
        ratio: r in (0, 1]; k = ceil(r*C*N) proxies are kept per image. Default 0.05, unless `topk` is given.
        topk: k itself, instead of `ratio`.
        regularization_weight: lambda, weight of the proxy regulariser.
        scale: softmax scale s of the classification term; 1 in every published run.
        group: ranks that the classes are partitioned over; None for one process.
        gradient_reduction: what the data-parallel engine does with the backbone's gradients over ranks: "mean"
            (DeepSpeed, DDP) or "sum". With "mean" the embeddings' gradient is multiplied by the number of ranks, which
            the engine undoes.
        selection: "gather" the bank, exchange "candidates", or "auto", the one that moves fewer bytes for the batch at
            hand.
        seed: of the initial proxies, which do not depend on the number of ranks.

    Raises:
        ValueError: k <= N (no negative would be kept: loss and gradients would be 0), k > C*N, or a setting out of
            range.
    """

    proxies: nn.Parameter
    """[c, N, D], unnormalised: the proxies of this rank's classes."""

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        proxies_per_class: int = 1,
        ratio: float | None = None,
        topk: int | None = None,
        regularization_weight: float = 0.0,
        scale: float = 1.0,
        group: dist.ProcessGroup | None = None,
        gradient_reduction: Literal["mean", "sum"] = "mean",
        selection: Literal["auto", "gather", "candidates"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if embedding_dim < 1 or proxies_per_class < 1:
            raise ValueError(
                f"embedding_dim and proxies_per_class must be at least 1, got {embedding_dim} and {proxies_per_class}"
            )
        if gradient_reduction not in ("mean", "sum"):
            raise ValueError(f'gradient_reduction must be "mean" or "sum", got {gradient_reduction!r}')
        if selection not in ("auto", "gather", "candidates"):
            raise ValueError(f'selection must be "auto", "gather" or "candidates", got {selection!r}')
        if regularization_weight < 0 or not scale > 0:
            raise ValueError(
                f"regularization_weight must be at least 0 and scale above 0, got {regularization_weight} and {scale}"
            )
        self.partition = ClassPartition(num_classes, world_size_of(group), rank_in(group))
        self.proxies_per_class = proxies_per_class
        self.topk = checked_topk(num_classes, proxies_per_class, ratio=ratio, topk=topk)
        self.regularization_weight = regularization_weight
        self.scale = scale
        self.group = group
        self.gradient_reduction = gradient_reduction
        self.selection = selection
        self.proxies = nn.Parameter(initial_proxies(self.partition, proxies_per_class, embedding_dim, seed=seed))

    def forward(self, embeddings: Tensor, labels: Tensor) -> LossTerms:
        """The loss of the global batch; called on all ranks, which may hold different numbers of images, none included.

        Args:
            embeddings: [b, D] unit rows, float32 or float64 like the proxies.
            labels: [b] int64 global class ids.

        Raises:
            ValueError: wrong shape or type, a non-finite embedding (its rank and row are named), a label out of range,
                a non-finite loss; the same error on every rank.
        """
        row_counts = self._agree_on_rows(embeddings, labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            proxies_cND = F.normalize(self.proxies, dim=2)
            classification, kept_classes = self._classification(embeddings, labels, proxies_cND, row_counts)
            if self.regularization_weight > 0:
                regularization = proxy_regularizer(proxies_cND, partition=self.partition, group=self.group)
            else:
                regularization = classification.new_zeros(())
            total = classification + self.regularization_weight * regularization
        if not bool(total.isfinite()):  # the same number on every rank, so they raise together
            raise AgreedError(
                f"expected a finite loss, got {total.item()}; the embeddings are, so a proxy is NaN or infinite: "
                "lower the learning rate of the proxies"
            )
        return LossTerms(total, classification.detach(), regularization.detach(), kept_classes)

    def selection_for(self, batch_size: int) -> str:
        """The selection used for a global batch of this size: "gather" or "candidates"."""
        if self.selection != "auto":
            return self.selection
        return cheaper_selection(
            batch_size=batch_size,
            num_proxies=self.partition.num_classes * self.proxies_per_class,
            embedding_dim=self.proxies.shape[2],
            topk=self.topk,
            world_size=self.partition.world_size,
        )

    def extra_repr(self) -> str:
        """The settings, for print(loss)."""
        return (
            f"num_classes={self.partition.num_classes}, proxies={tuple(self.proxies.shape)}, topk={self.topk}, "
            f"scale={self.scale}, regularization_weight={self.regularization_weight}"
        )

    def _classification(
        self, embeddings_bD: Tensor, labels_b: Tensor, proxies_cND: Tensor, row_counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and mean number of kept classes per image of the global batch."""
        num_per_class, num_rows = self.proxies_per_class, sum(row_counts)
        if self.gradient_reduction == "mean":
            embeddings_bD = _ScaleGradient.apply(embeddings_bD, self.partition.world_size)
        gathers_bank = self.selection_for(num_rows) == "gather"
        if gathers_bank:  # own images against all proxies
            embeddings_RD, labels_R, row_counts = embeddings_bD, labels_b, [len(labels_b)]
            proxies_pD = gather_rows(proxies_cND, row_counts=self.partition.counts(), group=self.group).flatten(0, 1)
            partition, group = ClassPartition(self.partition.num_classes), None
        else:  # all images against own proxies
            embeddings_RD = gather_rows(embeddings_bD, row_counts=row_counts, group=self.group)
            labels_R = gather_rows(labels_b, row_counts=row_counts, group=self.group)
            proxies_pD, partition, group = proxies_cND.flatten(0, 1), self.partition, self.group

        similarity_Rp = embeddings_RD @ proxies_pD.T
        class_of_proxy_p = torch.arange(partition.start, partition.stop, device=labels_R.device).repeat_interleave(
            num_per_class
        )
        kept_Rp = select_proxies(
            similarity_Rp.detach(),
            labels_R[:, None] == class_of_proxy_p,
            num_negatives=self.topk - num_per_class,
            row_counts=row_counts,
            proxy_counts=[count * num_per_class for count in partition.counts()],
            group=group,
        )
        logits_Rc, kept_Rc = class_logits(similarity_Rp, kept_Rp, proxies_per_class=num_per_class)
        nll_R, kept_R = masked_cross_entropy(
            self.scale * logits_Rc, kept_Rc, labels_R, partition=partition, group=group
        )
        sums_2 = torch.stack([nll_R.sum(), kept_R.sum()])
        if gathers_bank:  # the rows were this rank's own
            sums_2 = all_reduce_sum(sums_2, group=self.group)
        classification, kept_classes = (sums_2 / num_rows).unbind()
        return classification, kept_classes.detach()

    def _agree_on_rows(self, embeddings: Tensor, labels: Tensor) -> list[int]:
        """Rows of every rank, after every rank's batch was found valid."""
        problem = self._problem_with(embeddings, labels)
        if self.group is None:
            if problem is not None:
                raise AgreedError(problem)
            row_counts = [len(labels)]
        else:
            own_2 = torch.tensor([[0 if problem else len(labels), problem is not None]], device=self.proxies.device)
            all_W2 = gather_rows(own_2, row_counts=[1] * self.partition.world_size, group=self.group).tolist()
            if any(failed for _, failed in all_W2):
                problems = gather_objects(problem, group=self.group)
                raise AgreedError(next(text for text in problems if text is not None))
            row_counts = [count for count, _ in all_W2]
        if sum(row_counts) == 0:
            raise AgreedError("expected at least one image in the global batch, got none on any rank")
        return row_counts

    def _problem_with(self, embeddings: Tensor, labels: Tensor) -> str | None:
        where = f"on rank {self.partition.rank}"
        num_classes, dim, dtype = self.partition.num_classes, self.proxies.shape[2], self.proxies.dtype
        if embeddings.ndim != 2 or embeddings.shape[1] != dim or labels.shape != embeddings.shape[:1]:
            shapes = f"{list(embeddings.shape)} and {list(labels.shape)}"
            return f"expected embeddings [b, {dim}] and labels [b], got {shapes} {where}"
        if embeddings.dtype != dtype or labels.dtype != torch.int64:
            return (
                f"expected {dtype} embeddings (like the proxies) and torch.int64 labels, got {embeddings.dtype} and "
                f"{labels.dtype} {where}; convert them, or the loss with .to(dtype)"
            )
        finite_b = embeddings.detach().isfinite().all(dim=1)
        valid_b = (labels >= 0) & (labels < num_classes)
        if bool((finite_b & valid_b).all()):
            return None
        if not bool(finite_b.all()):
            rows = (~finite_b).nonzero().flatten().tolist()
            return (
                f"expected finite embeddings, got NaN or infinity in row {rows[0]} {where} "
                f"({len(rows)} of {len(labels)} rows); lower the learning rate or look at that image"
            )
        row = int((~valid_b).nonzero()[0])
        return (
            f"expected labels from 0 to {num_classes - 1}, got {int(labels[row])} in row {row} {where}; "
            "num_classes does not fit the data"
        )


def checked_topk(num_classes: int, proxies_per_class: int, *, ratio: float | None, topk: int | None) -> int:
    """k, from `topk` or `ratio` (default ratio 0.05), with N < k <= C*N.

    Raises:
        ValueError: both are given, a value is out of range, or k <= N.
    """
    if ratio is not None and topk is not None:
        raise ValueError(f"expected ratio or topk, got both (ratio={ratio}, topk={topk})")
    if topk is None:
        ratio = 0.05 if ratio is None else ratio
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
        topk = min(num_kept_proxies(num_classes, proxies_per_class, ratio), num_classes * proxies_per_class)
    num_proxies = num_classes * proxies_per_class
    if not proxies_per_class < topk <= num_proxies:
        raise ValueError(
            f"expected more than proxies_per_class = {proxies_per_class} and at most {num_proxies} kept proxies per "
            f"image, got k = {topk}: an image always keeps its own {proxies_per_class} proxies, and without a negative "
            "every loss and gradient is 0; raise the ratio"
        )
    if topk <= 2 * proxies_per_class:
        warnings.warn(
            f"k = {topk} keeps at most as many negatives as positives ({proxies_per_class} per class); published "
            "results fall off there, consider a larger ratio",
            stacklevel=3,
        )
    return topk


def class_logits(similarity_Rp: Tensor, kept_Rp: Tensor, *, proxies_per_class: int) -> tuple[Tensor, Tensor]:
    """Reverse label propagation: each class's sum of kept similarities [R, c], and whether any was kept, bool [R, c].

    A class's proxies are adjacent columns, and no rank owns a part of a class, so this is local.
    """
    shape = (similarity_Rp.shape[0], similarity_Rp.shape[1] // proxies_per_class, proxies_per_class)
    similarity_RcN, kept_RcN = similarity_Rp.view(shape), kept_Rp.view(shape)
    return similarity_RcN.masked_fill(~kept_RcN, 0).sum(dim=2), kept_RcN.any(dim=2)


def masked_cross_entropy(
    logits_Rc: Tensor,
    kept_Rc: Tensor,
    labels_R: Tensor,
    *,
    partition: ClassPartition,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [R] of each row's label among its kept classes, and the number of those [R].

    Called on all ranks of `group`; every rank returns the same values. Three vectors cross ranks: one MAX, then SUM of
    two and a count.
    Backward: each rank gets the gradient of its own classes; no communication.
    """
    logits_Rc = logits_Rc.masked_fill(~kept_Rc, -math.inf)
    local_max_R = (
        logits_Rc.detach().amax(dim=1) if partition.num_local else logits_Rc.new_full(labels_R.shape, -math.inf)
    )
    row_max_R = all_reduce_max(
        local_max_R, group=group
    )  # a shift only, so no gradient; finite, for the label's class is kept
    owned_R = (labels_R >= partition.start) & (labels_R < partition.stop)
    if partition.num_local:
        column_R = torch.where(owned_R, labels_R - partition.start, 0)
        target_R = logits_Rc.gather(1, column_R[:, None])[:, 0].masked_fill(~owned_R, 0)
    else:
        target_R = torch.zeros_like(row_max_R)
    exp_sum_R = (logits_Rc - row_max_R[:, None]).exp().sum(dim=1)
    sums_3R = all_reduce_sum(torch.stack([exp_sum_R, target_R, kept_Rc.sum(dim=1).to(target_R.dtype)]), group=group)
    return sums_3R[0].log() + row_max_R - sums_3R[1], sums_3R[2]


def proxy_regularizer(proxies_cND: Tensor, *, partition: ClassPartition, group: dist.ProcessGroup | None) -> Tensor:
    """Mean cross entropy of every proxy classified against the class sums of all proxies (own similarity 1 included).

    Called on all ranks of `group`; every rank returns the same value. Class sums are all that crosses ranks: a [P, P]
    matrix is never needed, and the [P, C] logits exist in row chunks only, which backward computes again.

    Args:
        proxies_cND: this rank's proxies, unit vectors.
        partition: whose classes they are.
        group: the ranks; None for one process.
    """
    num_per_class = proxies_cND.shape[1]
    sums_CD = gather_rows(proxies_cND.sum(dim=1), row_counts=partition.counts(), group=group)
    labels_p = torch.arange(partition.start, partition.stop, device=proxies_cND.device).repeat_interleave(num_per_class)
    local_sum = _ChunkedCrossEntropySum.apply(proxies_cND.flatten(0, 1), sums_CD, labels_p)
    return all_reduce_sum(local_sum, group=group) / (partition.num_classes * num_per_class)


class _ChunkedCrossEntropySum(torch.autograd.Function):
    """sum_a cross_entropy(anchors @ classes.T, labels) with a bounded number of logits at a time."""

    @staticmethod
    def forward(ctx, anchors_aD, classes_CD, labels_a):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(anchors_aD, classes_CD, labels_a)
        total = anchors_aD.new_zeros(())
        for rows in _chunks(len(anchors_aD), len(classes_CD)):
            total += F.cross_entropy(anchors_aD[rows] @ classes_CD.T, labels_a[rows], reduction="sum")
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        anchors_aD, classes_CD, labels_a = ctx.saved_tensors
        d_anchors_aD, d_classes_CD = torch.empty_like(anchors_aD), torch.zeros_like(classes_CD)
        for rows in _chunks(len(anchors_aD), len(classes_CD)):
            d_logits = (anchors_aD[rows] @ classes_CD.T).softmax(dim=1)
            d_logits[torch.arange(len(d_logits), device=d_logits.device), labels_a[rows]] -= 1
            d_anchors_aD[rows] = d_logits @ classes_CD
            d_classes_CD += d_logits.T @ anchors_aD[rows]
        return gradient * d_anchors_aD, gradient * d_classes_CD, None


def _chunks(num_rows: int, num_columns: int) -> list[slice]:
    size = max(1, _REGULARIZER_LOGITS // num_columns)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


class _ScaleGradient(torch.autograd.Function):
    """The same value, whose gradient is multiplied by a factor.

    Why W: the loss L is already the mean over the global batch, and its gradient with respect to the backbone's weights
    is the SUM over ranks of what each rank back-propagates. DeepSpeed and DDP take the mean, (1/W) * sum, so each rank
    back-propagates W times its part.
    """

    @staticmethod
    def forward(ctx, value, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * ctx.factor, None
