"""Cosine similarities of images and proxies, a chunk of proxies at a time, and gradients through the kept pairs.

    S[i, j] = x_i . p_j / |p_j|

The whole matrix S is never materialised: a chunk of it stays in the processor's cache (or takes a quarter of the memory
budget), and only the pairs above a lower bound on the row's best m values leave it. Proxies are stored and multiplied
unnormalised; the product is divided by their lengths, which saves a normalised copy of the bank. On a GPU the chunk's
proxies are, where they are fewer numbers than its similarities.

The bound is guessed from a strided sample of the proxies, low enough to fail for about one row in a million; counting
detects such a row, which is then redone without a bound. Whenever the pairs exceed the budget, all but the best of each
row are dropped, which bounds memory for any data, including many equal similarities.

On a GPU the host waits for no chunk: each has room for twice the groups that are expected, and counts say at the end
whether they fitted; otherwise the search is done once more with the room that is needed.

Declined: torch.topk over each chunk (three times the cost of the product), a normalised copy of the bank, sparse
matrices (torch.nn.functional.embedding_bag computes the same two products in a quarter of the time on a CPU).

Dimension key: R rows (images), p proxies, w proxies of a chunk, n pairs, m pairs wanted per row, u proxies with a kept
pair, D embedding.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml.head.bank import Bank, Pairs
from dist_proxygml.head.matmul import product

# Similarities of a chunk on a CPU: 2 MiB in float32, which stay in the cache until they are compared.
_CACHED_SIMILARITIES = 1 << 19
# Proxies that are compared as a group before they are examined one by one.
_GROUP = 16
# Numbers of a temporary on a GPU: 256 MiB in float32. More would be no faster, fewer would be many launches.
_NUMBERS_AT_ONCE = 1 << 26
# Proxies whose gradient is computed at once on a CPU, to bound temporaries.
_ROWS_PER_UPDATE = 4096
# Proxies that are rounded to another precision at once, so that the bank is not copied.
_PROXIES_ROUNDED = 1 << 14
# Bytes per place of a padded row: value, proxy, and the masks and counts by which the best are kept.
_BYTES_PER_PLACE = 32
# Bytes per pair during collection: row, proxy and value, and the copies for filtering and sorting.
BYTES_PER_PAIR = 100


def all_similarities(embeddings_RD: Tensor, bank: Bank) -> Tensor:
    """Compute the whole matrix S [R, p]."""
    if bank.matmul_dtype == torch.float32:
        if _scales_proxies(embeddings_RD, bank):
            return product(embeddings_RD, bank.proxies * bank.inverse_norm[:, None])
        return product(embeddings_RD, bank.proxies).mul_(bank.inverse_norm)
    blocks = zip(bank.proxies.split(_PROXIES_ROUNDED), bank.inverse_norm.split(_PROXIES_ROUNDED), strict=True)
    return torch.cat(
        [_product(embeddings_RD, proxies_wD, bank.matmul_dtype).mul_(inverse_w) for proxies_wD, inverse_w in blocks],
        dim=1,
    )


def chunk_of_similarities(embeddings_RD: Tensor, bank: Bank, chunk: slice) -> Tensor:
    """Compute S [w, R] of adjacent proxies.

    Proxies by rows: a product with few columns is faster than one with few rows.
    """
    proxies_wD, inverse_w1 = bank.proxies[chunk], bank.inverse_norm[chunk, None]
    if _scales_proxies(embeddings_RD, bank):
        return _product(proxies_wD * inverse_w1, embeddings_RD, bank.matmul_dtype)
    return _product(proxies_wD, embeddings_RD, bank.matmul_dtype).mul_(inverse_w1)


def pair_similarities(embeddings_RD: Tensor, bank: Bank, row_n: Tensor, proxy_n: Tensor) -> Tensor:
    """Compute S [n] of the given pairs, a few at a time."""
    size = _rows_at_once(bank.proxies)
    dots = [
        torch.linalg.vecdot(embeddings_RD[row_w], bank.proxies[proxy_w])
        for row_w, proxy_w in zip(row_n.split(size), proxy_n.split(size), strict=True)
    ]
    return joined(dots) * bank.inverse_norm[proxy_n]


def kth_largest(value_Rn: Tensor, k: int) -> Tensor:
    """Find the k-th largest number of each row, [R]; NaN counts as the largest.

    On a CPU by NumPy, whose selection is vectorised and ten times as fast as torch.kthvalue.
    """
    place = value_Rn.shape[1] - k
    if value_Rn.is_cuda:
        return value_Rn.kthvalue(place + 1, dim=1).values
    return torch.from_numpy(np.partition(value_Rn.detach().contiguous().numpy(), place, axis=1)[:, place].copy())


def largest(value_Rn: Tensor, count: int) -> Tensor:
    """Find the `count` largest numbers of each row, [R, count], in any order; NaN counts as the largest. All of them
    are returned as they are.
    """
    place = value_Rn.shape[1] - count
    if place == 0:
        return value_Rn
    if value_Rn.is_cuda:
        return value_Rn.topk(count, dim=1, sorted=False).values
    return torch.from_numpy(np.partition(value_Rn.detach().contiguous().numpy(), place, axis=1)[:, place:])


def counts_of(index_n: Tensor, num: int) -> Tensor:
    """Count how often each of 0 .. num-1 occurs, int64 [num]; unlike torch.bincount without waiting for a GPU."""
    if index_n.is_cuda:
        return torch.zeros(num, dtype=torch.int64, device=index_n.device).index_add_(
            0, index_n, torch.ones_like(index_n, dtype=torch.int64)
        )
    return torch.bincount(index_n, minlength=num)


def offsets_of(index_n: Tensor, num: int) -> Tensor:
    """Return where each of 0 .. num-1 begins among ascending indices, int64 [num]."""
    return torch.searchsorted(index_n, torch.arange(num, dtype=index_n.dtype, device=index_n.device))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors; a single one is not copied."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def best_pairs(
    embeddings_RD: Tensor, bank: Bank, *, excluded_R2: Tensor, num_wanted: int, memory_budget: int
) -> tuple[Pairs, int]:
    """Find pairs that include the `num_wanted` most similar proxies of each row (or all), among some more.

    Of equally similar proxies, those with the lowest index are included. Also returns the largest number of a row.

    Args:
        embeddings_RD: rows.
        bank: proxies, finite.
        excluded_R2: int64, range [first, stop) of the proxies excluded for each row; may lie outside the bank.
        num_wanted: m.
        memory_budget: bytes for similarities and pairs.
    """
    num_proxies = len(bank.proxies)
    num_eligible_R = num_proxies - _overlap(excluded_R2, num_proxies)
    needed_R = num_eligible_R.clamp_max(num_wanted)
    floor_R = _guess_floor(embeddings_RD, bank, num_wanted, memory_budget)
    while True:
        pairs = _pairs_above(embeddings_RD, bank, floor_R, excluded_R2, num_wanted, memory_budget)
        count_R = counts_of(pairs.row, len(embeddings_RD))
        short_R = (count_R < needed_R) & (floor_R > -math.inf)  # only NaN can be missing beyond that
        if not len(count_R):
            return pairs, 0
        longest, is_short = torch.stack([count_R, short_R]).amax(dim=1).tolist()
        if not is_short:  # local: no collective depends on it
            break
        floor_R = floor_R.masked_fill(short_R, -math.inf)
    longest_padded = 8 * num_wanted  # a single long row would make `padded` wide
    if embeddings_RD.is_cuda:  # where width costs less than sorting
        longest_padded = max(longest_padded, memory_budget // (4 * _BYTES_PER_PLACE * len(embeddings_RD)))
    if longest > longest_padded:
        pairs, _ = _best_of(pairs, floor_R, num_wanted)
        longest = num_wanted
    return pairs, longest


def padded(pairs: Pairs, *, num_rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Pad the pairs to one line per row: similarities and proxies [num_rows, longest], filled with -inf and -1."""
    first_R = offsets_of(pairs.row, num_rows)
    column_n = torch.arange(len(pairs.row), device=pairs.row.device) - first_R[pairs.row]
    shape = (num_rows, longest)
    similarity_Rn = pairs.similarity.new_full(shape, -math.inf)
    similarity_Rn[pairs.row, column_n] = pairs.similarity
    proxy_Rn = pairs.proxy.new_full(shape, -1)
    proxy_Rn[pairs.row, column_n] = pairs.proxy
    return similarity_Rn, proxy_Rn


