"""GPU kernels for the three loops over the bank in similarity.py, with the same results.

    pairs_above          product, division by the proxies' lengths, comparison and compaction in one pass: only the
                         pairs above the floor are written, never S [R, p]
    embedding_gradient   each row's pairs summed in segments of a fixed length, then each row's segments
    proxy_gradient       each proxy's pairs and the radial part in one pass, without a temporary of the result's size

Sums are in float32 and in a fixed order, so results are deterministic. Pairs are found in any order, then sorted by a
unique key.

Written in Triton, which comes with torch on Linux. This file cannot be imported without it, so callers import it only
where there is a GPU. With TRITON_INTERPRET=1 set before triton is imported, the kernels run on a CPU, slowly; tests do
that.

Triton launches kernels on the current device, torch's operators run where the tensors are; hence `device_of` around
every launch.

Declined: TF32 for float32 inputs (its ten-bit mantissa changes the selection); atomic additions over segments (not
deterministic); counting first and writing in order in a second pass (no sort, but twice the product); numbering a
tile's pairs by a scan (spills).

At the rates of an H100 (3.35 TB/s; 990 TFLOP/s in bfloat16, 495 in TF32, 67 in float32), D = 128 and 1,024 rows, the
search takes at least, in ms (computed, not measured):

    proxies     read in float32    read in bfloat16    bfloat16 product    TF32 three times    float32 product
    1 million        0.15               0.08                0.26                 1.6                 3.9
    10 million       1.5                0.8                 2.6                  16                  39

Declined until it can be timed: a bfloat16 copy of the bank (the product decides, not reading; the copy would be kept by
the optimizer, and rounds otherwise once it is divided by lengths), TMA (the same bytes), float32 products of three in
TF32 (at most 2.5 times as fast; other digits than the twin's).

Dimension key: R rows (images), r = R + 1, p proxies, n pairs, u proxies with a gradient, s segments, D embedding.
Inside kernels, blocks of indices have singular names, and P, R, D, N are block sizes.
"""

# Triton ships no type information, and its compiler expects kernels without annotations.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dist_proxygml.head.bank import Bank, Pairs

# Pairs of a row summed by one program: long rows are spread over many programs, and a partial sum (D numbers) is small
# compared with its pairs.
_SEGMENT = 1024
# Of a pair that is found: key and similarity, their sorted copies, row and proxy, and what sorting takes.
BYTES_PER_PAIR = 64


