"""Scores that are the same on every machine, in any order of summation, and how far float32 products may be from them.

    score(x, y) = sum_d x_d y_d,   x and y unit rows rounded to multiples of 2^-26

A rounded component is still a float32 number. In float64 every product of two of them is a multiple of 2^-52, and so is
every partial sum, none larger than |x| |y| by Cauchy and Schwarz: a multiple of 2^-52 below 2 fits the 53 bits of a
float64. So a float64 product of such rows has no rounding at all, whatever library, tile, number of threads or device
computes it.

float32 products only find candidates. In any order of summation, with or without fused multiply-add,

    |float32 product - score| <= gamma_D sum_d |x_d y_d| <= gamma_D |x| |y|,   gamma_D = D u / (1 - D u),  u = 2^-24

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), so a comparison that is decided by more
than that is decided. Declined: float64 for everything (half as fast on CPUs, a fraction on GPUs), and rounding scores
to fewer digits, which only moves the boundary that two machines may see a score on different sides of.

Dimension key: n rows, q queries, g gallery rows, p pairs, D embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int

from dist_proxygml.distributed.gpus import exact_products

SCALE = 2.0**26  # one over the unit of a component
LONGEST = 1.01  # of a row: beyond the rounding of a unit row, and far below sqrt(2), where float64 would round
CHUNK = 1 << 17  # numbers that stay in a core's cache


def round_rows(embeddings_nD: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """float32 unit rows rounded to multiples of 2^-26; a copy.

    Raises:
        ValueError: rows that are not of unit length.
    """
    rows_nD = embeddings_nD.astype(np.float32) * np.float32(SCALE)  # exact, and so is the way back
    np.rint(rows_nD, out=rows_nD)
    rows_nD *= np.float32(1 / SCALE)
    step = max(1, CHUNK // max(1, rows_nD.shape[1]))
    for start in range(0, len(rows_nD), step):
        part_nD = rows_nD[start : start + step]
        lengths_n = np.sqrt(np.einsum("nd,nd->n", part_nD, part_nD, dtype=np.float64))
        wrong_n = ~((lengths_n < LONGEST) & (lengths_n > 2 - LONGEST))
        if wrong_n.any():
            first = int(wrong_n.argmax())
            raise ValueError(
                f"expected rows of unit length, got {lengths_n[first]:.4g} in row {start + first}; normalise the "
                "embeddings first"
            )
    return rows_nD


def error_bound(embedding_dim: int) -> float:
    """Most that a float32 product of two rounded rows can be from their score; a little more than gamma_D, for lengths
    above 1 and for bounds that are rounded to float32 themselves.
    """
    assert embedding_dim < 1 << 16
    return 1.03 * embedding_dim * 2.0**-24 + 2.0**-22


def scores_of_pairs(
    queries_qD: Float[np.ndarray, "q D"],
    gallery_gD: Float[np.ndarray, "g D"],
    query_p: Int[np.ndarray, " p"],
    gallery_p: Int[np.ndarray, " p"],
) -> Float[np.ndarray, " p"]:
    """The score of each listed pair of rounded rows, float64, exact."""
    scores_p = np.empty(len(query_p))
    step = max(1, CHUNK // queries_qD.shape[1])
    for start in range(0, len(query_p), step):
        pairs = slice(start, start + step)
        left_pD = queries_qD[query_p[pairs]].astype(np.float64)
        right_pD = gallery_gD[gallery_p[pairs]].astype(np.float64)
        scores_p[pairs] = np.einsum("pd,pd->p", left_pD, right_pD)
    return scores_p


def scores_of_block(
    queries_qD: Float[np.ndarray, "q D"], gallery_gD: Float[np.ndarray, "g D"]
) -> Float[np.ndarray, "q g"]:
    """The scores of all pairs of rounded rows, float64, exact."""
    return np.asarray(queries_qD.astype(np.float64) @ gallery_gD.astype(np.float64).T)


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """torch products of float32 in float32 proper: without autocast, TF32 or bfloat16, whatever is set around it."""
    with exact_products(), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield
