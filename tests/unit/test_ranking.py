"""The exact order: self left out by id, ties by id, cuts that do not split ties."""

import numpy as np
import pytest

from dist_proxygml.evaluation.ranking import first_positive_ranks, rank_neighbours
from dist_proxygml.evaluation.search import FlatIndex


class UnhelpfulSearcher:
    """A correct search that returns equal scores in the order that helps least: highest id first."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.num_rows, self.asked = rows, len(rows), []

    def search(self, queries: np.ndarray, num_neighbours: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(num_neighbours)
        scores = queries @ self.rows.T
        ids = np.broadcast_to(np.arange(self.num_rows), scores.shape)
        order = np.lexsort((-ids, -scores), axis=1)[:, : min(num_neighbours, self.num_rows)]
        return np.take_along_axis(scores, order, axis=1), order


def exact_order(rows: np.ndarray, query: int) -> list[int]:
    others = [other for other in range(len(rows)) if other != query]
    return sorted(others, key=lambda other: (-float(rows[query] @ rows[other]), other))


def test_a_query_is_left_out_by_its_id_even_when_a_copy_comes_first() -> None:
    rows = np.eye(4, dtype=np.float32)[[0, 1, 0, 2, 0, 3]]  # images 0, 2 and 4 are the same
    ranking = rank_neighbours(UnhelpfulSearcher(rows), rows, query_ids=np.arange(6), num_neighbours=2)
    assert ranking.ids[[0, 2, 4]].tolist() == [[2, 4], [0, 4], [0, 2]]
    assert ranking.scores[0].tolist() == [1.0, 1.0]


def test_equal_scores_come_in_the_order_of_their_ids() -> None:
    rows = np.array([[1, 0], [0, 1], [0, 1], [0, 1], [1, 0]], dtype=np.float32)
    ranking = rank_neighbours(UnhelpfulSearcher(rows), rows[:1], query_ids=np.array([0]), num_neighbours=4)
    assert ranking.ids.tolist() == [[4, 1, 2, 3]]


def test_the_search_widens_until_no_tie_straddles_its_cut() -> None:
    rows = np.ones((33, 2), dtype=np.float32)  # a collapsed model: everything ties with everything
    searcher = UnhelpfulSearcher(rows)
    ranking = rank_neighbours(searcher, rows[:3], query_ids=np.arange(3), num_neighbours=4)
    assert ranking.ids.tolist() == [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4]]
    assert searcher.asked == [6, 12, 24, 33]


def test_the_query_itself_does_not_count_as_a_neighbour_when_the_cut_is_judged() -> None:
    # The query scores 4 with itself, 3 with image 1, and 1 with five others, of which two are found.
    rows = np.array([[2, 0], [1.5, 0], *[[0.5, 0]] * 5], dtype=np.float32)
    searcher = UnhelpfulSearcher(rows)
    ranking = rank_neighbours(searcher, rows[:1], query_ids=np.array([0]), num_neighbours=2)
    assert ranking.ids.tolist() == [[1, 2]]


def test_the_search_does_not_widen_without_a_tie_at_its_cut() -> None:
    angles = np.linspace(0, 1, 30)
    rows = np.stack([np.cos(angles**2), np.sin(angles**2)], axis=1).astype(np.float32)
    searcher = UnhelpfulSearcher(rows)
    rank_neighbours(searcher, rows[:1], query_ids=np.array([0]), num_neighbours=4)
    assert searcher.asked == [6]


@pytest.mark.parametrize("searcher", [UnhelpfulSearcher, FlatIndex])
@pytest.mark.parametrize("num_neighbours", [1, 7, 40])
def test_the_order_is_that_of_a_full_sort(searcher: type, num_neighbours: int) -> None:
    generator = np.random.default_rng(num_neighbours)
    rows = generator.integers(-1, 2, (41, 4)).astype(np.float32)  # exact scores, many of them equal
    ranking = rank_neighbours(searcher(rows), rows, query_ids=np.arange(41), num_neighbours=num_neighbours)
    assert ranking.ids.tolist() == [exact_order(rows, query)[:num_neighbours] for query in range(41)]


def test_the_first_right_answer_is_counted_as_in_a_full_sort() -> None:
    generator = np.random.default_rng(5)
    rows = generator.integers(-1, 2, (61, 4)).astype(np.float32)
    labels = generator.integers(0, 20, 61)
    queries = np.array([q for q in range(61) if (labels == labels[q]).sum() > 1])
    expected = [1 + [labels[other] == labels[q] for other in exact_order(rows, q)].index(True) for q in queries]
    assert max(expected) > 5
    assert first_positive_ranks(rows, labels, query_ids=queries, tile_size=7).tolist() == expected
