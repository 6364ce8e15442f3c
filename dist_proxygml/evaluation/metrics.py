"""Retrieval and clustering metrics, per query, from neighbours in their exact order.

    rel(i)         1 if the i-th neighbour (self left out) has the query's label
    R              number of images with the query's label, the query left out
    Recall@K       1 if any of rel(1) .. rel(K)                             in the metric-learning sense: a hit rate
    R-Precision    sum_{i <= R} rel(i) / R
    MAP@R          sum_{i <= R} rel(i) * (hits among the first i) / i / R   Musgrave et al., arXiv 2003.08505
    NMI            2 I(U; V) / (H(U) + H(V))                                arithmetic averaging

Recall in the sense of information retrieval (hits over R) is another number and is not offered
under this name. MRR is not either: it needs the position of the first right answer wherever it is,
and the list ends after K. Queries without a positive (R = 0) are the caller's to leave out.

Dimension key: q queries, n images, K neighbours.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int


def count_positives(labels_n: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """R of every image: how many others share its label."""
    _, class_n, counts = np.unique(labels_n, return_inverse=True, return_counts=True)
    return np.asarray(counts[class_n] - 1)


def recall_at(relevant_qK: Bool[np.ndarray, "q K"], k: int) -> Bool[np.ndarray, " q"]:
    """Recall@k of each query: whether a right answer is among its first k neighbours."""
    assert 1 <= k <= relevant_qK.shape[1]
    return np.asarray(relevant_qK[:, :k].any(axis=1))


def r_precision(
    relevant_qK: Bool[np.ndarray, "q K"], num_positives_q: Int[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    """R-Precision of each query: the share of right answers among its first R neighbours. K must
    reach the largest R.
    """
    return np.asarray(_within_r(relevant_qK, num_positives_q).sum(axis=1) / num_positives_q)


def map_at_r(relevant_qK: Bool[np.ndarray, "q K"], num_positives_q: Int[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """MAP@R of each query: precision at each right answer among the first R, summed, over R. K must
    reach the largest R.
    """
    counted_qK = _within_r(relevant_qK, num_positives_q)
    precision_qK = np.cumsum(counted_qK, axis=1) / np.arange(1, counted_qK.shape[1] + 1)
    return np.asarray((precision_qK * counted_qK).sum(axis=1) / num_positives_q)


def tie_bounds(
    relevant_qK: Bool[np.ndarray, "q K"], scores_qK: Float[np.ndarray, "q K"], *, tolerance: float
) -> tuple[Bool[np.ndarray, " q"], Bool[np.ndarray, " q"]]:
    """Recall@1 of each query if its ties went worst and if they went best: (pessimistic,
    optimistic).

    Scores within `tolerance` of each other count as tied: what another machine's rounding may turn
    around. The list must reach beyond R, so that it holds a wrong answer if the gallery has one.
    """
    best_right_q = np.where(relevant_qK, scores_qK, -np.inf).max(axis=1)
    best_wrong_q = np.where(relevant_qK, -np.inf, scores_qK).max(axis=1)
    # A right answer behind the end of the list scores at most what the list's last neighbour
    # scores.
    best_right_at_most_q = np.maximum(best_right_q, scores_qK[:, -1])
    return best_right_q > best_wrong_q + tolerance, best_right_at_most_q >= best_wrong_q - tolerance


def normalized_mutual_information(labels_n: Int[np.ndarray, " n"], clusters_n: Int[np.ndarray, " n"]) -> float:
    """NMI of a clustering with arithmetic averaging, by scikit-learn."""
    from sklearn.metrics import (
        normalized_mutual_info_score,
    )  # a slow import that only clustering needs

    return float(normalized_mutual_info_score(labels_n, clusters_n, average_method="arithmetic"))


def exact_mean(values_q: Float[np.ndarray, " q"]) -> float:
    """The mean with one rounding: independent of the order and the grouping of the values."""
    return math.fsum(values_q.tolist()) / len(values_q)


def _within_r(relevant_qK: Bool[np.ndarray, "q K"], num_positives_q: Int[np.ndarray, " q"]) -> Bool[np.ndarray, "q K"]:
    """The right answers among the first R neighbours of each query."""
    assert num_positives_q.size == 0 or 1 <= num_positives_q.min() <= num_positives_q.max() <= relevant_qK.shape[1]
    return np.asarray(relevant_qK & (np.arange(relevant_qK.shape[1]) < num_positives_q[:, None]))
