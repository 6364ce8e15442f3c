"""Paired bootstrap: how far the difference of two models on the same queries would vary with other queries or classes.

    difference   mean over queries of (score of this model - score of the reference)
    a resample   as many queries, or classes with all their queries, drawn with replacement; one draw for all models
    interval     the percentiles 2.5 and 97.5 of the resampled differences (Efron, Tibshirani, "An Introduction to the
                 Bootstrap", 1993, section 13)

Where a model is to work on classes that it has not seen, classes are what varies, and queries of one class are alike:
resampling queries would make the interval too narrow. Where all classes were trained, other photos of them are what
varies. What neither covers is training anew: other seeds move results too, see sweeps.

Declined: intervals of clustering metrics, which are no means over queries.

Dimension key: Q queries, U units that are drawn (queries or classes), M differences.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

LEVEL = 0.95
MACRO = "precision@1_macro"


class Interval(NamedTuple):
    """A difference and its 95 % interval, fractions."""

    difference: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether no difference is as plausible as this one."""
        return self.low <= 0 <= self.high


def compare_queries(
    scores: Sequence[Mapping[str, Float[np.ndarray, " Q"]]],
    class_Q: Int[np.ndarray, " Q"],
    *,
    reference: int,
    by_class: bool,
    num_resamples: int,
    seed: int,
) -> list[dict[str, Interval]]:
    """Compare models with a reference, metric by metric; the same numbers for the same seed.

    Args:
        scores: of each model, metric -> the score of each query, all in the same order.
        class_Q: of the queries.
        reference: which model the others are compared with.
        by_class: draw classes with all their queries; otherwise queries.
        num_resamples: number of draws.
        seed: of the draws.

    Returns:
        For each model the metrics that the reference has too; of the classes' mean (precision@1_macro) only with
        `by_class`. Those of the reference itself are zero.
    """
    # 1. Each metric of each model is a ratio of sums over units.
    _, unit_Q = np.unique(class_Q, return_inverse=True)
    size_U = np.bincount(unit_Q) if by_class else np.ones(len(class_Q))
    names, columns, weights = [], [], []
    for model, of_model in enumerate(scores):
        for metric in (name for name in of_model if name in scores[reference]):
            difference_Q = of_model[metric] - scores[reference][metric]
            names.append((model, metric))
            columns.append(np.bincount(unit_Q, weights=difference_Q) if by_class else difference_Q)
            weights.append(size_U)
            if by_class and metric == "recall@1":
                names.append((model, MACRO))
                columns.append(columns[-1] / size_U)
                weights.append(np.ones(len(size_U)))
    sum_UM, weight_UM = np.stack(columns, axis=1), np.stack(weights, axis=1)

    # 2. Draw.
    generator, num_units = np.random.default_rng(seed), len(size_U)
    resampled = np.empty((num_resamples, len(names)))
    for row in tqdm(range(num_resamples), desc="resampling", delay=2.0, leave=False):
        times_U = np.bincount(generator.integers(num_units, size=num_units), minlength=num_units).astype(np.float64)
        resampled[row] = (times_U @ sum_UM) / (times_U @ weight_UM)
    tail = (1 - LEVEL) / 2
    low_M, high_M = np.quantile(resampled, [tail, 1 - tail], axis=0)
    whole_M = sum_UM.sum(axis=0) / weight_UM.sum(axis=0)
    found: list[dict[str, Interval]] = [{} for _ in scores]
    for number, (model, metric) in enumerate(names):
        found[model][metric] = Interval(float(whole_M[number]), float(low_M[number]), float(high_M[number]))
    return found