def embedding_gradient(pairs: Pairs, bank: Bank, weight_n: Tensor, *, num_rows: int) -> Tensor:
    """Gradient [R, D] of sum_n weight_n * S[row_n, proxy_n] with respect to the embeddings."""
    if bank.fused:
        from dist_proxygml.head import fused

        return fused.embedding_gradient(pairs, bank, weight_n, num_rows=num_rows)
    return F.embedding_bag(
        pairs.proxy,
        bank.proxies,
        offsets_of(pairs.row, num_rows),
        mode="sum",
        per_sample_weights=weight_n * bank.inverse_norm[pairs.proxy],
    )


def proxy_gradient(
    pairs: Pairs, bank: Bank, embeddings_RD: Tensor, weight_n: Tensor, *, touched_only: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of sum_n weight_n * S[row_n, proxy_n] with respect to the unnormalised proxies.

    d S_ij / d p_j = (x_i - S_ij p_j / |p_j|) / |p_j|

    Returns:
        touched_only: the proxies with a pair, int64 [u] ascending, and their gradients [u, D]; all others have none.
        Otherwise all proxies [p] and their gradients [p, D].
    """
    if bank.fused:
        from dist_proxygml.head import fused

        return fused.proxy_gradient(pairs, bank, embeddings_RD, weight_n, touched_only=touched_only)
    proxy_n, order_n = torch.sort(pairs.proxy.int(), stable=True)
    if touched_only:
        proxy_u, segment_n = torch.unique_consecutive(proxy_n, return_inverse=True)
        first_u, proxy_u = torch.searchsorted(proxy_n, proxy_u), proxy_u.long()
    else:
        proxy_u, segment_n = torch.arange(len(bank.proxies), device=proxy_n.device), proxy_n
        count_u = counts_of(proxy_n, len(bank.proxies))
        first_u = count_u.cumsum(0) - count_u
    weight_n = weight_n[order_n]
    gradient_uD = F.embedding_bag(
        pairs.row[order_n],
        embeddings_RD,
        first_u,
        mode="sum",
        per_sample_weights=weight_n * bank.inverse_norm[proxy_n],
    )
    radial_u = weight_n.new_zeros(len(proxy_u)).index_add_(0, segment_n, weight_n * pairs.similarity[order_n])
    radial_u *= bank.inverse_norm[proxy_u].square()
    size = _rows_at_once(bank.proxies)
    for first in range(0, len(proxy_u), size):
        rows = slice(first, first + size)
        proxies_wD = bank.proxies.index_select(0, proxy_u[rows]) if touched_only else bank.proxies[rows]
        gradient_uD[rows].addcmul_(proxies_wD, radial_u[rows, None], value=-1)
    return proxy_u, gradient_uD


def default_memory_budget(device: str) -> int:
    """Return the bytes for similarities where none are asked for: chunks of a CPU are small anyway."""
    return 1 << 31 if device == "cuda" else 1 << 28


def expected_pairs(num_wanted: int, num_proxies: int) -> int:
    """Estimate how many pairs per row `best_pairs` examines."""
    stride, rank = _sample_of(num_wanted, num_proxies)
    return num_proxies if rank is None else rank * stride


def _sample_of(num_wanted: int, num_proxies: int) -> tuple[int, int | None]:
    """Return the stride of the sampled proxies, and the rank, among their similarities, of a value that more than
    `num_wanted` of all similarities exceed almost surely; None where a guess does not help.

    The number of sampled proxies among the row's best m is about Poisson distributed with mean s = m * sample / p. The
    sampled value of rank s + 5 sqrt(s) + 3 is among them with a probability of about 1e-6.
    """
    stride = _prime_from(num_proxies // min(max(1024, num_proxies // 32), 1 << 16))
    num_sampled = math.ceil(num_proxies / stride)
    expected = num_wanted * num_sampled / max(1, num_proxies)
    rank = math.ceil(expected + 5 * math.sqrt(expected) + 3)
    return stride, rank if rank < num_sampled and stride > 1 else None


def _guess_floor(embeddings_RD: Tensor, bank: Bank, num_wanted: int, memory_budget: int) -> Tensor:
    """Guess a bound [R] below the row's `num_wanted` largest similarities, almost surely; -inf where none helps."""
    stride, rank = _sample_of(num_wanted, len(bank.proxies))
    if rank is None:
        return embeddings_RD.new_full((len(embeddings_RD),), -math.inf)
    sample = Bank(bank.proxies[::stride], bank.inverse_norm[::stride], bank.matmul_dtype)
    size = max(1, memory_budget // (4 * sampled_bytes_per_row(num_wanted, len(bank.proxies))))
    floors = []
    for rows_wD in embeddings_RD.split(size):
        chunks = [similarity_wR for _, similarity_wR in _similarity_chunks(rows_wD, sample, memory_budget)]
        floors.append(kth_largest(joined(chunks).T, rank))
    return joined(floors)


def sampled_bytes_per_row(num_wanted: int, num_proxies: int) -> int:
    """Return the bytes per row that guessing the bound takes."""
    stride, rank = _sample_of(num_wanted, num_proxies)
    return 12 * math.ceil(num_proxies / stride) if rank is not None else 4


def _prime_from(number: int) -> int:
    """Return the least prime from `number` on, or 1: a stride that cycles through all of a class's proxies."""
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(max(0, number)) + 1)):
        number += 1
    return max(1, number)


