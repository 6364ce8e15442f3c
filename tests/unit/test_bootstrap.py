"""The paired bootstrap against every resample there is, and against numbers worked out by hand."""

import itertools

import numpy as np
import pytest

from dist_proxygml.evaluation.bootstrap import MACRO, Interval, compare_queries

CLASSES = np.array([5, 5, 5, 2, 8, 8])
FIRST = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
OTHER = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])


def compared(*, by_class: bool, num_resamples: int = 20_000, seed: int = 3) -> list[dict[str, Interval]]:
    scores = [{"recall@1": FIRST, "map": FIRST / 2}, {"recall@1": OTHER}]
    return compare_queries(scores, CLASSES, reference=0, by_class=by_class, num_resamples=num_resamples, seed=seed)


def quantiles_of_all(values: list[float]) -> tuple[float, float]:
    """The percentiles 2.5 and 97.5 of equally likely values, as the smallest whose share reaches the level."""
    ordered = np.sort(values)
    return tuple(float(ordered[int(np.ceil(level * len(ordered))) - 1]) for level in (0.025, 0.975))  # type: ignore[return-value]


def test_resampled_classes_bring_all_their_queries() -> None:
    found = compared(by_class=True)[1]
    sums = {5: 2.0, 2: -1.0, 8: -1.0}  # of OTHER - FIRST
    sizes = {5: 3, 2: 1, 8: 2}
    drawn = list(itertools.product(sums, repeat=3))  # all 27, equally likely
    ratios = [sum(sums[c] for c in three) / sum(sizes[c] for c in three) for three in drawn]
    means = [sum(sums[c] / sizes[c] for c in three) / 3 for three in drawn]
    assert found["recall@1"].difference == pytest.approx(0.0)
    assert found["recall@1"][1:] == pytest.approx(quantiles_of_all(ratios), abs=1e-12)
    assert found[MACRO].difference == pytest.approx((2 / 3 - 1 - 1 / 2) / 3)
    assert found[MACRO][1:] == pytest.approx(quantiles_of_all(means), abs=1e-12)
    assert found.keys() == {"recall@1", MACRO}  # the other model has no map


def test_resampled_queries_are_drawn_one_by_one() -> None:
    found = compared(by_class=False)[1]
    differences = (OTHER - FIRST).tolist()
    means = [sum(six) / 6 for six in itertools.product(differences, repeat=6)]  # all 46,656
    assert found["recall@1"][1:] == pytest.approx(quantiles_of_all(means), abs=1e-12)
    assert found.keys() == {"recall@1"}


def test_all_models_share_the_draws_and_a_seed_gives_the_same_numbers_again() -> None:
    assert compared(by_class=True) == compared(by_class=True)
    assert compared(by_class=False, num_resamples=50) != compared(by_class=False, num_resamples=50, seed=4)
    reference, other = compared(by_class=True)
    assert reference["recall@1"] == (0.0, 0.0, 0.0)
    assert reference["recall@1"].is_tie
    assert other["recall@1"].is_tie


def test_zero_outside_of_the_interval_is_no_tie() -> None:
    scores = [{"mrr": np.zeros(40)}, {"mrr": np.tile([0.1, 0.3], 20)}, {"mrr": np.tile([-0.1, -0.3], 20)}]
    _, better, worse = compare_queries(scores, np.arange(40), reference=0, by_class=True, num_resamples=200, seed=0)
    assert not better["mrr"].is_tie
    assert 0.1 < better["mrr"].low < better["mrr"].difference < better["mrr"].high < 0.3
    assert worse["mrr"] == pytest.approx(tuple(-value for value in (better["mrr"].difference, *better["mrr"][:0:-1])))