def pairs_above(
    embeddings_RD: Tensor,
    proxies_pD: Tensor,
    inverse_norm_p: Tensor,
    floor_R: Tensor,
    excluded_R2: Tensor,
    *,
    matmul_dtype: torch.dtype,
    capacity: int,
    most: int | None = None,
) -> Pairs | None:
    """Find all pairs with S > their row's floor, sorted by row, then by proxy; None if there are too many.

    Synchronises with the device once, to read the number of pairs. Where that is over the capacity but at most `most`,
    the kernel runs again, with room for them all.

    Args:
        embeddings_RD: rows, float32.
        proxies_pD: unnormalised, float32, contiguous.
        inverse_norm_p: their inverse lengths.
        floor_R: exclusive lower bound of S.
        excluded_R2: int64, range [first, stop) of the proxies excluded for each row; may lie outside the bank.
        matmul_dtype: float32, or bfloat16 to round the inputs of products, the bank's tile by tile.
        capacity: number of pairs that there is room for, 12 bytes each, and their sorted copy.
        most: maximum number; None: `capacity`.
    """
    assert embeddings_RD.dtype == proxies_pD.dtype == torch.float32
    assert proxies_pD.is_contiguous()  # must not be copied
    num_rows, dim = embeddings_RD.shape
    num_proxies = len(proxies_pD)
    key_n = torch.empty(capacity, dtype=torch.int64, device=embeddings_RD.device)
    similarity_n = embeddings_RD.new_empty(capacity)
    num_found = torch.zeros(1, dtype=torch.int64, device=embeddings_RD.device)
    tile = _tile(num_rows, matmul_dtype)
    num_tiles = triton.cdiv(num_rows, tile["BLOCK_R"]) * triton.cdiv(num_proxies, tile["BLOCK_P"])
    if num_tiles > 0:
        with torch.cuda.device_of(proxies_pD):
            _pairs_above_kernel[(num_tiles,)](
                embeddings_RD.to(matmul_dtype).contiguous(),
                proxies_pD,
                inverse_norm_p.contiguous(),
                floor_R.contiguous(),
                excluded_R2.clamp(0, num_proxies).int().contiguous(),
                key_n,
                similarity_n,
                num_found,
                torch.zeros(num_tiles, dtype=torch.int32, device=embeddings_RD.device),
                num_rows,
                num_proxies,
                dim,
                capacity,
                **tile,
            )
    count = int(num_found)
    if capacity < count <= (most or 0):
        return pairs_above(
            embeddings_RD,
            proxies_pD,
            inverse_norm_p,
            floor_R,
            excluded_R2,
            matmul_dtype=matmul_dtype,
            capacity=count,
        )
    if count > capacity:
        return None
    key_n, order_n = key_n[:count].sort()
    return Pairs(key_n // num_proxies, key_n % num_proxies, similarity_n[order_n])


def embedding_gradient(pairs: Pairs, bank: Bank, weight_n: Tensor, *, num_rows: int) -> Tensor:
    """Gradient [R, D] of sum_n weight_n * S[row_n, proxy_n] with respect to the embeddings."""
    assert bank.proxies.is_contiguous()
    dim, device = bank.proxies.shape[1], weight_n.device
    if num_rows == 0:
        return bank.proxies.new_zeros(0, dim)
    # 1. Each row's segments. The upper bound is allocated, and unused segments are empty and belong to the last row, so
    #    that the device need not be synchronised.
    first_pair_r = torch.searchsorted(pairs.row, torch.arange(num_rows + 1, device=device))
    num_segments_R = (first_pair_r.diff() + _SEGMENT - 1) // _SEGMENT
    end_R = num_segments_R.cumsum(0)
    first_segment_R = end_R - num_segments_R
    segment_s = torch.arange(num_rows + len(weight_n) // _SEGMENT, device=device)
    row_s = torch.searchsorted(end_R, segment_s, right=True).clamp_max(num_rows - 1)
    start_s = first_pair_r[row_s] + (segment_s - first_segment_R[row_s]) * _SEGMENT
    stop_s = torch.minimum(start_s + _SEGMENT, first_pair_r[row_s + 1])
    # 2. Their sums. All rows' first segments come before the second ones: a row's pairs are sorted by proxy, so
    #    programs that run at the same time read the same part of the bank.
    order_s = torch.argsort(segment_s - first_segment_R[row_s], stable=True)
    partial_sD = bank.proxies.new_empty(len(segment_s), dim)
    block = _columns(dim)
    with torch.cuda.device_of(bank.proxies):
        _segment_sums_kernel[(len(segment_s), triton.cdiv(dim, block))](
            order_s,
            start_s,
            stop_s,
            pairs.proxy.contiguous(),
            weight_n.contiguous(),
            bank.inverse_norm.contiguous(),
            bank.proxies,
            partial_sD,
            dim,
            BLOCK_N=32,
            BLOCK_D=block,
            num_warps=4,
        )
    # 3. The sum of each row's segments.
    return F.embedding_bag(segment_s, partial_sD, first_segment_R, mode="sum")


def proxy_gradient(
    pairs: Pairs, bank: Bank, embeddings_RD: Tensor, weight_n: Tensor, *, touched_only: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of sum_n weight_n * S[row_n, proxy_n] with respect to the unnormalised proxies.

    d S_ij / d p_j = (x_i - S_ij p_j / |p_j|) / |p_j|

    One program handles all pairs of a proxy; there are at most R.

    Returns:
        touched_only: the proxies with a pair, int64 [u] ascending, and their gradients [u, D]; all others have none.
        Otherwise all proxies [p] and their gradients [p, D].
    """
    assert bank.proxies.is_contiguous()
    dim = bank.proxies.shape[1]
    proxy_n, order_n = torch.sort(pairs.proxy.int(), stable=True)
    if touched_only:
        proxy_u = torch.unique_consecutive(proxy_n)
    else:
        proxy_u = torch.arange(len(bank.proxies), dtype=torch.int32, device=proxy_n.device)
    gradient_uD = embeddings_RD.new_empty(len(proxy_u), dim)
    block = _columns(dim)
    if len(proxy_u) > 0:
        with torch.cuda.device_of(bank.proxies):
            _proxy_gradient_kernel[(len(proxy_u) * triton.cdiv(dim, block),)](
                proxy_u,
                torch.searchsorted(proxy_n, proxy_u),
                torch.searchsorted(proxy_n, proxy_u, right=True),
                order_n,
                pairs.row.contiguous(),
                pairs.similarity.contiguous(),
                weight_n.contiguous(),
                bank.inverse_norm.contiguous(),
                embeddings_RD.contiguous(),
                bank.proxies,
                gradient_uD,
                dim,
                BLOCK_N=8,
                BLOCK_D=block,
                num_warps=1,
            )
    return proxy_u.long(), gradient_uD


def _tile(num_rows: int, matmul_dtype: torch.dtype) -> dict[str, int]:
    """Launch parameters for a tile of S, tuned for Hopper: at least two programs are resident on a multiprocessor, so
    that one multiplies while another writes, and the inner loop of the product spills no registers.
    """
    rows = max(16, triton.next_power_of_2(num_rows))
    if matmul_dtype == torch.bfloat16:  # tensor cores: 82 KB of shared memory
        return {
            "BLOCK_P": 64,
            "BLOCK_R": min(128, rows),
            "BLOCK_D": 64,
            "num_warps": 8,
            "num_stages": 3,
            "maxnreg": 128,
        }
    return {"BLOCK_P": 128, "BLOCK_R": min(64, rows), "BLOCK_D": 16, "num_warps": 4, "num_stages": 3}


def _columns(dim: int) -> int:
    """Elements of an embedding summed by one program."""
    return min(128, triton.next_power_of_2(dim))


@triton.jit(do_not_specialize=["num_rows", "num_proxies", "capacity"])
def _pairs_above_kernel(
    embeddings_ptr,
    proxies_ptr,
    inverse_norm_ptr,
    floor_ptr,
    excluded_ptr,
    key_ptr,
    similarity_ptr,
    num_found_ptr,
    num_in_tile_ptr,
    num_rows,
    num_proxies,
    dim,
    capacity,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs that run at the same time share a few blocks of proxies, which are read from memory once, and all rows,
    # which stay in the L2 cache.
    num_row_blocks = tl.cdiv(num_rows, BLOCK_R)
    first_proxy = tl.program_id(0) // num_row_blocks * BLOCK_P
    first_row = tl.program_id(0) % num_row_blocks * BLOCK_R
    proxy = first_proxy + tl.arange(0, BLOCK_P)
    row = first_row + tl.arange(0, BLOCK_R)
    is_proxy = proxy < num_proxies
    is_row = row < num_rows

    # 1. Similarities of the tile.
    proxy_start = proxy.to(tl.int64) * dim  # a bank may have more elements than int32 can index
    row_start = row.to(tl.int64) * dim
    similarity = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for first in range(0, dim, BLOCK_D):
        element = first + tl.arange(0, BLOCK_D)
        is_element = element < dim
        left = tl.load(
            proxies_ptr + proxy_start[:, None] + element[None, :],
            mask=is_proxy[:, None] & is_element[None, :],
            other=0.0,
        )
        right = tl.load(
            embeddings_ptr + row_start[None, :] + element[:, None],
            mask=is_row[None, :] & is_element[:, None],
            other=0.0,
        )
        similarity = tl.dot(left.to(right.dtype), right, similarity, input_precision="ieee")
    # NaN beyond the last proxy exceeds no floor.
    similarity *= tl.load(inverse_norm_ptr + proxy, mask=is_proxy, other=float("nan"))[:, None]

    # 2. Those above the floor. Without any, the tile is done.
    floor = tl.load(floor_ptr + row, mask=is_row, other=float("inf"))
    is_above = similarity > floor[None, :]
    if tl.max(is_above.to(tl.int32)) > 0:
        excluded_start = tl.load(excluded_ptr + 2 * row, mask=is_row, other=0)
        excluded_stop = tl.load(excluded_ptr + 2 * row + 1, mask=is_row, other=0)
        is_allowed = (proxy[:, None] < excluded_start[None, :]) | (proxy[:, None] >= excluded_stop[None, :])

        # 3. Reserve space for all of them at once, and number them by a counter of the tile, in any order. As vectors:
        #    a tile of pointers would go through shared memory. What has no place has the number `size`, and the
        #    similarities go first, so that few registers are needed at a time.
        size: tl.constexpr = BLOCK_P * BLOCK_R
        is_pair_i = tl.reshape(is_above & is_allowed, [size])
        start = tl.atomic_add(num_found_ptr, tl.sum(is_pair_i.to(tl.int32)).to(tl.int64), sem="relaxed")
        counter_i = tl.zeros([size], tl.int32) + tl.program_id(0)
        number_i = tl.atomic_add(num_in_tile_ptr + counter_i, 1, mask=is_pair_i, sem="relaxed")
        number_i = tl.where(is_pair_i, number_i, size)
        room = tl.maximum(tl.minimum(capacity - start, size), 0).to(tl.int32)
        fits_i = number_i < room
        tl.store(similarity_ptr + start + number_i, tl.reshape(similarity, [size]), mask=fits_i)
        index_i = tl.arange(0, size)
        row_i = (first_row + index_i % BLOCK_R).to(tl.int64)
        key_i = row_i * num_proxies + first_proxy + index_i // BLOCK_R
        tl.store(key_ptr + start + number_i, key_i, mask=fits_i)


@triton.jit
def _segment_sums_kernel(
    order_ptr,
    start_ptr,
    stop_ptr,
    proxy_ptr,
    weight_ptr,
    inverse_norm_ptr,
    proxies_ptr,
    sum_ptr,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.load(order_ptr + tl.program_id(0))
    element = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_element = element < dim
    start = tl.load(start_ptr + segment)
    stop = tl.load(stop_ptr + segment)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        pair = first + tl.arange(0, BLOCK_N)
        is_pair = pair < stop
        proxy = tl.load(proxy_ptr + pair, mask=is_pair, other=0)
        factor = tl.load(weight_ptr + pair, mask=is_pair, other=0.0) * tl.load(
            inverse_norm_ptr + proxy, mask=is_pair, other=0.0
        )
        value = tl.load(
            proxies_ptr + proxy[:, None] * dim + element[None, :],
            mask=is_pair[:, None] & is_element[None, :],
            other=0.0,
        )
        total += factor[:, None] * value
    tl.store(sum_ptr + segment * dim + element, tl.sum(total, axis=0), mask=is_element)


@triton.jit
def _proxy_gradient_kernel(
    wanted_ptr,
    start_ptr,
    stop_ptr,
    order_ptr,
    row_ptr,
    pair_similarity_ptr,
    weight_ptr,
    inverse_norm_ptr,
    embeddings_ptr,
    proxies_ptr,
    gradient_ptr,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(dim, BLOCK_D)
    position = (tl.program_id(0) // num_blocks).to(tl.int64)
    element = tl.program_id(0) % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    is_element = element < dim
    start = tl.load(start_ptr + position)
    stop = tl.load(stop_ptr + position)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    radial = tl.zeros([BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_N):
        sorted_pair = first + tl.arange(0, BLOCK_N)
        is_pair = sorted_pair < stop
        pair = tl.load(order_ptr + sorted_pair, mask=is_pair, other=0)
        weight = tl.load(weight_ptr + pair, mask=is_pair, other=0.0)
        radial += weight * tl.load(pair_similarity_ptr + pair, mask=is_pair, other=0.0)
        row = tl.load(row_ptr + pair, mask=is_pair, other=0)
        value = tl.load(
            embeddings_ptr + row[:, None] * dim + element[None, :],
            mask=is_pair[:, None] & is_element[None, :],
            other=0.0,
        )
        total += weight[:, None] * value
    proxy = tl.load(wanted_ptr + position).to(tl.int64)
    inverse_norm = tl.load(inverse_norm_ptr + proxy)
    # A proxy without pairs is not read; its gradient is 0.
    value = tl.load(proxies_ptr + proxy * dim + element, mask=is_element & (start < stop), other=0.0)
    gradient = inverse_norm * (tl.sum(total, axis=0) - tl.sum(radial, axis=0) * inverse_norm * value)
    tl.store(gradient_ptr + position * dim + element, gradient, mask=is_element)