class _Groups(NamedTuple):
    """Groups of proxies of which one may exceed the row's floor, sorted by chunk, group, row."""

    row: Tensor
    first_proxy: Tensor
    similarity: Tensor


def _pairs_above(
    embeddings_RD: Tensor, bank: Bank, floor_R: Tensor, excluded_R2: Tensor, num_wanted: int, memory_budget: int
) -> Pairs:
    """Find all pairs with S > floor until the budget is full, then only the best `num_wanted` of each row."""
    most = max(memory_budget // (2 * BYTES_PER_PAIR), 2 * num_wanted * len(embeddings_RD))
    if bank.fused:
        from dist_proxygml.head import fused  # triton is not available on every machine

        num_rows = len(embeddings_RD)
        likely = 1024 + 13 * num_rows * expected_pairs(num_wanted, len(bank.proxies)) // 10
        pairs = fused.pairs_above(
            embeddings_RD,
            bank.proxies,
            bank.inverse_norm,
            floor_R,
            excluded_R2,
            matmul_dtype=bank.matmul_dtype,
            capacity=min(likely, num_rows * len(bank.proxies)),
            most=max(likely, memory_budget // fused.BYTES_PER_PAIR),
        )
        if bank.searches is not None:
            bank.searches.done += 1
            bank.searches.given_up += pairs is None
        if pairs is not None:
            return pairs
    group = _GROUP if 4 * _GROUP * num_wanted <= len(bank.proxies) else 1  # where most groups hold none
    # Groups are collected in preallocated memory: small long-lived tensors would fragment what each chunk frees.
    width = chunk_width(len(embeddings_RD), memory_budget=memory_budget, device=embeddings_RD.device.type)
    capacity = max(most, width * len(embeddings_RD)) // group
    if embeddings_RD.is_cuda:
        found = _pairs_above_at_once(
            embeddings_RD, bank, floor_R, excluded_R2, num_wanted, memory_budget, group, capacity
        )
        if found is not None:
            return found
    waiting = _Groups(
        row=torch.empty(capacity, dtype=torch.int64, device=embeddings_RD.device),
        first_proxy=torch.empty(capacity, dtype=torch.int64, device=embeddings_RD.device),
        similarity=embeddings_RD.new_empty(capacity, group),
    )
    num_waiting = 0
    pairs = Pairs(waiting.row[:0], waiting.row[:0], waiting.similarity[:0, 0])
    for first, similarity_wR in _similarity_chunks(embeddings_RD, bank, memory_budget):
        groups = _groups_above(similarity_wR, floor_R, first, group)
        if num_waiting + len(groups.row) > capacity:
            pairs = _with_groups(pairs, _Groups(*(part[:num_waiting] for part in waiting)), floor_R, excluded_R2)
            num_waiting = 0
            if len(pairs.row) > most:
                pairs, floor_R = _best_of(pairs, floor_R, num_wanted)
        for part, new in zip(waiting, groups, strict=True):
            part[num_waiting : num_waiting + len(new)] = new
        num_waiting += len(groups.row)
    return _with_groups(pairs, _Groups(*(part[:num_waiting] for part in waiting)), floor_R, excluded_R2)


def _pairs_above_at_once(
    embeddings_RD: Tensor,
    bank: Bank,
    floor_R: Tensor,
    excluded_R2: Tensor,
    num_wanted: int,
    memory_budget: int,
    group: int,
    capacity: int,
) -> Pairs | None:
    """Find all pairs with S > floor, reading counts once after the last chunk; None if the groups exceed `capacity`."""
    num_rows, num_proxies = len(embeddings_RD), len(bank.proxies)
    width = chunk_width(num_rows, memory_budget=memory_budget, device=embeddings_RD.device.type)
    width = min(width, -(-num_proxies // _GROUP) * _GROUP)
    num_chunks = max(1, -(-num_proxies // width))
    expected = num_rows * expected_pairs(num_wanted, num_proxies) * width // max(1, num_proxies)
    room = min(2 * expected + 1024, num_rows * width // group)
    offset_g = torch.arange(group, device=floor_R.device)
    floor_R1 = F.pad(floor_R, (0, 1), value=math.inf)  # the last is that of empty places, whose row is -1
    while room * num_chunks <= capacity:
        # 1. The groups of each chunk of which one may exceed the row's floor.
        places, similarities, counts = [], [], []
        for _, similarity_wR in _similarity_chunks(embeddings_RD, bank, memory_budget):
            similarity_vgR = similarity_wR.view(-1, group, num_rows)
            is_above_vR = (similarity_vgR.amax(dim=1) if group > 1 else similarity_wR) > floor_R
            place_h2 = torch.nonzero_static(is_above_vR, size=room, fill_value=-1)
            group_h, row_h = place_h2.unbind(1)
            similarities.append(similarity_vgR[group_h, :, row_h])
            places.append(place_h2)
            counts.append(is_above_vR.sum())
        if not counts:
            return Pairs(excluded_R2[:0, 0], excluded_R2[:0, 1], floor_R[:0])
        # 2. Their pairs.
        group_h, row_h = joined(places).unbind(1)
        similarity_hg = joined(similarities)
        first_of_chunk = torch.arange(0, len(counts) * width, width, device=group_h.device)
        first_h = first_of_chunk[:, None].add(group_h.view(-1, room), alpha=group).flatten()
        proxy_hg = first_h[:, None] + offset_g
        start_h1, stop_h1 = excluded_R2[row_h].split(1, dim=1)
        is_pair_hg = similarity_hg > floor_R1[row_h, None]
        is_pair_hg &= (proxy_hg < start_h1) | (proxy_hg >= stop_h1)
        num_pairs, *found = torch.stack([is_pair_hg.sum(), *counts]).tolist()
        if max(found) <= room:
            hit_n, offset_n = torch.nonzero_static(is_pair_hg, size=num_pairs).unbind(1)
            # Chunks and groups are in ascending order, so a stable sort by row orders the proxies too.
            row_n, order_n = torch.sort(row_h[hit_n].int(), stable=True)
            hit_n, offset_n = hit_n[order_n], offset_n[order_n]
            return Pairs(row_n.long(), proxy_hg[hit_n, offset_n], similarity_hg[hit_n, offset_n])
        room = max(found)
    return None


def _similarity_chunks(embeddings_RD: Tensor, bank: Bank, memory_budget: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first proxy and the similarities [w, R] of each chunk, w a multiple of the group size.

    Whole groups are contiguous.
    """
    num_rows, num_proxies = len(embeddings_RD), len(bank.proxies)
    width = chunk_width(num_rows, memory_budget=memory_budget, device=embeddings_RD.device.type)
    for first in range(0, num_proxies, width):
        chunk = slice(first, first + width)
        similarity_wR = chunk_of_similarities(embeddings_RD, bank, chunk)
        if len(similarity_wR) % _GROUP:
            similarity_wR = F.pad(similarity_wR, (0, 0, 0, -len(similarity_wR) % _GROUP), value=-math.inf)
        yield first, similarity_wR


def chunk_width(num_rows: int, *, memory_budget: int, device: str) -> int:
    """Return the proxies per chunk, a multiple of the group size, that fit a CPU's cache or part of the budget."""
    if device == "cpu":
        similarities = min(memory_budget // 32, _CACHED_SIMILARITIES)  # four bytes each, plus their masks and indices
    else:
        similarities = memory_budget // 16
    return max(_GROUP, similarities // max(1, num_rows) // _GROUP * _GROUP)


def _product(left: Tensor, right: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    """Compute left @ right.T, accumulated in the precision of the inputs."""
    dtype = left.dtype
    if matmul_dtype == torch.float32:  # at least the precision of the inputs
        return product(left, right)
    left, right = left.to(matmul_dtype), right.to(matmul_dtype)
    if left.device.type == "cuda" and dtype == torch.float32:  # the only one that CUDA takes for it
        return torch.mm(left, right.T, out_dtype=dtype)
    return product(left.to(dtype), right.to(dtype))  # the same rounding of the inputs, slowly


def _scales_proxies(embeddings_RD: Tensor, bank: Bank) -> bool:
    """Whether the proxies are divided by their lengths rather than S: on a GPU, where they are fewer numbers. Not where
    they are rounded, which they would be otherwise than elsewhere.
    """
    is_fewer = embeddings_RD.shape[0] > embeddings_RD.shape[1]
    return embeddings_RD.is_cuda and is_fewer and bank.matmul_dtype == torch.float32


def _rows_at_once(proxies_pD: Tensor) -> int:
    return max(1, _NUMBERS_AT_ONCE // max(1, proxies_pD.shape[1])) if proxies_pD.is_cuda else _ROWS_PER_UPDATE


def _groups_above(similarity_wR: Tensor, floor_R: Tensor, first: int, group: int) -> _Groups:
    """Find the groups of a chunk whose largest similarity exceeds the row's floor; few remain."""
    similarity_vgR = similarity_wR.view(-1, group, similarity_wR.shape[1])
    largest_vR = similarity_vgR.amax(dim=1) if group > 1 else similarity_wR
    group_h, row_h = (largest_vR > floor_R).nonzero().unbind(1)
    return _Groups(row_h, group_h * group + first, similarity_vgR[group_h, :, row_h])


def _with_groups(pairs: Pairs, groups: _Groups, floor_R: Tensor, excluded_R2: Tensor) -> Pairs:
    """Merge into the pairs, in order, those above the floor in the groups found after them."""
    row_h, first_proxy_h, similarity_hg = groups
    if similarity_hg.shape[1] == 1:
        row_n, proxy_n, similarity_n = row_h, first_proxy_h, similarity_hg[:, 0]
    else:
        hit_n, offset_n = (similarity_hg > floor_R[row_h, None]).nonzero().unbind(1)
        row_n, proxy_n, similarity_n = row_h[hit_n], first_proxy_h[hit_n] + offset_n, similarity_hg[hit_n, offset_n]
    start_n, stop_n = excluded_R2[row_n].unbind(1)
    allowed_n = (proxy_n < start_n) | (proxy_n >= stop_n)
    row_n, proxy_n, similarity_n = (
        torch.cat([old, new[allowed_n]]) for old, new in zip(pairs, (row_n, proxy_n, similarity_n), strict=True)
    )
    # Chunks and groups came in ascending order, so a stable sort by row orders the proxies too.
    row_n, order_n = torch.sort(row_n.int(), stable=True)  # int32 sorts several times faster
    return Pairs(row_n.long(), proxy_n[order_n], similarity_n[order_n])


def _best_of(pairs: Pairs, floor_R: Tensor, num_wanted: int) -> tuple[Pairs, Tensor]:
    """Keep the best `num_wanted` pairs of each row, lower proxies first among equals; return the floor for later
    proxies too.
    """
    best_n = torch.argsort(pairs.similarity, descending=True, stable=True)
    best_n = best_n[torch.argsort(pairs.row[best_n], stable=True)]  # by row, similarity descending, proxy
    row_n = pairs.row  # the same rows in the same order
    count_R = counts_of(row_n, len(floor_R))
    rank_n = torch.arange(len(row_n), device=row_n.device) - (count_R.cumsum(0) - count_R)[row_n]
    last_n = best_n[rank_n == num_wanted - 1]
    floor_R = floor_R.index_put((pairs.row[last_n],), pairs.similarity[last_n])
    kept_n = best_n[rank_n < num_wanted].sort().values
    return Pairs(*(part[kept_n] for part in pairs)), floor_R


def _overlap(range_R2: Tensor, stop: int) -> Tensor:
    """Count how many of 0 .. stop-1 lie in each range."""
    start_R, end_R = range_R2.clamp(0, stop).unbind(1)
    return end_R - start_R
