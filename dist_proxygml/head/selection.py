"""The relation-guided subgraph: exactly the k most similar proxies of each image, always including its own class's.

Negatives are ordered by similarity descending, then global proxy index ascending, over ALL ranks. torch.topk's indices
are not used, because its choice among equal values is undefined. Instead the ranks find a threshold, the m-th largest
of an image's negatives, and keep ties at it in index order. There are two ways to find it:

    candidates  every rank sends its best q = min(m, p) values of each image to the rank that owns the image, which
                finds the threshold and each rank's quota of ties, and sends both back. A rank never keeps more than q
                of its own negatives, so this is exact. Received per rank: B * q * 4 bytes.
    histogram   the ranks sum 256-bin histograms, one per byte of the value from the most significant on; each step
                descends into the bin that holds the m-th largest. Received per rank: B * 8 KiB in float32, for any k.

Both process blocks of as many rows as the memory budget holds; the number of blocks is the same on every rank. Where
few of the proxies are wanted, only those above a guessed bound are examined (similarity.py); otherwise all
similarities of the block are.

Declined: adding a large constant to the positives before top-k (it costs the float32 resolution of what is compared);
sending slightly more than m / W candidates (it fails where related classes have adjacent ids, as in class tables).
No gradient flows through the selection.

Dimension key: R rows (images), B images over the group, b images of this rank, p proxies of this rank, P proxies over
the group, q candidates, n candidates before the exchange.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_proxygml.distributed.collectives import all_reduce_sum, exchange_rows, gather_rows, rank_in, world_size_of
from dist_proxygml.head.bank import Bank, Pairs
from dist_proxygml.head.similarity import (
    BYTES_PER_PAIR,
    all_similarities,
    best_pairs,
    expected_pairs,
    joined,
    kth_largest,
    largest,
    padded,
)

Exchange = Literal["candidates", "histogram"]

_NUM_BINS = 256
# Bytes per entry of S where all is computed as whole matrices: similarities, their ranks among equals, masks, scores,
# weights; with the buffers of an exchange.
BYTES_PER_ENTRY = 48
# Bytes per candidate of a block: value and its copy in the search for the k-th largest, on a GPU also masks; with other
# ranks also send buffers, or the bits and bins of the histogram.
_BYTES_PER_CANDIDATE = {"cpu": 8, "cuda": 12}
_BYTES_PER_SHARED_CANDIDATE = 32
_BYTES_PER_RECEIVED_CANDIDATE = 16


def num_kept_proxies(num_classes: int, proxies_per_class: int, ratio: float) -> int:
    """k = ceil(r*C*N), in floating point and in this order, as published: 0.1 * 3 * 10 gives 4.

    Always from the global numbers; a rank's share would give a different k.
    """
    return math.ceil(ratio * num_classes * proxies_per_class)


@torch.no_grad()
def select_negatives(
    embeddings_RD: Tensor,
    bank: Bank,
    *,
    excluded_R2: Tensor,
    num_negatives: int,
    row_counts: Sequence[int],
    proxy_counts: Sequence[int],
    group: dist.ProcessGroup | None,
    exchange: Exchange = "candidates",
    memory_budget: int = 1 << 28,
) -> Pairs:
    """Select this rank's share of each image's `num_negatives` most similar proxies over all ranks, without those of
    its own class.

    Called on all ranks of `group`, each with the same R = sum(row_counts) rows and its own p = proxy_counts[rank]
    proxies.

    Args:
        embeddings_RD: rows, finite.
        bank: this rank's proxies, finite.
        excluded_R2: int64, range [first, stop) of local indices of the row's own class; outside 0 .. p - 1 where
            another rank owns it.
        num_negatives: m = k - N, between 1 and the number of negatives over all ranks.
        row_counts: images that each rank owns, in row order.
        proxy_counts: proxies of each rank, in global index order.
        group: the ranks; None for one process.
        exchange: "candidates" or "histogram".
        memory_budget: bytes for the candidates of a block of rows.
    """
    num_rows = len(embeddings_RD)
    if num_rows == 0:  # no other rank has rows either, or the bank was gathered and this rank works alone
        return Pairs(excluded_R2[:, 0], excluded_R2[:, 1], embeddings_RD.new_empty(0))
    size = rows_per_block(
        num_rows,
        num_negatives=num_negatives,
        num_proxies=max(proxy_counts),
        budget=memory_budget,
        world_size=len(proxy_counts),
        device="cuda" if embeddings_RD.is_cuda else "cpu",
    )
    ends = list(itertools.accumulate(row_counts))
    blocks = []
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        rows = slice(start, stop)
        similarity_Rn, proxy_Rn = _candidates(
            embeddings_RD[rows], bank, excluded_R2[rows], num_negatives, memory_budget
        )
        owned = [max(0, min(end, stop) - max(end - count, start)) for end, count in zip(ends, row_counts, strict=True)]
        kept_Rn = keep_best(
            similarity_Rn,
            num_negatives=num_negatives,
            row_counts=owned,
            proxy_counts=proxy_counts,
            group=group,
            exchange=exchange,
        )
        if group is None and kept_Rn.is_cuda:  # how many is known: fewer are kept only beside a NaN, which the loss has
            kept_n2 = torch.nonzero_static(kept_Rn, size=len(kept_Rn) * num_negatives, fill_value=0)
        else:
            kept_n2 = kept_Rn.nonzero()
        row_n, column_n = kept_n2.unbind(1)
        proxy_n = column_n if proxy_Rn is None else proxy_Rn[row_n, column_n]
        blocks.append(Pairs(row_n + start, proxy_n, similarity_Rn[row_n, column_n]))
    return Pairs(*(joined(parts) for parts in zip(*blocks, strict=True)))


def fits_whole(num_rows: int, *, num_proxies: int, budget: int) -> bool:
    """Whether S [num_rows, num_proxies] and what is computed from it fit the budget as whole matrices."""
    return 0 < num_rows * num_proxies * BYTES_PER_ENTRY <= budget


def rows_per_block(
    num_rows: int, *, num_negatives: int, num_proxies: int, budget: int, world_size: int = 1, device: str = "cpu"
) -> int:
    """Return the number of rows per block that fit `budget` bytes; at least one, whatever it needs."""
    per_row = candidate_bytes_per_row(num_negatives, num_proxies, world_size=world_size, device=device)
    return max(1, min(num_rows, budget // max(1, per_row)))


def candidate_bytes_per_row(num_negatives: int, num_proxies: int, *, world_size: int, device: str) -> int:
    """Return the bytes per row of a block, alone or with other ranks, whose candidates the owner receives."""
    received = 0
    if world_size > 1:  # a small block may belong to a single rank
        received = _BYTES_PER_RECEIVED_CANDIDATE * world_size * min(num_negatives, num_proxies)
    if looks_at_pairs(num_negatives, num_proxies):
        return BYTES_PER_PAIR * expected_pairs(num_negatives, num_proxies) + received
    return (_BYTES_PER_SHARED_CANDIDATE if world_size > 1 else _BYTES_PER_CANDIDATE[device]) * num_proxies + received


def looks_at_pairs(num_negatives: int, num_proxies: int) -> bool:
    """Whether few enough proxies are wanted for the search above a guessed bound to pay off."""
    return num_proxies >= 4096 and 32 * num_negatives <= num_proxies


def keep_best(
    similarity_Rn: Tensor,
    *,
    num_negatives: int,
    row_counts: Sequence[int],
    proxy_counts: Sequence[int],
    group: dist.ProcessGroup | None,
    exchange: Exchange = "candidates",
) -> Tensor:
    """Mark the candidates among the `num_negatives` best of their row over all ranks; bool [R, n].

    Called on all ranks of `group`. Each rank's candidates hold its min(m, p) best, in index order; -inf is no
    candidate.
    """
    lowest = torch.finfo(similarity_Rn.dtype).min  # fewer than wanted: the others are NaN
    if group is None:
        missing = max(0, num_negatives - similarity_Rn.shape[1])
        filled_Rn = torch.nn.functional.pad(similarity_Rn, (0, missing), value=-math.inf) if missing else similarity_Rn
        threshold_R = kth_largest(filled_Rn, num_negatives).clamp_min(lowest)
        if not similarity_Rn.is_cuda:  # where looking for ties costs less than resolving them
            at_least_Rn = similarity_Rn >= threshold_R[:, None]
            if not bool((at_least_Rn.sum(dim=1) > num_negatives).any()):  # no tie at the threshold: done
                return at_least_Rn
        is_above_Rn = similarity_Rn > threshold_R[:, None]
        quota_R = num_negatives - is_above_Rn.sum(dim=1)
    else:
        if exchange == "candidates":
            threshold_R, quota_R = _agree_by_candidates(similarity_Rn, num_negatives, row_counts, proxy_counts, group)
        else:
            threshold_R, quota_R = _agree_by_histogram(similarity_Rn, num_negatives, group)
        threshold_R = threshold_R.clamp_min(lowest)
        is_above_Rn = similarity_Rn > threshold_R[:, None]
    equal_Rn = similarity_Rn == threshold_R[:, None]
    # Rare; local, no collective depends on it. On a GPU without looking, which would wait for it.
    if equal_Rn.is_cuda or bool((equal_Rn.sum(dim=1) > quota_R).any()):
        equal_Rn &= equal_Rn.cumsum(dim=1) <= quota_R[:, None]
    return is_above_Rn | equal_Rn


def _candidates(
    embeddings_RD: Tensor, bank: Bank, excluded_R2: Tensor, num_negatives: int, memory_budget: int
) -> tuple[Tensor, Tensor | None]:
    """Return similarities [R, n] that include the rank's best min(m, p) of each row, in index order, and their proxies
    (None: all).
    """
    num_rows, num_proxies = len(embeddings_RD), len(bank.proxies)
    if looks_at_pairs(num_negatives, num_proxies):
        pairs, longest = best_pairs(
            embeddings_RD, bank, excluded_R2=excluded_R2, num_wanted=num_negatives, memory_budget=memory_budget
        )
        return padded(pairs, num_rows=num_rows, longest=longest)
    similarity_Rp = all_similarities(embeddings_RD, bank)
    start_R, stop_R = excluded_R2.clamp(0, num_proxies).unbind(1)
    offset_e = torch.arange(int((stop_R - start_R).max()), device=start_R.device)
    row_n, offset_n = (offset_e < (stop_R - start_R)[:, None]).nonzero().unbind(1)
    similarity_Rp[row_n, start_R[row_n] + offset_n] = -math.inf
    return similarity_Rp, None


def _agree_by_candidates(
    similarity_Rn: Tensor,
    num_negatives: int,
    row_counts: Sequence[int],
    proxy_counts: Sequence[int],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Find every image's threshold [R] and this rank's quota of ties at it; the image's owner decides."""
    own_rank = rank_in(group)
    num_own = row_counts[own_rank]
    # 1. to the owners: each rank's best negatives
    num_best = min(num_negatives, proxy_counts[own_rank])
    best_Rq = largest(similarity_Rn, min(num_best, similarity_Rn.shape[1]))
    best_Rq = torch.nn.functional.pad(best_Rq, (0, num_best - best_Rq.shape[1]), value=-math.inf)
    candidates = exchange_rows(
        best_Rq,
        send_counts=row_counts,
        receive_shapes=[(num_own, min(num_negatives, count)) for count in proxy_counts],
        group=group,
    )
    # 2. the owners decide
    threshold_b, quota_bW = _threshold_and_quotas(candidates, num_negatives)
    # 3. back to the ranks: (threshold, quota) of every image; float64 represents float32 values and counts exactly
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
    """Find the m-th largest of all ranks' candidates [b], and each rank's quota of values equal to it [b, W].

    Lower ranks hold lower global indices, so they are served first.
    """
    all_bq = torch.cat(list(candidates), dim=1)
    threshold_b = kth_largest(all_bq, num_negatives)
    num_ties_b = num_negatives - (all_bq > threshold_b[:, None]).sum(dim=1)
    equal_bW = torch.stack([(block == threshold_b[:, None]).sum(dim=1) for block in candidates], dim=1)
    served_before_bW = equal_bW.cumsum(dim=1) - equal_bW
    return threshold_b, torch.minimum((num_ties_b[:, None] - served_before_bW).clamp_min(0), equal_bW)


