"""Neighbour lists of a bounded number of queries, for the report.

    order: score descending, then row ascending; scores are float32, so nearly equal ones may be ordered differently
        than in the metrics

Of more queries than `most`, that many random ones are examined, so that a page of 60,000 images takes no longer than
one of 10,000 queries among them. If queries and gallery are separate, lists hold gallery rows only; otherwise every row
is both. A query is never its own neighbour, and an image without a right answer in the gallery is not a query.

Dimension key: n rows of the table, g gallery rows, m examined queries, t queries of a tile, K neighbours.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_proxygml.evaluation.embedding_pass import EmbeddingTable

_TILE = 256


class Neighbourhoods(NamedTuple):
    """Lists of m queries; all indices except `places` are rows of the table."""

    queries: Int[np.ndarray, " m"]  # in random order
    neighbours: Int[np.ndarray, "m K"]
    scores: Float[np.ndarray, "m K"]
    right: Bool[np.ndarray, "m K"]  # which are of the query's class
    first_right: Int[np.ndarray, " m"]  # the rank of the first right answer, from 1, however far down
    num_positives: Int[np.ndarray, " m"]  # right answers in the gallery
    gallery: Int[np.ndarray, " g"]  # ascending
    places: Int[np.ndarray, "m K"]  # of the neighbours, in `gallery`
    num_queries: int  # in total

    @property
    def are_all(self) -> bool:
        """Whether all queries were examined."""
        return len(self.queries) == self.num_queries


def examine(
    table: EmbeddingTable,
    *,
    num_neighbours: int,
    most: int,
    is_gallery: Bool[np.ndarray, " n"] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Neighbourhoods:
    """Search for a table's queries, at most this many.

    Args:
        table: embeddings and labels.
        num_neighbours: K, or less if the gallery has fewer images.
        most: maximum number of queries; drawn at random if there are more.
        is_gallery: which rows form the gallery, the others being queries; None: all rows are both.
        progress: called with the number of queries just processed.

    Raises:
        ValueError: no query has a right answer.
    """
    labels_n = table.labels.numpy()
    is_gallery_n = np.ones(len(labels_n), dtype=bool) if is_gallery is None else is_gallery
    is_query_n = is_gallery_n if is_gallery is None else ~is_gallery
    gallery_g = np.flatnonzero(is_gallery_n)
    # 1. Right answers of every row; a row that is in the gallery itself is not its own.
    in_gallery_of_class = np.bincount(labels_n[gallery_g], minlength=int(labels_n.max()) + 1)
    num_positives_n = in_gallery_of_class[labels_n] - is_gallery_n
    queries = np.flatnonzero(is_query_n & (num_positives_n > 0))
    if len(queries) == 0 or len(gallery_g) < 2:
        raise ValueError("no query has a right answer in the gallery")
    examined_m = np.random.default_rng(0).permutation(queries)[:most]

    # 2. Tile by tile, in memory order.
    by_row = np.argsort(examined_m)
    rows_gD = table.embeddings[torch.from_numpy(gallery_g)]
    labels_g = labels_n[gallery_g]
    num_neighbours = min(num_neighbours, len(gallery_g) - 1)
    places_mK = np.zeros((len(examined_m), num_neighbours), dtype=np.int64)
    scores_mK = np.zeros((len(examined_m), num_neighbours), dtype=np.float32)
    first_right_m = np.zeros(len(examined_m), dtype=np.int64)
    for start in range(0, len(examined_m), _TILE):
        tile = by_row[start : start + _TILE]
        rows_t = examined_m[tile]
        scores_tg = table.embeddings[torch.from_numpy(rows_t)] @ rows_gD.T
        inside = np.flatnonzero(is_gallery_n[rows_t])
        scores_tg[inside, np.searchsorted(gallery_g, rows_t[inside])] = -torch.inf  # not its own neighbour
        places_mK[tile], scores_mK[tile] = _nearest(scores_tg, num_neighbours)
        first_right_m[tile] = _first_right(scores_tg.numpy(), labels_n[rows_t], labels_g)
        if progress is not None:
            progress(len(tile))

    neighbours_mK = gallery_g[places_mK]
    right_mK = labels_n[neighbours_mK] == labels_n[examined_m][:, None]
    return Neighbourhoods(
        examined_m,
        neighbours_mK,
        scores_mK,
        right_mK,
        first_right_m,
        num_positives_n[examined_m],
        gallery_g,
        places_mK,
        len(queries),
    )


def _nearest(scores_tg: Tensor, num_neighbours: int) -> tuple[Int[np.ndarray, "t K"], Float[np.ndarray, "t K"]]:
    """Find the highest scores and their places: score descending, then place ascending."""
    scores = scores_tg.numpy()
    highest = scores_tg.topk(min(num_neighbours + 1, scores.shape[1]), dim=1)
    values_tF, places_tF = highest.values.numpy(), highest.indices.numpy()
    order_tK = np.lexsort((places_tF, -values_tF), axis=1)[:, :num_neighbours]
    places_tK: Int[np.ndarray, "t K"] = np.take_along_axis(places_tF, order_tK, axis=1)
    if places_tF.shape[1] > num_neighbours:  # `topk`'s choice among equal scores is undefined
        for row in np.flatnonzero(values_tF[:, -2] == values_tF[:, -1]):
            places_tK[row] = np.argsort(-scores[row], kind="stable")[:num_neighbours]
    return places_tK, np.take_along_axis(scores, places_tK, axis=1)


def _first_right(
    scores_tg: Float[np.ndarray, "t g"], labels_t: Int[np.ndarray, " t"], labels_g: Int[np.ndarray, " g"]
) -> Int[np.ndarray, " t"]:
    """Find the rank, from 1, of each query's first right answer in the order of `_nearest`."""
    positions = []
    for label, scores_g in zip(labels_t, scores_tg, strict=True):
        right = np.flatnonzero(labels_g == label)
        best = right[scores_g[right].argmax()]  # the lowest place among equals
        num_higher = np.count_nonzero(scores_g > scores_g[best])
        num_equal = np.count_nonzero(scores_g[:best] == scores_g[best])
        positions.append(1 + num_higher + num_equal)
    return np.array(positions, dtype=np.int64)
