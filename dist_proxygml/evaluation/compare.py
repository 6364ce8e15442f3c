"""Two evaluations side by side, if they measured the same thing.

Two numbers can be compared if they hold under one protocol: the same images, preparation, rules and settings. What
differs is named entry by entry. Versions of packages, the number of images in a forward pass and the precision of the
weights are reported and do not count: they move numbers, not meanings, and a result would otherwise be comparable with
nothing after any upgrade. A change of what a metric means has an entry of its own.
"""

import json
from pathlib import Path
from typing import NamedTuple

from dist_proxygml.config import flattened
from dist_proxygml.evaluation.best import read_evaluations
from dist_proxygml.evaluation.evaluator import EvaluationResult

_NOT_OF_THE_PROTOCOL = ("versions.", "data.forward_batch_size", "data.weights")
_NOT_THERE = "(not there)"
_MOST_CHARACTERS = 60


class NamedResult(NamedTuple):
    """An evaluation and what it is called in a table."""

    name: str
    result: EvaluationResult


class Difference(NamedTuple):
    """An entry of two protocols that is not the same in both."""

    entry: str  # such as data.index_sha256
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.entry}: {self.first} | {self.second}"

    @property
    def is_small(self) -> bool:
        """Whether it does not keep two results from being compared."""
        return self.entry.startswith(_NOT_OF_THE_PROTOCOL)


def open_result(path: Path) -> NamedResult:
    """The evaluation in a file, or the last one in the folder of a run.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        evaluations = read_evaluations(path)
        if not evaluations:
            raise ValueError(
                f"expected the folder of a run with an evaluation, found no evaluation/step-N.json in {path}; name "
                "another run, or the file of an evaluation"
            )
        step, result = list(evaluations.items())[-1]
        return NamedResult(f"{path}, step {step}", result)
    try:
        return NamedResult(str(path), EvaluationResult.from_json(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(
            f"expected the folder of a run or the file of an evaluation at {path}: {error.strerror}; correct the path"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def protocol_differences(first: EvaluationResult, second: EvaluationResult) -> list[Difference]:
    """The entries of two protocols that differ, in the order of their names."""
    entries = [{name: json.dumps(value) for name, value in flattened(result.protocol)} for result in (first, second)]
    names = sorted(entries[0].keys() | entries[1].keys())
    values = [(name, *(entry.get(name, _NOT_THERE) for entry in entries)) for name in names]
    return [Difference(name, *_shortened(one, other)) for name, one, other in values if one != other]


def format_comparison(first: NamedResult, second: NamedResult) -> str:
    """All metrics in percent, and what the second has more, in points."""
    names = [*first.result.metrics, *(name for name in second.result.metrics if name not in first.result.metrics)]
    lines = [("percent", "A", "B", "B - A")]
    for name in names:
        one, other = first.result.metrics.get(name), second.result.metrics.get(name)
        points = "-" if one is None or other is None else f"{100 * (other - one):+.2f}"
        lines.append((name, _percent(one), _percent(other), points))
    width = max(len(line[0]) for line in lines)
    table = "\n".join(f"{name:<{width}}{one:>9}{other:>9}{points:>9}" for name, one, other, points in lines)
    return f"A: {first.name}\nB: {second.name}\n\n{table}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _shortened(one: str, other: str) -> tuple[str, str]:
    """Both texts, cut where they are long to what is around the first difference."""
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    is_long = max(len(one), len(other)) > _MOST_CHARACTERS
    start = max(0, common - _MOST_CHARACTERS // 2) if is_long else 0

    def cut(text: str) -> str:
        rest = text[start : start + _MOST_CHARACTERS]
        return f"{'...' if start else ''}{rest}{'...' if start + len(rest) < len(text) else ''}"

    return cut(one), cut(other)