def _agree_by_histogram(similarity_Rn: Tensor, num_negatives: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Find the same by radix selection (Knuth, The Art of Computer Programming, volume 3, 5.2.2), one byte of the
    threshold at a time.
    """
    num_rows, _ = similarity_Rn.shape
    key_Rn = _ordered_bits(similarity_Rn)
    bits = torch.iinfo(key_Rn.dtype).bits
    prefix_R = key_Rn.new_zeros(num_rows)
    wanted_R = torch.full((num_rows,), num_negatives, device=key_Rn.device)  # rank of the threshold among those left
    inside_Rn = similarity_Rn > -math.inf
    for shift in range(bits - 8, -1, -8):
        digit_Rn = ((key_Rn >> shift) & (_NUM_BINS - 1)).long()
        count_Rh = torch.zeros(num_rows, _NUM_BINS, dtype=torch.int32, device=key_Rn.device)
        count_Rh.scatter_add_(1, digit_Rn, inside_Rn.int())
        from_top_Rh = all_reduce_sum(count_Rh, group=group).flip(1).cumsum(1)  # number in this bin and those above
        step_R = (from_top_Rh < wanted_R[:, None]).sum(dim=1)
        above_R = torch.where(step_R > 0, from_top_Rh.gather(1, (step_R - 1).clamp_min(0)[:, None])[:, 0], 0)
        wanted_R = wanted_R - above_R
        bin_R = _NUM_BINS - 1 - step_R
        inside_Rn &= digit_Rn == bin_R[:, None]
        prefix_R |= bin_R.to(prefix_R.dtype) << shift
    # `inside` holds the values equal to the threshold, of which the ranks keep `wanted` in rank order
    equal_W1R = gather_rows(inside_Rn.sum(dim=1)[None], row_counts=[1] * world_size_of(group), group=group)
    served_before_R = equal_W1R[: rank_in(group)].sum(dim=0)
    return _from_ordered_bits(prefix_R, similarity_Rn.dtype), (wanted_R - served_before_R).clamp_min(0)


def _ordered_bits(value: Tensor) -> Tensor:
    """Map floats to integers whose bytes, read as unsigned, have the same order (both zeros are equal)."""
    bits = (value + 0.0).view(torch.int32 if value.dtype == torch.float32 else torch.int64)
    lowest = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, ~bits, bits ^ lowest)


def _from_ordered_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert `_ordered_bits`."""
    lowest = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, bits ^ lowest, ~bits).view(dtype)
