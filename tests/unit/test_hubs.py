"""How often images are in other images' lists: counted by hand, and estimated from a part of the lists."""

import numpy as np
import pytest

from dist_proxygml.reporting.hubs import count_hubs


def test_occurrences_and_wrong_ones_are_those_counted_by_hand() -> None:
    neighbours = np.array([[3, 1], [3, 0], [3, 1], [2, 1]])
    wrong = np.array([[True, False], [False, False], [True, True], [False, True]])
    hubs = count_hubs(neighbours, wrong, num_gallery=5, num_queries=4)
    assert hubs.occurrences.tolist() == [1, 3, 1, 3, 0]
    assert hubs.wrong.tolist() == [0, 2, 0, 2, 0]
    # Mean 1.6; deviations -0.6, 1.4, -0.6, 1.4, -1.6.
    assert hubs.skewness == pytest.approx(
        (2 * -0.216 + 2 * 2.744 - 4.096) / 5 / ((2 * 0.36 + 2 * 1.96 + 2.56) / 5) ** 1.5
    )


def test_without_differences_there_is_no_skewness() -> None:
    neighbours = np.array([[1, 2], [0, 2], [0, 1]])
    assert count_hubs(neighbours, neighbours > 9, num_gallery=3, num_queries=3).skewness is None


def test_some_of_the_lists_give_the_skewness_of_all_without_bias() -> None:
    """A fifth of the queries."""
    generator = np.random.default_rng(0)
    num_queries, num_gallery = 3000, 1000
    popularity = generator.gamma(12.0, 1.0, num_gallery)
    scores = generator.gumbel(size=(num_queries, num_gallery)) + np.log(popularity)
    neighbours = np.argsort(-scores, axis=1)[:, :10]
    wrong = np.zeros_like(neighbours, dtype=bool)
    whole = count_hubs(neighbours, wrong, num_gallery=num_gallery, num_queries=num_queries).skewness
    assert whole is not None
    estimates, plain = [], []
    for _ in range(80):
        drawn = generator.permutation(num_queries)[:600]
        part = count_hubs(neighbours[drawn], wrong[drawn], num_gallery=num_gallery, num_queries=num_queries)
        estimates.append(part.skewness)
        counts = part.occurrences - part.occurrences.mean()
        plain.append((counts**3).mean() / (counts**2).mean() ** 1.5)
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - whole) < 4 * error
    assert abs(np.mean(plain) - whole) > 4 * error  # what it would be without the correction
