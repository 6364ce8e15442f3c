"""Lists of a query's neighbours, to look at; metrics are counted by `rank_counts.py`.

    order: score descending, then id ascending; a query is never its own neighbour, wherever the
        search put it

The search is widened as long as a tie straddles its cut, because a top-k search keeps any of the
equal scores, not those of the lowest ids. Dropping the first column to exclude "self" was declined:
with repeated images it drops the repetition and keeps the query.

Dimension key: q queries, n gallery rows, K neighbours, F rows found by one search.
"""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int


class Searcher(Protocol):
    """Whatever finds the best-scoring gallery rows: `evaluation.search.FlatIndex`."""

    num_rows: int

    def search(
        self, queries_qD: Float[np.ndarray, "q D"], num_neighbours: int
    ) -> tuple[Float[np.ndarray, "q F"], Int[np.ndarray, "q F"]]:
        """Scores descending and row numbers; equal scores in any order."""
        ...


class Ranking(NamedTuple):
    """The K best neighbours of each query, self left out, best first."""

    ids: Int[np.ndarray, "q K"]
    scores: Float[np.ndarray, "q K"]


def rank_neighbours(
    gallery: Searcher,
    queries_qD: Float[np.ndarray, "q D"],
    *,
    query_ids: Int[np.ndarray, " q"],
    num_neighbours: int,
) -> Ranking:
    """The first `num_neighbours` of every query in the exact order.

    Args:
        gallery: row i holds the image with id i.
        queries_qD: embeddings of the queries.
        query_ids: their ids in the gallery, to leave each out of its own list.
        num_neighbours: K, at most the number of gallery rows less one.
    """
    assert 1 <= num_neighbours < gallery.num_rows
    self_q1 = query_ids[:, None]

    # 1. Search until the K best are certain: all rows that score above the worst row found have
    # been found.
    num_found = min(num_neighbours + 2, gallery.num_rows)  # self, and one row to see the cut
    while True:
        scores_qF, ids_qF = gallery.search(queries_qD, num_found)
        certain_qF = (scores_qF > scores_qF[:, -1:]) & (ids_qF != self_q1)
        if num_found == gallery.num_rows or certain_qF.sum(axis=1).min() >= num_neighbours:
            break
        num_found = min(2 * num_found, gallery.num_rows)

    # 2. Sort: self behind everything, then by score, then by id.
    order_qF = np.lexsort((ids_qF, -scores_qF, ids_qF == self_q1), axis=1)[:, :num_neighbours]
    return Ranking(
        np.take_along_axis(ids_qF, order_qF, axis=1),
        np.take_along_axis(scores_qF, order_qF, axis=1),
    )


def first_positive_ranks(
    embeddings_nD: Float[np.ndarray, "n D"],
    labels_n: Int[np.ndarray, " n"],
    *,
    query_ids: Int[np.ndarray, " q"],
    tile_size: int = 256,
) -> Int[np.ndarray, " q"]:
    """The position (from 1) of each query's first right answer, by counting the rows in front of
    it: no limit at K.

    Scores come from numpy's product, so a position may differ from `rank_neighbours` where scores
    agree to the last bits.
    """
    all_ids_n = np.arange(len(labels_n))
    positions = []
    for start in range(0, len(query_ids), tile_size):
        ids_q = query_ids[start : start + tile_size]
        scores_qn = embeddings_nD[ids_q] @ embeddings_nD.T
        self_qn = all_ids_n == ids_q[:, None]
        positive_qn = (labels_n == labels_n[ids_q][:, None]) & ~self_qn
        assert positive_qn.any(axis=1).all(), "a query without a positive has no first right answer"
        positive_scores_qn = np.where(positive_qn, scores_qn, -np.inf)
        best_q1 = positive_scores_qn.max(axis=1, keepdims=True)
        best_id_q1 = positive_scores_qn.argmax(axis=1)[:, None]  # the first of equals: the lowest id
        in_front_qn = (scores_qn > best_q1) | ((scores_qn == best_q1) & (all_ids_n < best_id_q1))
        positions.append(1 + (in_front_qn & ~self_qn).sum(axis=1))
    return np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)
