"""What a report looks at: the neighbour lists of a bounded number of queries, in the order that the metrics use.

With more queries than `most` it takes that many random ones, so that a page of 60,000 images takes no longer than one
of 10,000 queries among them. Where a table says which rows are queries and which are the gallery, lists hold gallery
rows only; otherwise every row is both. A query is never its own neighbour, and one without a right answer in the
gallery is no query.

Dimension key: n rows of the table, g gallery rows, m examined queries, t queries of a tile, K neighbours.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dist_proxygml.evaluation.embed import EmbeddingTable
from dist_proxygml.evaluation.ranking import rank_neighbours
from dist_proxygml.evaluation.search import FlatIndex

_TILE = 256


class Neighbourhoods(NamedTuple):
    """Lists of m queries; all numbers but `places` are rows of the table."""

    queries: Int[np.ndarray, " m"]  # in random order
    neighbours: Int[np.ndarray, "m K"]
    scores: Float[np.ndarray, "m K"]
    right: Bool[np.ndarray, "m K"]  # which are of the query's class
    first_right: Int[np.ndarray, " m"]  # the position of the first right answer, from 1, however far behind
    num_positives: Int[np.ndarray, " m"]  # right answers in the gallery
    gallery: Int[np.ndarray, " g"]  # ascending
    places: Int[np.ndarray, "m K"]  # of the neighbours, in `gallery`
    num_queries: int  # all that there are

    @property
    def are_all(self) -> bool:
        """Whether no query was left out."""
        return len(self.queries) == self.num_queries


def examine(
    table: EmbeddingTable, *, num_neighbours: int, most: int, progress: Callable[[int], object] | None = None
) -> Neighbourhoods:
    """Search for a table's queries, at most this many.

    Args:
        table: embeddings and labels.
        num_neighbours: K, less where the gallery has fewer images.
        most: queries that are examined; drawn at random where there are more.
        progress: called with the number of queries just done.

    Raises:
        ValueError: there is no query with a right answer, or no usable faiss.
    """
    embeddings_nD, labels_n = table.embeddings.numpy(), table.labels.numpy()
    is_query_n, is_gallery_n = roles(table)
    gallery_g = np.flatnonzero(is_gallery_n)
    # 1. Right answers of every row; a row that is in the gallery itself is not its own.
    in_gallery_of_class = np.bincount(labels_n[gallery_g], minlength=int(labels_n.max()) + 1)
    num_positives_n = in_gallery_of_class[labels_n] - is_gallery_n
    queries = np.flatnonzero(is_query_n & (num_positives_n > 0))
    if len(queries) == 0 or len(gallery_g) < 2:
        raise ValueError("no query has a right answer in the gallery")
    examined_m = np.random.default_rng(0).permutation(queries)[:most]

    # 2. Tile by tile, in the order of rows, as they lie in memory.
    by_row = np.argsort(examined_m)
    rows_g = np.ascontiguousarray(embeddings_nD[gallery_g])
    labels_g = labels_n[gallery_g]
    search = FlatIndex(rows_g)
    num_neighbours = min(num_neighbours, len(gallery_g) - 1)
    places_mK = np.zeros((len(examined_m), num_neighbours), dtype=np.int64)
    scores_mK = np.zeros((len(examined_m), num_neighbours), dtype=np.float32)
    first_right_m = np.zeros(len(examined_m), dtype=np.int64)
    for start in range(0, len(examined_m), _TILE):
        tile = by_row[start : start + _TILE]
        rows_t = examined_m[tile]
        self_t = np.where(is_gallery_n[rows_t], np.searchsorted(gallery_g, rows_t), -1)
        ranking = rank_neighbours(search, embeddings_nD[rows_t], query_ids=self_t, num_neighbours=num_neighbours)
        places_mK[tile], scores_mK[tile] = ranking.ids, ranking.scores
        scores_tg = embeddings_nD[rows_t] @ rows_g.T
        first_right_m[tile] = _first_right(scores_tg, labels_n[rows_t], labels_g, self_t)
        if progress is not None:
            progress(len(tile))

    # 3. A list that holds a right answer says itself where: the product above may differ from it in the last bit.
    neighbours_mK = gallery_g[places_mK]
    right_mK = labels_n[neighbours_mK] == labels_n[examined_m][:, None]
    behind_m = np.maximum(first_right_m, num_neighbours + 1)
    first_right_m = np.where(right_mK.any(axis=1), right_mK.argmax(axis=1) + 1, behind_m)
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


def roles(table: EmbeddingTable) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Which rows of a table are queries and which are in the gallery: all of them, unless it says otherwise."""
    everything_n = np.ones(len(table.labels), dtype=bool)
    given = (getattr(table, name, None) for name in ("is_query", "is_gallery"))
    is_query_n, is_gallery_n = (everything_n if part is None else np.asarray(part, dtype=bool) for part in given)
    return is_query_n, is_gallery_n


def _first_right(
    scores_tg: Float[np.ndarray, "t g"],
    labels_t: Int[np.ndarray, " t"],
    labels_g: Int[np.ndarray, " g"],
    self_t: Int[np.ndarray, " t"],
) -> Int[np.ndarray, " t"]:
    """One more than the number of gallery rows in front of the best right one: higher scores, and equal ones of lower
    rows. Overwrites each query's score with itself.
    """
    inside = np.flatnonzero(self_t >= 0)
    scores_tg[inside, self_t[inside]] = -np.inf
    positions = []
    for label, scores_g in zip(labels_t, scores_tg, strict=True):
        right = np.flatnonzero(labels_g == label)
        best = right[scores_g[right].argmax()]  # the first of equals: the lowest row
        equal = np.flatnonzero(scores_g[:best] == scores_g[best])
        positions.append(1 + int(np.count_nonzero(scores_g > scores_g[best])) + len(equal))
    return np.array(positions, dtype=np.int64)
