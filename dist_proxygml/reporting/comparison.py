"""A page with evaluations side by side: the table of `report compare`, with differences and their intervals."""

from collections.abc import Sequence
from pathlib import Path

from dist_proxygml.evaluation.compare import (
    NamedResult,
    Uncertainty,
    describe_result,
    describe_uncertainty,
    letters,
    metrics_of,
)
from dist_proxygml.evaluation.metrics import name_metrics
from dist_proxygml.reporting.render import render
from dist_proxygml.storage.files import publish_text


def write_comparison(path: Path, named: Sequence[NamedResult], reference: int, found: Uncertainty | None) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        named: the results.
        reference: which of them the others are compared with.
        found: intervals of the differences, if they could be had.
    """
    page = render(
        "compare.html",
        results=[{"letter": letters(number), "text": describe_result(one)} for number, one in enumerate(named)],
        reference=reference,
        names=name_metrics(metrics_of(named)),
        metrics=[one.result.metrics for one in named],
        intervals=None if found is None else found.intervals,
        how=None if found is None else describe_uncertainty(found),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, page)
