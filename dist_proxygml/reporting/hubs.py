"""Hubs: images that are among the k nearest of far more queries than others are.

    N_k(g)    number of queries with gallery image g among their k nearest, the k-occurrence
    hubness   E[(N_k - mean)^3] / deviation^3, the skewness of N_k over the gallery

after Radovanovic, Nanopoulos and Ivanovic, "Hubs in Space", JMLR 11, 2010. About 0 if all images occur equally often,
well above 1 if a few images are in most lists; it grows with the dimension of the space, and hubs are mostly wrong
answers.

With lists of only m of the Q queries, drawn at random without replacement, the moments are still estimated without
bias: the factorial moments of such a thinned count are those of the full one times (m)_r / (Q)_r.

Dimension key: m lists, K neighbours, g gallery images.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Hubs(NamedTuple):
    """Occurrences of each gallery image in the lists."""

    occurrences: Int[np.ndarray, " g"]
    wrong: Int[np.ndarray, " g"]  # of these, in lists of queries of another class
    skewness: float | None  # of N_K over all queries; None where every image is in equally many lists


def count_hubs(
    neighbours_mK: Int[np.ndarray, "m K"], wrong_mK: Bool[np.ndarray, "m K"], *, num_gallery: int, num_queries: int
) -> Hubs:
    """Count hubs among the neighbours of m of `num_queries` queries.

    Args:
        neighbours_mK: positions in the gallery.
        wrong_mK: whether each has another class than its query.
        num_gallery: g.
        num_queries: total number of queries.
    """
    occurrences_g = np.bincount(neighbours_mK.ravel(), minlength=num_gallery)
    wrong_g = np.bincount(neighbours_mK[wrong_mK], minlength=num_gallery)
    return Hubs(occurrences_g, wrong_g, _skewness(occurrences_g, len(neighbours_mK), num_queries))


def _skewness(counts_g: Int[np.ndarray, " g"], num_lists: int, num_queries: int) -> float | None:
    """Estimate the skewness of the counts over all queries from those over some."""
    # 1. Factorial moments E[N], E[N (N - 1)], E[N (N - 1) (N - 2)].
    factorial, falling_g, scale = [], np.ones(len(counts_g)), 1.0
    for r in range(3):
        if num_lists <= r:
            return None
        falling_g = falling_g * (counts_g - r)
        scale *= (num_queries - r) / (num_lists - r)
        factorial.append(float(falling_g.mean()) * scale)
    # 2. From them the moments about zero, then about the mean.
    mean, second, third = factorial[0], factorial[1] + factorial[0], factorial[2] + 3 * factorial[1] + factorial[0]
    variance = second - mean**2
    if variance <= 1e-9 * max(mean, 1.0):
        return None
    return (third - 3 * mean * second + 2 * mean**3) / variance**1.5
