"""The relation-guided subgraph: exactly the k most similar proxies of each image, its own class's proxies always among
them.

Order of the negatives: similarity descending, global proxy index ascending, over ALL ranks. torch.topk's indices are
not used: which of several equal values it returns is undefined. Its values are, so the m-th value becomes a threshold
and ties at the threshold are handed out in index order.

Without gathering the bank: every rank sends its best q = min(m, p) negative similarities of each image to the rank that
owns the image; the owner finds the m-th value over all ranks and how many ties at it each rank may keep, and sends both
back. A rank can never keep more than q of its own negatives, so this is exact. Received per rank: B * q * 4 bytes,
independent of D.

Declined: adding a large constant to the positives before top-k (it costs the float32 resolution of what is compared).
No gradient flows through the choice.

Dimension key: R rows (images), B images over the group, b images of this rank, p proxies of this rank, P proxies over
the group, q candidates.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_proxygml.collectives import exchange_rows, rank_in


def num_kept_proxies(num_classes: int, proxies_per_class: int, ratio: float) -> int:
    """k = ceil(r*C*N), in floating point and in this order, as published: 0.1 * 3 * 10 gives 4.

    Always from the global numbers; a rank's share would give another k.
    """
    return math.ceil(ratio * num_classes * proxies_per_class)


@torch.no_grad()
def select_proxies(
    similarity_Rp: Tensor,
    positive_Rp: Tensor,
    *,
    num_negatives: int,
    row_counts: Sequence[int],
    proxy_counts: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Which proxies each image keeps: all its positives and its `num_negatives` best negatives over all ranks.

    Called on all ranks of `group`, each with the same R = sum(row_counts) rows and its own p = proxy_counts[rank]
    columns.

    Args:
        similarity_Rp: similarities, finite.
        positive_Rp: bool, the proxies of the image's own class.
        num_negatives: m = k - N, between 1 and the number of negatives over all ranks.
        row_counts: images that each rank owns, in row order.
        proxy_counts: proxies of each rank, in global index order.
        group: the ranks; None for one process.

    Returns:
        bool [R, p].
    """
    negatives_Rp = similarity_Rp.masked_fill(positive_Rp, -math.inf)
    best_Rq = negatives_Rp.topk(min(num_negatives, negatives_Rp.shape[1]), dim=1).values
    if group is None:
        threshold_R, quota_R1 = _threshold_and_quotas([best_Rq], num_negatives)
        quota_R = quota_R1[:, 0]
    else:
        threshold_R, quota_R = _agree(best_Rq, num_negatives, row_counts, proxy_counts, group)
    above_Rp = ~(negatives_Rp <= threshold_R[:, None])  # NaN is kept, so that it shows in the loss
    equal_Rp = negatives_Rp == threshold_R[:, None]
    if bool((equal_Rp.sum(dim=1) > quota_R).any()):  # rare; a local matter, no collective depends on it
        equal_Rp &= equal_Rp.cumsum(dim=1) <= quota_R[:, None]
    return positive_Rp | above_Rp | equal_Rp


def _agree(
    best_Rq: Tensor,
    num_negatives: int,
    row_counts: Sequence[int],
    proxy_counts: Sequence[int],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Threshold [R] of every image and this rank's share of the ties at it, settled by the image's owner."""
    num_own = row_counts[rank_in(group)]
    # 1. to the owners: each rank's best negatives
    candidates = exchange_rows(
        best_Rq,
        send_counts=row_counts,
        receive_shapes=[(num_own, min(num_negatives, count)) for count in proxy_counts],
        group=group,
    )
    # 2. the owners decide
    threshold_b, quota_bW = _threshold_and_quotas(candidates, num_negatives)
    # 3. back to the ranks: (threshold, quota) of every image; float64 holds float32 values and counts exactly
    verdict_Wb2 = torch.stack([threshold_b.double().expand(len(row_counts), -1), quota_bW.T.double()], dim=2)
    verdicts = exchange_rows(
        verdict_Wb2.reshape(-1, 2),
        send_counts=[num_own] * len(row_counts),
        receive_shapes=[(count, 2) for count in row_counts],
        group=group,
    )
    threshold_R, quota_R = torch.cat(verdicts).unbind(dim=1)
    return threshold_R.to(best_Rq.dtype), quota_R.long()


def _threshold_and_quotas(candidates: Sequence[Tensor], num_negatives: int) -> tuple[Tensor, Tensor]:
    """The m-th largest of all ranks' candidates [b], and how many values equal to it each rank may keep [b, W].

    Lower ranks hold lower global indices, so they are served first.
    """
    all_bq = torch.cat(list(candidates), dim=1)
    threshold_b = all_bq.topk(num_negatives, dim=1).values[:, -1]
    num_ties_b = num_negatives - (all_bq > threshold_b[:, None]).sum(dim=1)
    equal_bW = torch.stack([(block == threshold_b[:, None]).sum(dim=1) for block in candidates], dim=1)
    served_before_bW = equal_bW.cumsum(dim=1) - equal_bW
    return threshold_b, torch.minimum((num_ties_b[:, None] - served_before_bW).clamp_min(0), equal_bW)


def bytes_per_step(
    selection: str, *, batch_size: int, num_proxies: int, embedding_dim: int, topk: int, world_size: int
) -> int:
    """Bytes that one rank receives per step, forward and backward, in float32, averaged over the ranks.

    gather: the bank, and its gradient back. candidates: the embeddings and their gradient, q similarities of each of
        the
    batch's images, a threshold and a quota (16 bytes) from each owner, five numbers per image for the log-sum-exp.
    """
    from_others = (world_size - 1) / world_size
    if selection == "gather":
        return round(from_others * num_proxies * embedding_dim * 8)
    candidates = min(topk, math.ceil(num_proxies / world_size))
    return round(from_others * batch_size * (embedding_dim * 8 + candidates * 4 + 16 + 20))


def cheaper_selection(*, batch_size: int, num_proxies: int, embedding_dim: int, topk: int, world_size: int) -> str:
    """ "gather" or "candidates", whichever receives fewer bytes; "gather" on a tie."""
    cost = {
        selection: bytes_per_step(
            selection,
            batch_size=batch_size,
            num_proxies=num_proxies,
            embedding_dim=embedding_dim,
            topk=topk,
            world_size=world_size,
        )
        for selection in ("gather", "candidates")
    }
    return min(cost, key=lambda selection: cost[selection])
