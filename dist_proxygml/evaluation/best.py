"""The three numbers of a run: its last evaluation, and its best one as the validation classes or the test split say.

    last                          what a run comes to if nobody chooses
    best on validation classes    what the test split gives where classes that were held out are best: an honest choice
    best on test                  the best of many looks at the test split itself: optimistic, though often published

All three are results on the test split, or on the validation classes of a run that has none. What is best goes by
checkpoint.keep_best, else by Recall@K of the smallest K; of equal ones the newest is taken. An evaluation before the
first step is none of a trained model, and does not count.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.storage.files import read_document, read_file
from dist_proxygml.storage.run_folder import RunFolder

LAST = "last"
BEST_ON_VALIDATION = "best on validation classes"
BEST_ON_TEST = "best on test"


class SelectedResult(NamedTuple):
    """A result on the test split, and the number of training steps after which it was measured."""

    step: int
    result: EvaluationResult


def select_results(run_directory: Path) -> dict[str, SelectedResult]:
    """The results of a run that there are, by "last", "best on validation classes" and "best on test". Without a test
    split the first two are measured on the validation classes themselves.

    Raises:
        ValueError: a stored evaluation is not one.
    """
    test, validation = read_evaluations(run_directory), read_evaluations(run_directory, of_validation=True)
    measured = test or validation
    measured.pop(0, None)
    if not measured:
        return {}
    metric = selection_metric(run_directory)
    # A run that was stopped between two evaluations of a step has only one of them.
    validation = {step: result for step, result in validation.items() if step in measured}
    steps = {LAST: max(measured), BEST_ON_VALIDATION: _best(validation, metric), BEST_ON_TEST: _best(test, metric)}
    return {name: SelectedResult(step, measured[step]) for name, step in steps.items() if step is not None}


def selected_rows(run_directory: Path) -> dict[str, Mapping[str, float]]:
    """The metrics of the best results, as rows for a table under that of the last one; none if there was no choice."""
    selected = select_results(run_directory)
    if len({chosen.step for chosen in selected.values()}) < 2 and BEST_ON_VALIDATION not in selected:
        return {}
    names = {
        BEST_ON_VALIDATION: "best on validation classes, step {}",
        BEST_ON_TEST: "best on test (optimistic), step {}",
    }
    return {
        text.format(selected[name].step): selected[name].result.metrics
        for name, text in names.items()
        if name in selected
    }


def read_evaluations(run_directory: Path, *, of_validation: bool = False) -> dict[int, EvaluationResult]:
    """Stored evaluations of the test split, or of validation classes, by step, in order; none on other data.

    Raises:
        ValueError: a file is not an evaluation.
    """
    found = {}
    for step, path in RunFolder(run_directory).evaluations(of_validation=of_validation).items():
        try:
            found[step] = EvaluationResult.from_json(read_file(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def selection_metric(run_directory: Path) -> str | None:
    """The metric that the run's configuration chooses by; None: Recall@K of the smallest K that was measured."""
    try:
        metric = read_document(RunFolder(run_directory).config)["checkpoint"]["keep_best"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return metric if isinstance(metric, str) else None


def _best(evaluations: Mapping[int, EvaluationResult], metric: str | None) -> int | None:
    scores = {step: _score(result, metric) for step, result in evaluations.items()}
    finite = {step: score for step, score in scores.items() if math.isfinite(score)}
    return max(finite, key=lambda step: (finite[step], step), default=None)


def _score(result: EvaluationResult, metric: str | None) -> float:
    recalls = [name for name in result.metrics if re.fullmatch(r"recall@\d+", name)]
    metric = metric or min(recalls, key=lambda name: int(name.split("@")[1]), default="")
    return result.metrics.get(metric, math.nan)
