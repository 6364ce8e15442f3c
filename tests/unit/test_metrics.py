"""Metrics against numbers worked out by hand, a loop over a full sort in exact arithmetic, and scikit-learn."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_proxygml.evaluation import metrics
from dist_proxygml.evaluation.ranking import rank_neighbours
from dist_proxygml.evaluation.search import FlatIndex

# Two queries, five neighbours each. First: R = 3, right answers at 2, 3 and 5. Second: R = 2, right
# answers at 1 and 4.
RELEVANT = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]], dtype=bool)
NUM_POSITIVES = np.array([3, 2])


def test_recall_asks_for_any_right_answer_among_the_first_k() -> None:
    assert metrics.recall_at(RELEVANT, 1).tolist() == [False, True]
    assert metrics.recall_at(RELEVANT, 2).tolist() == [True, True]


def test_r_precision_is_the_share_of_right_answers_among_the_first_r() -> None:
    assert metrics.r_precision(RELEVANT, NUM_POSITIVES).tolist() == [2 / 3, 1 / 2]


def test_map_at_r_averages_the_precision_at_right_answers_over_r() -> None:
    first = (1 / 2 + 2 / 3) / 3  # the right answer at 5 lies behind R
    second = (1 / 1) / 2  # the one at 4 as well
    assert metrics.map_at_r(RELEVANT, NUM_POSITIVES) == pytest.approx([first, second], abs=1e-15)


def test_r_counts_the_others_of_the_class() -> None:
    assert metrics.count_positives(np.array([7, 3, 7, 9, 7, 3])).tolist() == [2, 1, 2, 0, 2, 1]


def test_a_list_shorter_than_r_is_refused() -> None:
    with pytest.raises(AssertionError):
        metrics.r_precision(RELEVANT, np.array([6, 2]))


@pytest.mark.parametrize(
    ("relevant", "scores", "bounds"),
    [
        ([0, 1, 0], [0.9, 0.9, 0.1], (False, True)),  # the best right and the best wrong answer tie
        ([1, 0, 0], [0.9, 0.9, 0.1], (False, True)),
        ([1, 0, 0], [0.9, 0.8, 0.1], (True, True)),
        ([0, 1, 0], [0.9, 0.8, 0.1], (False, False)),
        ([0, 0, 0], [0.9, 0.8, 0.8], (False, False)),
        (
            [0, 0, 0],
            [0.9, 0.9, 0.9],
            (False, True),
        ),  # a right answer behind the list may tie with its end
        ([1, 1, 1], [0.9, 0.9, 0.9], (True, True)),
    ],
)
def test_tie_bounds_take_the_ties_at_their_worst_and_at_their_best(
    relevant: list[int], scores: list[float], bounds: tuple[bool, bool]
) -> None:
    found = metrics.tie_bounds(np.array([relevant], bool), np.array([scores], np.float32), tolerance=1e-6)
    assert (bool(found[0][0]), bool(found[1][0])) == bounds


def test_nmi_of_two_equal_halves_cut_across_is_zero_and_of_the_same_cut_is_one() -> None:
    labels = np.array([0, 0, 1, 1])
    assert metrics.normalized_mutual_information(labels, np.array([5, 5, 2, 2])) == pytest.approx(1.0)
    assert metrics.normalized_mutual_information(labels, np.array([0, 1, 0, 1])) == pytest.approx(0.0)


def test_nmi_averages_the_entropies_arithmetically() -> None:
    # One class split in two: I = H(classes) = ln 2, H(clusters) = (3/2) ln 2, so NMI = 2 / (1 +
    # 3/2) = 0.8; geometric is 0.816.
    nmi = metrics.normalized_mutual_information(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]))
    assert nmi == pytest.approx(0.8, abs=1e-12)


def test_the_mean_does_not_depend_on_the_order_of_the_values() -> None:
    values = np.random.default_rng(0).random(1001)
    assert metrics.exact_mean(values) == metrics.exact_mean(values[::-1]) == math.fsum(values) / 1001


def integer_problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of small integers: every score is exact in float32, and ties are everywhere. Lone
    classes, duplicates, a large class.
    """
    generator = np.random.default_rng(seed)
    num_images = int(generator.integers(6, 90))
    labels = generator.integers(0, generator.integers(2, num_images), num_images)
    labels[: num_images // 4] = labels[0]  # one class of a quarter of the images, at least one lone one
    labels[-1] = labels.max() + 1
    if not metrics.count_positives(labels).any():
        labels[1] = labels[0]
    rows = generator.integers(-2, 3, (num_images, 5)).astype(np.float32)
    rows[num_images // 2 :: 3] = rows[0]
    return rows, labels


def oracle(rows: np.ndarray, labels: np.ndarray, recall_at: tuple[int, ...]) -> list[list[float]]:
    """Recalls, R-Precision and MAP@R of every query with a positive: a full sort in Python, written
    from the definitions.
    """
    scored = []
    for query, row in enumerate(rows):
        others = [other for other in range(len(rows)) if other != query]
        num_positives = sum(labels[other] == labels[query] for other in others)
        if num_positives == 0:
            continue
        order = sorted(others, key=lambda other: (-float(np.dot(row.astype(np.float64), rows[other])), other))
        hits = [int(labels[other] == labels[query]) for other in order]
        recalls = [float(any(hits[:k])) for k in recall_at]
        precision = Fraction(sum(hits[:num_positives]), int(num_positives))
        average = sum(
            (Fraction(sum(hits[: i + 1]), i + 1) for i in range(num_positives) if hits[i]),
            Fraction(0),
        ) / int(num_positives)
        scored.append([*recalls, float(precision), float(average)])
    return scored


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_every_metric_equals_a_full_sort_with_duplicates_ties_and_lone_classes(seed: int) -> None:
    rows, labels = integer_problem(seed)
    recall_at = (1, 2, 4)
    num_positives = metrics.count_positives(labels)
    num_neighbours = min(max(*recall_at, num_positives.max()), len(rows) - 1)
    ranking = rank_neighbours(FlatIndex(rows), rows, query_ids=np.arange(len(rows)), num_neighbours=int(num_neighbours))
    query = num_positives > 0
    relevant = (labels[ranking.ids] == labels[:, None])[query]
    found = np.stack(
        [
            *(metrics.recall_at(relevant, k) for k in recall_at),
            metrics.r_precision(relevant, num_positives[query]),
            metrics.map_at_r(relevant, num_positives[query]),
        ],
        axis=1,
    )
    # MAP@R sums up to R rounded quotients in float64.
    np.testing.assert_allclose(found, oracle(rows, labels, recall_at), rtol=0, atol=1e-14)
